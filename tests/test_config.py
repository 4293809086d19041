"""Keys and defaults against the official schema; YAML, overrides and dictionaries; messages of everything refused."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.config import (
    DICT_DEFAULTS,
    NO_EFFECT,
    ConfigError,
    ControlNetConfig,
    ModelGrowthConfig,
    SanaConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    schema,
)
from sana.pipelines.options import InferenceOptions

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/parity/data"
SCHEMA = json.loads((DATA / "manifests/config_schema.json").read_text())["SanaConfig"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  image_size: 1024\ntrain:\n  optimizer: {type: Lion, lr: 1e-4}\n", encoding="utf-8")
    return file


def test_keys_are_official() -> None:
    assert list(schema()) == [entry["name"] for entry in SCHEMA]


def test_defaults_are_official() -> None:
    ours = config_to_dict(SanaConfig(controlnet=ControlNetConfig(), model_growth=ModelGrowthConfig()))
    for entry in SCHEMA:
        section, _, name = entry["name"].rpartition(".")
        if entry["default"] != "<required section>" and entry["name"] not in ("controlnet", "model_growth"):
            assert (ours[section] if section else ours)[name] == entry["default"], entry["name"]
    assert SanaConfig().controlnet is None
    assert SanaConfig().model_growth is None


def test_annotations_are_official() -> None:
    for entry in SCHEMA:
        annotation = schema()[entry["name"]]
        ours = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        optional = entry["name"] in ("controlnet", "model_growth")
        assert (f"Optional[{ours}]" if optional else ours) == entry["type"], entry["name"]


def test_inference_options_are_official() -> None:
    key = "scripts.inference.SanaInference (added fields)"
    official = json.loads((DATA / "manifests/config_schema.json").read_text())[key]
    ours = dataclasses.asdict(InferenceOptions())
    elsewhere = {"version", "gpu_id"}  # of the command alone: no effect, and chosen with the device
    bundled = {
        "config",
        "model_path",
        "txt_file",
        "sampling_algo",
    }  # None stands for the bundled model, list and sampler
    help_text = subprocess.run(
        [sys.executable, ROOT / "scripts/inference.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for entry in official:
        assert f"--{entry['name']} " in help_text
        if entry["name"] not in elsewhere | bundled:
            default = ours[entry["name"]]
            assert (list(default) if isinstance(default, tuple) else default) == entry["default"], entry["name"]


def test_defaults_are_not_shared() -> None:
    SanaConfig().train.optimizer["lr"] = 1.0
    SanaConfig().model.mlp_acts.append("x")
    assert SanaConfig().train.optimizer["lr"] == 1e-4
    assert SanaConfig().model.mlp_acts == ["silu", "silu", None]


def test_overrides_come_after_yaml_in_their_order(path: Path) -> None:
    overrides = [
        "--model.image_size=512",
        "--train.seed=1",
        "--train.seed",
        "7",
        "--data.data_dir=[asset/example_data]",
    ]
    config = load_config(path, [*overrides, "--debug", "--model.multi_scale=false"])
    assert (config.model.image_size, config.train.seed, config.debug) == (512, 7, True)
    assert config.data.data_dir == ["asset/example_data"]
    assert config.model.multi_scale is False


def test_numbers_in_dictionaries_are_numbers(path: Path) -> None:
    assert load_config(path).train.optimizer == {"type": "Lion", "lr": 1e-4}
    assert load_config(path, ["--train.optimizer={type: AdamW, lr: 2e-5}"]).train.optimizer["lr"] == 2e-5


def test_one_entry_of_a_dictionary(path: Path) -> None:
    assert load_config(path, ["--train.optimizer.lr=3e-4"]).train.optimizer == {"type": "Lion", "lr": 3e-4}
    after = load_config(path, ["--train.optimizer_D.lr=3e-4"]).train.optimizer_D
    assert after == {**DICT_DEFAULTS["train.optimizer_D"], "lr": 3e-4}
    assert load_config(path).train.optimizer_D["lr"] == 1e-4
    assert load_config(path, ["--train.extra.steps=5", "--train.extra.rate=1e-3"]).train.extra == {
        "steps": 5,
        "rate": 1e-3,
    }


def test_text_keys_take_their_text_as_it_is(path: Path) -> None:
    config = load_config(path, ["--name=007", "--model.load_from=hf://a/b/c.pth", "--model.mixed_precision=no"])
    assert (config.name, config.model.load_from, config.model.mixed_precision) == ("007", "hf://a/b/c.pth", "no")
    assert load_config(path, ["--model.load_from=a", "--model.load_from=null"]).model.load_from is None


def test_optional_sections(path: Path) -> None:
    assert load_config(path).controlnet is None
    given_one = load_config(path, ["--controlnet.control_signal_type=canny"])
    assert given_one.controlnet is not None
    assert given_one.controlnet.control_signal_type == "canny"
    assert load_config(path, ["--controlnet=null"]).controlnet is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.modle=x", r"--model.modle: unknown key 'model.modle'. Did you mean 'model.model'\?"),
        ("--modle.model=x", r"Did you mean 'model.model'\?"),
        ("--model.flow_shift=3", r"Did you mean 'scheduler.flow_shift'\?"),
        ("--train.lr=1e-4", r"Did you mean 'train.optimizer.lr'\?"),
        ("--zzzzzz=1", r"unknown key 'zzzzzz'\.$"),
        ("--train.seed=abc", r"--train.seed: 'abc' has the wrong type; allowed is a whole number"),
        ("--train.seed=1.5", "wrong type"),
        ("--model.multi_scale=yes", "allowed is true or false"),
        ("--data.data_dir=[a", r"--data.data_dir: not valid YAML \(line 1, column 3\)"),
        ("--data.data_dir=a", "allowed is a list"),
        ("--model.model.x=1", "model.model has no entries"),
        ("model.model=x", "not of the form --section.key=value"),
        ("--model=x", "model must be a mapping"),
        ("--scheduler.flow_shift=.nan", "scheduler.flow_shift = nan: numbers must be finite"),
        (
            "--model.attn_type=liner",
            r"model.attn_type = 'liner' is not allowed. Did you mean 'linear'\? Allowed: linear",
        ),
        ("--train.optimizer={lr: 1e-4}", "train.optimizer = .* Allowed: a mapping with the text `type`"),
    ],
)
def test_refused_overrides(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  modle: x\n", "c.yaml: unknown key 'model.modle'. Did you mean 'model.model'"),
        ("trian:\n  seed: 1\n", "c.yaml: unknown key 'trian'. Did you mean 'train'"),
        ("model:\n  model: [a\n", r"c.yaml: not valid YAML \(line 3, column 1\)"),
        ("model:\n  model: a\n  model: b\n", "the key 'model' is given twice"),
        ("", "holds a mapping of sections"),
        ("- 1\n", "holds a mapping of sections"),
        ("model: 3\n", "model must be a mapping"),
        ("model:\n", "model must be a mapping"),
        ("model:\n  model: null\n", "model.model = None has the wrong type; allowed is text"),
        (
            "model:\n  multi_scale: 'false'\n",
            "model.multi_scale = 'false' has the wrong type; allowed is true or false",
        ),
        ("train:\n  w_maxx: 1\n", "unknown key 'train.w_maxx'"),
    ],
)
def test_refused_files(path: Path, text: str, message: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_and_binary_files(path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(path.with_name("none.yaml"))
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)


def test_keys_without_effect_are_accepted_with_a_log_line(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("sana").propagate = True
    text = "data:\n  caption_proportion: {prompt: 1}\ntrain:\n  w_max: 15.0\nvae:\n  sample_posterior: true\n"
    path.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="sana"):
        load_config(path)
    for key in ("data.caption_proportion", "train.w_max", "vae.sample_posterior"):
        assert f"{key} (" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sana"):
        load_config(path, ["--vae.vae_type=AutoencoderKL"])
    assert "vae.sample_posterior" not in caplog.text


def test_only_two_keys_without_effect_are_no_fields() -> None:
    assert set(NO_EFFECT) - set(schema()) == {"train.w_max", "train.w_min"}


def test_dictionaries_and_back() -> None:
    config = config_from_dict(json.loads((DATA / "e2e/config.json").read_text())["official_yaml_as_json"])
    stored = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(stored) == config
    assert config.text_encoder.chi_prompt


@settings(max_examples=40, deadline=None)
@given(
    st.floats(min_value=1e-3, max_value=1e3),
    st.integers(0, 2**62),
    st.text(max_size=20),
    st.none() | st.text(max_size=9),
)
def test_any_allowed_value_survives_the_round_trip(shift: float, seed: int, name: str, load: str | None) -> None:
    raw = {"scheduler": {"flow_shift": shift}, "train": {"seed": seed}, "name": name, "load_from": load}
    config = config_from_dict(raw)
    assert (config.scheduler.flow_shift, config.train.seed, config.name, config.load_from) == (shift, seed, name, load)
    assert config_from_dict(config_to_dict(config)) == config


def test_import_is_light() -> None:
    code = "import sys, sana, sana.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
