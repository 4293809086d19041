"""The caching tool: what it writes, says and returns."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from sana.config import config_to_dict
from sana.data.feature_cache import FeatureCache
from tests.models.tiny_folder import tiny_config, write_tiny_folder
from tools.cache_features import main


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments that cache two images with the recorded tiny networks."""
    model = write_tiny_folder(tmp_path / "model")
    raw = config_to_dict(tiny_config())
    raw["vae"]["vae_pretrained"] = str(model / "vae")
    raw["text_encoder"]["text_encoder_name"] = str(model / "text_encoder")
    raw["model"] |= {"image_size": 64, "multi_scale": False}
    raw["data"]["type"] = "SanaImgDataset"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "images").mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (80, 70), "red").save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"a red picture called {name}")
    data = f"--data.data_dir=[{tmp_path / 'images'}]"
    return [str(tmp_path / "config.yaml"), data, "--num_workers=0", f"--feature_dir={tmp_path / 'features'}"]


def test_features_are_written_and_counted(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*command, "--latents_dtype", "fp32", "--device=cpu"]) == 0
    assert "process 0 computed 2 samples, found 0 complete and skipped 0" in capsys.readouterr().out
    found = FeatureCache(tmp_path / "features").get("one.png", vae=True, text=True, caption="a red picture called one")
    assert found["latents"].shape[1:] == (2, 2)
    assert found["prompt_embeds"].dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert main(command) == 0
    assert "computed 0 samples, found 2 complete" in capsys.readouterr().out


def test_one_kind_alone(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--only=text"]) == 0
    assert set(FeatureCache(tmp_path / "features").identities) == {"text"}
    assert main([*command, "--only=latents"]) == 0
    assert set(FeatureCache(tmp_path / "features").identities) == {"latents", "text"}


def test_a_stale_folder_fails_in_one_sentence(command: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--model.image_size=32"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: The cached latents in ")
    assert "image_size was 64 and is now 32" in error


def test_no_data_fails(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*command, f"--data.data_dir=[{tmp_path / 'nowhere'}]"]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data.typo=1"], "typo"),
        (["--batch_size=0"], "--batch_size"),
        (["--feature_dri=x"], "unknown arguments: --feature_dri=x"),
        (["--only=images"], "--only"),
        (["--feature_dir="], "Name the folder to fill"),
    ],
)
def test_wrong_usage(command: list[str], capsys: pytest.CaptureFixture, wrong: list[str], message: str) -> None:
    try:
        code = main([*command, *wrong])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
