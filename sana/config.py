"""How YAML files, overrides and dictionaries become a checked `SanaConfig`, and which official keys change nothing.

The keys themselves stand in config_sections.py, allowed values in config_checks.py. Nothing is built here.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import pyrallis

from sana.config_checks import ConfigError, describe, matches, nearest_key, validate
from sana.config_sections import (
    AEConfig,
    ControlNetConfig,
    DataConfig,
    ModelConfig,
    ModelGrowthConfig,
    SanaConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TrainingConfig,
)
from sana.config_yaml import parse_yaml, read_yaml, split_overrides
from sana.utils.logging import get_logger

__all__ = [
    "NO_EFFECT",
    "AEConfig",
    "ConfigError",
    "ControlNetConfig",
    "DataConfig",
    "ModelConfig",
    "ModelGrowthConfig",
    "SanaConfig",
    "SchedulerConfig",
    "TextEncoderConfig",
    "TrainingConfig",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "validate",
]

logger = get_logger(__name__)
OPTIONAL_TEXT = Optional[str]


def _always(config: SanaConfig) -> bool:
    return True


# Official keys that change nothing, here as in the official code; they are accepted, with one log line. The last two
# stand in sana_base.yaml but are no fields.
NO_EFFECT: dict[str, tuple[str, Callable[[SanaConfig], bool]]] = {
    "data.caption_proportion": ("captions are drawn by CLIP score", _always),
    "data.del_img_clip_thr": ("no image is left out for its CLIP score", _always),
    "data.hq_only": ("nothing reads it", _always),
    "data.valid_num": ("nothing reads it", _always),
    "model.micro_condition": ("the transformer has no size condition", _always),
    "model.teacher": ("model.teacher_model names the teacher", _always),
    "vae.scale_factor": ("the autoencoder's own config has the factor", _always),
    "vae.sample_posterior": ("DC-AE is deterministic", lambda config: "dc" in config.vae.vae_type.lower()),
    "train.use_flash_attn": ("attention uses torch's scaled_dot_product_attention", _always),
    "train.lora_rank": ("there is no LoRA in this training", _always),
    "train.mask_type": ("no tokens are masked", _always),
    "train.mask_loss_coef": ("no tokens are masked", _always),
    "train.load_mask_index": ("no tokens are masked", _always),
    "train.loss_type": ("flow matching has a squared error", _always),
    "train.huber_c": ("flow matching has a squared error", _always),
    "train.num_ddim_timesteps": ("there is no DDIM distillation", _always),
    "train.w_max": ("there is no DDIM distillation", _always),
    "train.w_min": ("there is no DDIM distillation", _always),
}


_FULL = SanaConfig(controlnet=ControlNetConfig(), model_growth=ModelGrowthConfig())
DICT_DEFAULTS: dict[str, dict[str, Any]] = {  # entries of these, and of `extra`, can be set alone
    f"{section}.{key}": value
    for section, part in vars(_FULL).items()
    if dataclasses.is_dataclass(part)
    for key, value in vars(part).items()
    if isinstance(value, dict)
}


@functools.cache
def schema() -> dict[str, Any]:
    """Returns every dotted key, sections included, with its annotation (a dataclass for a section)."""
    keys: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(SanaConfig).items():
        part = getattr(_FULL, name)
        keys[name] = type(part) if dataclasses.is_dataclass(part) else annotation
        if dataclasses.is_dataclass(part):
            keys |= {f"{name}.{key}": inner for key, inner in typing.get_type_hints(type(part)).items()}
    return keys


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SanaConfig:
    """Reads a YAML file, applies overrides in their order, and checks the result.

    Args:
        path: a local YAML file.
        overrides: "--section.key=value" or "--section.key", "value" as on a command line; a value is YAML. One key of
            a dictionary can be set alone ("--train.optimizer.lr=1e-4").

    Raises:
        ConfigError: the file is missing or no YAML mapping; a key is unknown (the nearest one is named); a value has
            the wrong type or is not allowed.
    """
    raw = read_yaml(path)
    for key, text in split_overrides(overrides):
        _apply_override(raw, key, text)
    config = _build(raw, str(path))
    given = {f"{name}.{key}" for name, part in raw.items() if isinstance(part, Mapping) for key in part}
    idle = [f"{key} ({why})" for key, (why, holds) in NO_EFFECT.items() if key in given and holds(config)]
    if idle:
        logger.info("%s: keys without effect: %s", path, "; ".join(idle))
    return config


def config_from_dict(raw: Mapping[str, Any]) -> SanaConfig:
    """Builds and checks a config from nested dictionaries, as `config_to_dict` returns them.

    Raises:
        ConfigError: as `load_config`.
    """
    return _build(raw, "config")


def config_to_dict(config: SanaConfig) -> dict[str, Any]:
    """Returns the config as nested dictionaries of plain values that JSON can hold."""
    return dataclasses.asdict(config)


def _build(raw: Mapping[str, Any], source: str) -> SanaConfig:
    config = pyrallis.decode(SanaConfig, _checked(raw, "", source))
    validate(config)
    return config


def _checked(raw: Any, section: str, source: str) -> dict[str, Any]:
    """Returns a copy of a mapping whose keys are all known and whose values have the annotated types."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: {section or 'the file'} must be a mapping of keys to values, not {raw!r}.")
    checked: dict[str, Any] = {}
    for name, value in raw.items():
        key = f"{section}.{name}" if section else str(name)
        if key not in schema():
            if key not in NO_EFFECT:
                raise _unknown(key, source)
        elif dataclasses.is_dataclass(schema()[key]):
            optional = key in ("controlnet", "model_growth")
            checked[name] = None if value is None and optional else _checked(value, key, source)
        elif not matches(value, schema()[key]):
            raise ConfigError(f"{source}: {key} = {value!r} has the wrong type; allowed is {describe(schema()[key])}.")
        else:
            checked[name] = value
    return checked


def _unknown(key: str, source: str) -> ConfigError:
    entries = [f"{owner}.{entry}" for owner, default in DICT_DEFAULTS.items() for entry in default]
    return ConfigError(f"{source}: unknown key {key!r}.{nearest_key(key, [*schema(), *entries])}")


def _apply_override(raw: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key of a raw config; below a dictionary-valued key, one entry of its dictionary."""
    source = f"--{key}"
    if key in schema() or key in NO_EFFECT:
        owner, entry = key, ""
    else:
        owner, _, entry = key.rpartition(".")
        if owner not in schema() or dataclasses.is_dataclass(schema()[owner]):
            raise _unknown(key, source)
        if owner not in DICT_DEFAULTS and schema()[owner] is not Any:
            raise ConfigError(f"{source}: {owner} has no entries that can be set alone; give the whole value.")
    annotation = Any if entry else schema().get(owner, Any)
    if annotation is str or (annotation == OPTIONAL_TEXT and text not in ("null", "~", "None", "")):
        value: Any = text
    else:
        value = None if annotation == OPTIONAL_TEXT else parse_yaml(text, source)
    if not dataclasses.is_dataclass(annotation) and not matches(value, annotation):
        raise ConfigError(f"{source}: {text!r} has the wrong type; allowed is {describe(annotation)}.")
    section, _, name = owner.rpartition(".")
    if section:
        raw[section] = raw.get(section) or {}  # an optional section may be null
        raw = raw[section]
    if entry:
        start = raw.get(name, DICT_DEFAULTS.get(owner))
        value = {**(start if isinstance(start, dict) else {}), entry: value}
    raw[name] = value
