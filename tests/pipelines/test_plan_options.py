"""From the options of scripts/plan.py to what is planned."""

from pathlib import Path
from typing import Any

import pytest

from sana.config import ConfigError
from sana.models.weights import CheckpointError
from sana.pipelines import plan_options
from sana.pipelines.plan_options import plan_command, plan_config
from sana.pipelines.plan_request import PlanRequest

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/sana_config/1024ms/Sana_1600M_img1024.yaml")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the planner, which does nothing."""
    asked: list[Any] = []
    for name in ("make_plan", "make_training_plan"):
        monkeypatch.setattr(plan_options, name, lambda config, request: asked.append(request))
    return asked


def test_options_become_a_request(requests: list[Any]):
    options = {"config": CONFIG, "height": 512, "device": "cuda:1", "no_text_encoder": True, "binning": False}
    plan_command(options)
    expected = PlanRequest(height=512, device="cuda", text_encoder=False, use_resolution_binning=False)
    assert requests == [expected]


def test_the_device_is_the_one_that_is_here(requests: list[Any], monkeypatch: pytest.MonkeyPatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        plan_command({"config": CONFIG})
        assert requests[-1].device == device


def test_training_has_its_own_options(requests: list[Any]):
    plan_command({"config": CONFIG, "train": True, "batch": 4, "device": "cuda", "max_vram": "32GB"})
    assert (requests[0].batch, requests[0].limit) == (4, 32 * 10**9)
    with pytest.raises(ValueError, match="height has no effect with train"):
        plan_command({"config": CONFIG, "train": True, "height": 512})
    with pytest.raises(ValueError, match="no_text_encoder has no effect with train"):
        plan_command({"config": CONFIG, "train": True, "no_text_encoder": True})
    with pytest.raises(ValueError, match="checkpointing has no effect without train"):
        plan_command({"config": CONFIG, "checkpointing": "ffn"})


def test_where_the_config_comes_from(model_folder: Path, tmp_path: Path):
    assert plan_config(None, None)[0].model.model == "SanaMS_Tiny_P1", "the bundled model"
    assert plan_config(None, str(model_folder))[0].model.image_size == 64
    assert plan_config(CONFIG, None, ["--model.image_size=512"])[0].model.image_size == 512
    assert plan_config(CONFIG, "Efficient-Large-Model/never-fetched")[0].model.model == "SanaMS_1600M_P1_D20"
    with pytest.raises(ValueError, match="needs --config"):
        plan_config(None, str(model_folder), ["--model.image_size=512"])
    with pytest.raises(ValueError, match="a plan fetches no weights"):
        plan_config(None, "Efficient-Large-Model/Sana_1600M_1024px")
    with pytest.raises(CheckpointError):
        plan_config(None, str(tmp_path))
    with pytest.raises(ConfigError, match="image_sizes"):
        plan_config(CONFIG, None, ["--model.image_sizes=512"])


def test_weights_that_are_stored_quantised_stay_so(requests: list[Any], monkeypatch: pytest.MonkeyPatch):
    config = plan_config(CONFIG, None)[0]
    monkeypatch.setattr(plan_options, "plan_config", lambda *_: (config, "int8"))
    plan_command({"device": "cuda"})
    assert requests[0].quantization == "int8"
    with pytest.raises(ValueError, match="stored as int8"):
        plan_command({"device": "cuda", "quantization": "nf4"})
