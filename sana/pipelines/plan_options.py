"""The options of `scripts/plan.py`: from words of a command line to a config and a request. Nothing is planned here."""

from collections.abc import Mapping, Sequence
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

RENAMED = {"binning": "use_resolution_binning"}  # option -> field of a request


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
    config = plan_config(given.pop("config", None), given.pop("model_path", None), overrides)
    given["device"] = str(given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    if given.pop("train", False):
        _refuse_idle(given)
        return make_training_plan(config, TrainingRequest(**given))
    given["text_encoder"] = not given.pop("no_text_encoder", False)
    return make_plan(config, PlanRequest(**{RENAMED.get(name, name): value for name, value in given.items()}))


def plan_config(config: str | None, model_path: str | None, overrides: Sequence[str] = ()) -> SanaConfig:
    """Returns the config to plan for: the YAML's, else that which local weights carry, else the bundled model's.

    Args:
        config: YAML file; then the weights are not looked at.
        model_path: weights on this machine.
        overrides: for the YAML.

    Raises:
        ValueError: overrides without a config, or weights that are not here: a plan fetches none.
    """
    if config:
        return loading.as_config(config, overrides)
    if overrides:
        raise ValueError(f"{overrides[0]} changes a config; it needs --config.")
    path = Path(model_path or bundled(BUNDLED_MODEL)).expanduser()
    if not path.exists():
        raise ValueError(
            f"{model_path} is not on this machine, and a plan fetches no weights; give the model's --config."
        )
    return loading.source_config(loading.find_model(path))


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """Raises ValueError for options of pictures, which change nothing in a training run."""
    known = set(TrainingRequest.__dataclass_fields__)
    idle = [name for name in given if name not in known]
    if idle:
        raise ValueError(f"{idle[0]} has no effect with train; the config says how a run trains.")
