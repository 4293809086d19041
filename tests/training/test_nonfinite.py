"""Which steps are skipped, when a run stops, and what the bundle holds."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sana.models.layers.finite import first_nonfinite_layer
from sana.training.nonfinite import (
    Evidence,
    NonFiniteGuard,
    TrainingDivergedError,
    first_nonfinite_gradient,
    write_bundle,
)

BAD = [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)]


def evidence(**changed):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].bias[0] = math.nan
    latents = torch.randn(3, 4)
    model(latents).sum().backward()
    model[0].bias.grad[1] = math.inf
    parts = {
        "keys": ["a", "b", "c"],
        "captions": ["eine Katze", "two owls", ""],
        "tensors": {"latents": latents, "sigma": torch.tensor([0.5, math.nan, 1.0])},
        "find_layer": lambda: first_nonfinite_layer(model, latents),
        "parameters": [*model.named_parameters()][1:],
        "local_loss": math.nan,
    }
    return Evidence(**(parts | changed))


@pytest.mark.parametrize(("loss", "grad_norm"), BAD)
def test_a_bad_step_is_skipped_and_a_good_one_is_not(tmp_path, loss, grad_norm):
    guard = NonFiniteGuard(1, tmp_path)
    assert not guard.check(1, 1e30, 0.0)
    assert guard.check(2, loss, grad_norm)
    assert not guard.check(3, 0.5, 1e30)
    assert guard.count == 1


def test_the_step_after_the_budget_stops_the_run_and_names_the_bundle(tmp_path):
    guard = NonFiniteGuard(4, tmp_path / "nonfinite")
    for step in range(1, 5):
        assert guard.check(step, math.nan, 1.0, evidence)
        guard.check(step, 1.0, 1.0, evidence)
    with pytest.raises(TrainingDivergedError) as stopped:
        guard.check(400, math.nan, 1.0, evidence)
    message = str(stopped.value)
    assert str(tmp_path / "nonfinite" / "step_00000400") in message
    assert message.endswith(".")
    assert "\n" not in message
    names = ["step_00000001", "step_00000002", "step_00000400"]  # the first two tell most, the last stopped the run
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == guard.bundles == names


def test_a_budget_of_none_stops_at_once_also_without_evidence(tmp_path):
    with pytest.raises(TrainingDivergedError):
        NonFiniteGuard(0, tmp_path).check(1, math.nan, 1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        NonFiniteGuard(-1, tmp_path)


def test_the_count_survives_a_resume(tmp_path):
    guard = NonFiniteGuard(2, tmp_path)
    guard.check(1, math.nan, 1.0, evidence)
    guard.check(2, math.nan, 1.0)
    other = NonFiniteGuard(2, tmp_path)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.bundles == ["step_00000001"]
    with pytest.raises(TrainingDivergedError):
        other.check(3, math.nan, 1.0)


def test_the_bundle_holds_the_batch_and_the_first_bad_layer(tmp_path):
    given = evidence()
    path = write_bundle(tmp_path, 7, math.nan, 2.5, given, skipped=3)
    report = json.loads((path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["first_bad_layer"] == "1.bias"
    assert report["first_bad_gradient"] == "0.bias"
    assert (report["step"], report["loss"], report["grad_norm"], report["skipped"]) == (7, "nan", "2.5", 3)
    assert (report["keys"], report["captions"]) == (["a", "b", "c"], ["eine Katze", "two owls", ""])
    assert report["tensors"]["sigma"] == {
        "shape": [3], "dtype": "float32", "nonfinite": 1, "min": 0.5, "max": 1.0, "mean": 0.75,
    }  # fmt: skip
    saved = load_file(path / "batch.safetensors")
    assert saved.keys() == {"latents", "sigma"}
    assert torch.equal(saved["latents"], given.tensors["latents"])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_bundle_is_bounded(tmp_path):
    tensors = {"small": torch.zeros(10), "large": torch.zeros(1000), "last": torch.zeros(5, dtype=torch.int64)}
    given = evidence(tensors=tensors, keys=["k"] * 5000, captions=["x" * 10_000])
    path = write_bundle(tmp_path, 1, math.nan, 1.0, given, max_bytes=100)
    report = json.loads((path / "report.json").read_text())
    assert load_file(path / "batch.safetensors").keys() == {"small", "last"}
    assert report["left_out"] == ["large"]
    assert (len(report["keys"]), len(report["captions"][0])) == (1024, 4096)
    assert sum(file.stat().st_size for file in path.iterdir()) < 40_000


def test_a_failing_search_or_disk_does_not_hide_the_divergence(tmp_path, caplog):
    def no_memory():
        raise torch.OutOfMemoryError("out of memory")

    path = write_bundle(tmp_path, 1, math.nan, 1.0, evidence(find_layer=no_memory))
    assert "out of memory" in json.loads((path / "report.json").read_text())["first_bad_layer"]
    (tmp_path / "file").write_text("a file where a folder is needed")
    with pytest.raises(TrainingDivergedError):
        NonFiniteGuard(0, tmp_path / "file").check(2, math.nan, 1.0, evidence)
    assert "could not be written" in caplog.text


def test_a_bundle_of_the_same_step_is_replaced(tmp_path):
    first = write_bundle(tmp_path, 1, math.nan, 1.0, evidence())
    (first / "stale").touch()
    second = write_bundle(tmp_path, 1, math.nan, 1.0, evidence(tensors={}))
    assert [file.name for file in second.iterdir()] == ["report.json"]


def test_of_several_processes_those_with_something_to_tell_write(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    good = evidence(local_loss=0.5, tensors={"latents": torch.zeros(2)})
    written = {}
    for rank, given in ((0, good), (1, good), (2, evidence()), (3, evidence(local_loss=0.1))):
        monkeypatch.setenv("RANK", str(rank))
        path = write_bundle(tmp_path, 3, math.nan, 1.0, given)
        written[rank] = path and path.name
    assert written == {
        0: "step_00000003_rank0", 1: None, 2: "step_00000003_rank2", 3: "step_00000003_rank3",
    }  # fmt: skip
    shutil.rmtree(tmp_path)


def test_finite_gradients_name_nothing():
    layer = nn.Linear(2, 2)
    assert first_nonfinite_gradient(layer.named_parameters()) is None  # no gradients at all
    layer(torch.ones(1, 2)).sum().backward()
    assert first_nonfinite_gradient(layer.named_parameters()) is None
    layer.weight.grad[0, 0] = -math.inf
    assert first_nonfinite_gradient(layer.named_parameters()) == "weight"
