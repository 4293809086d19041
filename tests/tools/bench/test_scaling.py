"""Scaling of the benchmarks: equal work at every size, a check that sees errors, the target, and its picture."""

import numpy as np
import pytest
from PIL import Image

from sana import ops
from tests.tools.bench_reports import full_report, timing
from tools.bench import plots, report, scaling
from tools.bench.results import CaseResult, Report
from tools.bench.setting import Setting
from tools.bench.targets import MISSED, REACHED, SMALL, UNMEASURED, answers

QUICK = Setting("quick", "cpu")


def measured(times: dict[int, float], kind: str = "linear", dtype: str = "fp32") -> Report:
    """A report in which 16384 tokens took so many seconds at each size."""
    made = full_report()
    facts = {"dtype": dtype, "blocks": 1, "attention": f"{kind} attention", "pixels": list(times)}
    case = CaseResult("scaling", "time of 16384 latent tokens", f"scaling.{kind}.{dtype}", "measured", facts=facts,
                      timings={f"{pixels} px": timing(seconds) for pixels, seconds in times.items()})  # fmt: skip
    alone = [one for one in made.cases if one.key == "scaling"]
    return Report(made.suite, made.environment, made.roofline, [*alone, case])


@pytest.mark.parametrize("kind", [scaling.LINEAR, scaling.SOFTMAX])
def test_every_size_makes_the_same_number_of_tokens(monkeypatch, kind):
    comparison = scaling.build_transformer_comparison(kind, "fp32", QUICK)
    checks = comparison.check()
    assert checks and all(check.passed for check in checks.values()), checks
    seen: list[int] = []
    count = scaling.CachedDenoiser.__call__
    monkeypatch.setattr(
        scaling.CachedDenoiser,
        "__call__",
        lambda self: (seen.append(self.inputs.latents[0, 0].numel()), count(self))[1],
    )
    made = []
    for side in comparison.sides:
        seen.clear()
        side.run()
        assert len(set(seen)) == 1
        made.append(sum(seen))
    assert made == [64, 64] and [side.name for side in comparison.sides] == ["256 px", "128 px"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_result_is_not_timed(monkeypatch, dtype):
    comparison = scaling.build_transformer_comparison(scaling.LINEAR, dtype, QUICK)
    assert all(check.passed for check in comparison.check().values())
    right = ops.mix_ffn_cpu
    monkeypatch.setattr(ops, "mix_ffn_cpu", lambda *args, **kwargs: right(*args, **kwargs).roll(1, 1))
    assert not any(check.passed for check in comparison.check().values())


def test_the_cases_of_a_cpu_name_what_is_reduced():
    cases = [case for case in scaling.cases(Setting("cpu", "cpu")) if case.key.startswith("scaling.")]
    assert [case.key for case in cases] == ["scaling.linear.fp32", "scaling.linear.bf16", "scaling.softmax.fp32"]
    assert all("16384 latent tokens, DiT of 1 block, 0.6B widths" in case.name for case in cases)
    assert scaling.PIXELS["cpu"][0] == max(scaling.PIXELS["cpu"]) and f"{scaling.PIXELS['cpu'][1]} px" == SMALL


@pytest.mark.parametrize(("growth", "status"), [(0.9, REACHED), (1.14, REACHED), (1.16, MISSED)])
def test_fifteen_percent_more_time_a_token_are_allowed(growth, status):
    made = measured({4096: growth, 1024: 1.0, 2048: 1.0, 512: 3.0})
    found = [one for one in answers(made) if one.target.key == "scaling.linear.fp32"]
    assert [one.status for one in found] == [status]
    text = report.markdown(made, "x")
    assert f"{growth - 1:+.1%}" in text and "at most 15% more" in text
    others = [one.status for one in answers(made) if one.target.key == "scaling.linear.bf16"]
    assert set(others) == {UNMEASURED}


def test_a_run_of_scaling_alone_is_two_panels(tmp_path):
    pytest.importorskip("matplotlib")
    made = measured({4096: 3.0, 1024: 2.9, 2048: 2.8, 512: 3.1})
    made.cases.append(measured({4096: 9.0, 1024: 3.0, 2048: 5.0, 512: 3.1}, "softmax").cases[-1])
    plots.draw(made, tmp_path / "alone.png")
    alone = np.asarray(Image.open(tmp_path / "alone.png").convert("RGB")).astype(int)
    plots.draw(Report(made.suite, made.environment, {}, made.cases[:-2]), tmp_path / "less.png")
    less = np.asarray(Image.open(tmp_path / "less.png").convert("RGB")).astype(int)
    assert alone.shape == less.shape == (630, 1500, 3)
    for colour in ([0x1F, 0x5F, 0xA8], [0xD1, 0x60, 0x1F]):  # both networks stand in the right half, if measured
        drawn = [(np.abs(picture[:, 750:] - colour).sum(-1) < 12).sum() for picture in (alone, less)]
        assert drawn[0] > 500 and drawn[1] == 0


def test_beside_other_parts_it_is_one_panel_more(tmp_path):
    pytest.importorskip("matplotlib")
    made = full_report()
    made.cases.append(measured({4096: 3.0, 1024: 2.9}).cases[-1])
    plots.draw(made, tmp_path / "all.png")
    assert Image.open(tmp_path / "all.png").size == (1500, 1575)
