"""Which values a configuration may have, and the messages for those it may not. Names that a registry knows
(models, samplers, data sets) are checked by the registry when they are used, not here.
"""

import difflib
import math
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from sana.config import SanaConfig


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key, the value and what is allowed."""


def nearest_key(key: str, known: list[str]) -> str:
    """Returns " Did you mean 'x'?" for the key of the same name elsewhere, else for the most similar key, else ""."""
    section, _, leaf = key.rpartition(".")
    known = [candidate for candidate in known if ("." in candidate) == ("." in key)]
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    siblings = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    near = (
        difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)
        or difflib.get_close_matches(key, siblings, n=1, cutoff=0.8)
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    )
    return f" Did you mean {near[0]!r}?" if near else ""


def matches(value: Any, annotation: Any) -> bool:
    """Whether a raw value can stand for an annotated field without changing its meaning."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin is Union:
        return any(matches(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            matches(k, arguments[0]) and matches(v, arguments[1]) for k, v in value.items()
        )
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    if annotation is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if annotation in (float, str):
        return isinstance(value, (int, float) if annotation is float else (str, int, float))
    return isinstance(value, annotation)


def describe(annotation: Any) -> str:
    """Returns the words for an annotation: "true or false", "a list of whole numbers"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Union:
        return " or ".join(describe(argument) for argument in arguments)
    if origin is list:
        return f"a list, each item {describe(arguments[0])}"
    if origin is dict:
        return f"a mapping, each value {describe(arguments[1])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(annotation, "anything")


ATTENTION = ("linear", "flash", "vanilla", "triton_linear")
FEED_FORWARD = ("glumbconv", "glumbconv_dilate", "mlp", "dwmlp", "mbconvpreglu", "triton_mbconvpreglu")
PRECISION = ("fp32", "float32", "no", "fp16", "float16", "bf16", "bfloat16")
DENSITIES = ("logit_normal", "mode", "uniform", "logit_normal_trigflow", "trigflow", None)
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.mixed_precision": PRECISION,
    "model.attn_type": ATTENTION,
    "model.ffn_type": FEED_FORWARD,
    "model.pos_embed_type": ("sincos", "3d_rope", "flux_rope"),
    "model.cross_attn_type": ("flash", "vanilla"),
    "vae.weight_dtype": PRECISION,
    "scheduler.noise_schedule": ("linear_flow", "linear", "cosine"),
    "scheduler.weighting_scheme": DENSITIES,
    "scheduler.weighting_scheme_discriminator": DENSITIES,
    "train.lr_schedule": ("constant", "cosine", "cosine_decay_to_constant"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_optimizer(value: dict[str, Any]) -> bool:
    return isinstance(value.get("type"), str) and _is_number(value.get("lr")) and value["lr"] > 0


def _is_interval(value: list[float]) -> bool:
    return len(value) == 2 and value[0] <= value[1]


# (words, test): a value passes when its test is true.
Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("a number above 0", lambda value: value > 0)
NOT_NEGATIVE: Rule = ("0 or more", lambda value: value >= 0)
FRACTION: Rule = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
OPTIMIZER: Rule = ("a mapping with the text `type` and a number `lr` above 0", _is_optimizer)
AT_LEAST_ONE: Rule = ("1 or more", lambda value: value >= 1)
RULES: dict[str, Rule] = {
    "data.image_size": AT_LEAST_ONE,
    "data.clip_thr_temperature": POSITIVE,
    "model.image_size": AT_LEAST_ONE,
    "model.pe_interpolation": POSITIVE,
    "model.mlp_ratio": POSITIVE,
    "model.mlp_acts": ("a list of three activations, each a name or null", lambda value: len(value) == 3),
    "model.class_dropout_prob": FRACTION,
    "model.linear_head_dim": AT_LEAST_ONE,
    "model.pag_applied_layers": ("block numbers from 0", lambda value: all(item >= 0 for item in value)),
    "vae.vae_latent_dim": AT_LEAST_ONE,
    "vae.vae_downsample_rate": AT_LEAST_ONE,
    "text_encoder.caption_channels": AT_LEAST_ONE,
    "text_encoder.model_max_length": ("3 or more", lambda value: value >= 3),
    "scheduler.train_sampling_steps": AT_LEAST_ONE,
    "scheduler.flow_shift": POSITIVE,
    "scheduler.logit_std": POSITIVE,
    "scheduler.logit_std_discriminator": POSITIVE,
    "scheduler.sigma_data": POSITIVE,
    "scheduler.timestep_norm_scale_factor": POSITIVE,
    "train.num_workers": NOT_NEGATIVE,
    "train.seed": ("a whole number in [0, 2**63)", lambda value: 0 <= value < 2**63),
    "train.train_batch_size": AT_LEAST_ONE,
    "train.num_epochs": AT_LEAST_ONE,
    "train.gradient_accumulation_steps": AT_LEAST_ONE,
    "train.gradient_clip": POSITIVE,
    "train.eval_batch_size": AT_LEAST_ONE,
    "train.eval_sampling_steps": AT_LEAST_ONE,
    "train.log_interval": AT_LEAST_ONE,
    "train.save_model_steps": AT_LEAST_ONE,
    "train.save_model_epochs": AT_LEAST_ONE,
    "train.early_stop_hours": POSITIVE,
    "train.ema_rate": FRACTION,
    "train.real_prompt_ratio": FRACTION,
    "train.largest_timestep_prob": FRACTION,
    "train.optimizer": OPTIMIZER,
    "train.optimizer_D": OPTIMIZER,
    "train.cfg_interval": ("null or two rising numbers", lambda value: value is None or _is_interval(value)),
}


def validate(config: "SanaConfig") -> None:
    """Checks every value on its own, then those that depend on each other.

    Raises:
        ConfigError: the first value that is not allowed, with its key and what is.
    """
    for key, value in _leaves(config):
        if any(isinstance(item, float) and not math.isfinite(item) for item in _flat(value)):
            raise ConfigError(f"{key} = {value!r}: numbers must be finite.")
        if key in CHOICES and value not in CHOICES[key]:
            allowed = ", ".join("null" if choice is None else choice for choice in CHOICES[key])
            near = nearest_key(str(value), [choice for choice in CHOICES[key] if choice])
            raise ConfigError(f"{key} = {value!r} is not allowed.{near} Allowed: {allowed}.")
        if key in RULES and not RULES[key][1](value):
            raise ConfigError(f"{key} = {value!r} is not allowed. Allowed: {RULES[key][0]}.")
    side, rate = config.model.image_size, config.vae.vae_downsample_rate
    if side % rate:
        raise ConfigError(
            f"model.image_size = {side} is not allowed. Allowed: multiples of vae.vae_downsample_rate = {rate}."
        )


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if hasattr(value, "__dataclass_fields__"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
    else:
        yield value
