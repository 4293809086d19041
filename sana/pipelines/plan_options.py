"""The options of `scripts/plan.py`: from words of a command line to a config and a request. Nothing is planned here."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sana.config import SanaConfig
from sana.pipelines import loading
from sana.pipelines.options import BUNDLED_MODEL, bundled
from sana.pipelines.plan import make_plan
from sana.pipelines.plan_report import Sheet
from sana.pipelines.plan_request import PlanRequest
from sana.pipelines.plan_training import TrainingRequest, make_training_plan

ONLY_PICTURES = {"no_text_encoder", "binning"}  # options whose fields have other names


def plan_command(options: Mapping[str, Any], overrides: Sequence[str] = ()) -> Sheet:
    """Returns the plan that a command line asks for.

    Args:
        options: those that were given, by name.
        overrides: `--section.key=value` arguments for the config.

    Raises:
        ValueError: an option is wrong or cannot take effect.
        ConfigError, CheckpointError: the config, or what the weights say about themselves, is missing or broken.
        MemoryLimitError: nothing fits.
    """
    given = dict(options)
    config, scheme = plan_config(given.pop("config", None), given.pop("model_path", None), overrides)
    given["device"] = str(given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    train = given.pop("train", False)
    known = {one.name for one in fields(TrainingRequest if train else PlanRequest)} | (
        set() if train else ONLY_PICTURES
    )
    if idle := [name for name in given if name not in known]:
        raise ValueError(f"{idle[0]} has no effect {'with' if train else 'without'} train.")
    if train:
        return make_training_plan(config, TrainingRequest(**given))
    if scheme is not None:
        if given.get("quantization", scheme) != scheme:
            raise ValueError(f"quantization is {given['quantization']!r}, and these weights are stored as {scheme}.")
        given["quantization"] = scheme
    given["text_encoder"] = not given.pop("no_text_encoder", False)
    given["use_resolution_binning"] = given.pop("binning", True)
    return make_plan(config, PlanRequest(**given))


def plan_config(
    config: str | None, model_path: str | None, overrides: Sequence[str] = ()
) -> tuple[SanaConfig, str | None]:
    """Returns the config to plan for: the YAML's, else that which local weights carry, else the bundled model's.

    Args:
        config: YAML file; then the weights are not looked at.
        model_path: weights on this machine.
        overrides: for the YAML.

    Returns:
        The config, and the scheme that the weights are quantised by, None for exact ones.

    Raises:
        ValueError: overrides without a config, or weights that are not here: a plan fetches none.
    """
    if config:
        return loading.as_config(config, overrides), None
    if overrides:
        raise ValueError(f"{overrides[0]} changes a config; it needs --config.")
    path = Path(model_path or bundled(BUNDLED_MODEL)).expanduser()
    if not path.exists():
        raise ValueError(
            f"{model_path} is not on this machine, and a plan fetches no weights; give the model's config."
        )
    source = loading.find_model(path)
    quantization = source.metadata.quantization if source.metadata is not None else {}
    return loading.source_config(source), quantization.get("scheme")
