"""Prints the parity results as a Markdown table: python -m tests.parity.table (SANA_PARITY_DIR chooses the folder)."""

import sys
from collections import defaultdict

import torch

from tests.parity import common
from tests.parity.test_parity import is_covered, run_case


def main() -> int:
    """Runs every covered case; exit code 1 if one fails."""
    worst: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    compare = common.assert_all_close

    def recording(actual: torch.Tensor, expected: torch.Tensor, *, rtol: float, atol: float, what: str) -> None:
        compare(actual, expected, rtol=rtol, atol=atol, what=what)
        if expected.numel():
            difference = (actual.double() - expected.double()).abs()
            share = (difference / (atol + rtol * expected.double().abs())).max().item()
            row = worst[what.split(" ", 1)[0]]
            row[0], row[1] = max(row[0], difference.max().item()), max(row[1], share)

    common.assert_all_close = recording
    kinds: dict[str, list[str]] = defaultdict(list)
    failed: list[str] = []
    for case in filter(is_covered, common.load_cases()):
        kinds[case.kind].append(case.name)
        try:
            run_case(case)
        except AssertionError as error:
            failed.append(f"{case.name}: {error}")
    print("| kind | cases | largest difference | of the tolerance |\n|---|---|---|---|")
    for kind, names in kinds.items():
        difference, share = (max(worst[name][i] for name in names) for i in (0, 1))
        print(f"| `{kind}` | {len(names)} | {difference:.1e} | {100 * share:.0f} % |")
    for line in failed:
        print("FAILED", line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
