"""Settings of every test: one thread, no network, fixed seeds, fresh memory full of NaN; and the parity summary."""

import collections
import logging
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it then
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torchvision imports Triton, which reads it then
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a hub unless it sets these itself; every test starts from the same random state."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A command that a test runs shows sana's log lines; other tests do not expect its handlers."""
    logger = logging.getLogger("sana")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def nan_memory():
    """Fills fresh memory with NaN, so that a kernel that leaves part of its output unwritten fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out `slow` and `network` unless -m asks for them, and `gpu` where there is none."""
    asked = config.getoption("-m") or ""
    unwanted = [name for name in ("slow", "network") if name not in asked]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unwanted)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints how many recorded cases of each kind ran, and which kinds are not covered yet."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if getattr(report, "when", "call") == "call":
                counts.update((kind, outcome) for name, kind in report.user_properties if name == "parity_kind")
    if not counts:
        return
    from tests.parity.common import load_cases, parity_folder
    from tests.parity.test_parity import is_covered

    terminalreporter.section(f"parity: cases of {parity_folder()}")
    for kind in sorted({kind for kind, _ in counts}):
        passed, failed = counts[kind, "passed"], counts[kind, "failed"]
        bad = f", {failed} FAILED" if failed else ""
        terminalreporter.write_line(f"{kind}: {passed + failed} ran, {passed} passed{bad}")
    uncovered = collections.Counter(
        case.name if case.kind == "function" else case.kind for case in load_cases() if not is_covered(case)
    )
    for kind, count in sorted(uncovered.items()):
        terminalreporter.write_line(f"{kind}: not yet covered ({count} cases)")
