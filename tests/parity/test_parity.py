"""Every recorded case, run against our code. How a kind is run stands in runners/; this file only finds and judges."""

from collections.abc import Callable
from importlib import import_module

import pytest

from tests.parity.common import Case, load_cases

RUNNER_MODULES = (
    "dit", "autoencoder", "diffusion", "text", "data", "pipeline", "datasets", "samplers", "optimizers", "training"
)  # fmt: skip
NOT_YET_COVERED_KINDS = ("ladd_discriminator",)
NOT_YET_COVERED_FUNCTIONS: tuple[str, ...] = ()


def gather(table: str) -> dict[str, Callable[[Case], None]]:
    """Returns the union of all runner modules' tables `RUNNERS` (by kind) or `FUNCTIONS` (by case name)."""
    union: dict[str, Callable[[Case], None]] = {}
    for name in (f"tests.parity.runners.{module}" for module in RUNNER_MODULES):
        for key, runner in getattr(import_module(name), table, {}).items():
            assert key not in union, f"two runners for {key!r}"
            union[key] = runner
    return union


def find_runner(case: Case) -> Callable[[Case], None]:
    """Returns the runner of a case.

    Raises:
        AssertionError: nothing runs the case's kind (or, for kind "function", the case).
    """
    table, key = ("FUNCTIONS", case.name) if case.kind == "function" else ("RUNNERS", case.kind)
    runners = gather(table)
    assert key in runners, f"case {case.name}: no runner for {key!r}; {table} has {sorted(runners)}"
    return runners[key]


def is_covered(case: Case) -> bool:
    if case.kind == "function":
        return case.name not in NOT_YET_COVERED_FUNCTIONS
    return case.kind not in NOT_YET_COVERED_KINDS


def run_case(case: Case) -> None:
    """Runs one case; a case marked informative_only may also end in a clear ValueError."""
    runner = find_runner(case)
    try:
        runner(case)
    except ValueError as error:
        if not case.informative_only or not str(error):
            raise


@pytest.mark.parametrize("case", [case for case in load_cases() if is_covered(case)], ids=lambda case: case.name)
def test_case(case: Case, record_property: pytest.FixtureRequest) -> None:
    record_property("parity_kind", case.kind)
    run_case(case)


def test_an_unknown_kind_fails(tmp_path) -> None:
    case = Case({"name": "x/y", "kind": "no_such_kind", "tolerance": {"rtol": 0, "atol": 0}}, tmp_path)
    assert is_covered(case)
    with pytest.raises(AssertionError, match="no_such_kind"):
        run_case(case)


@pytest.mark.parametrize("actual", [1.0 + 2e-3, float("nan"), float("inf")])
def test_a_wrong_number_fails(tmp_path, actual: float) -> None:
    case = Case({"name": "x/y", "kind": "z", "tolerance": {"rtol": 1e-3, "atol": 0}}, tmp_path)
    case.assert_close([1.0005], [1.0])
    with pytest.raises(AssertionError, match="x/y out: 1 of 1 values differ"):
        case.assert_close([actual], [1.0], "out")


def test_a_wrong_shape_fails(tmp_path) -> None:
    case = Case({"name": "x/y", "kind": "z", "tolerance": {"rtol": 1, "atol": 1}}, tmp_path)
    with pytest.raises(AssertionError, match="shape"):
        case.assert_close([[1.0]], [1.0])
