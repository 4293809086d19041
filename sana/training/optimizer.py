"""Optimisers by their configured name: the table, the checks of `train.optimizer`, parameter groups, lr scaling.

An algorithm stands in its own file or comes from a kept library; no step is taken here.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sana.config import ConfigError
from sana.registry import Registry, suggest

OPTIMIZERS = Registry(
    "optimizer",
    {
        "AdamW": "torch.optim:AdamW",
        "AdamW8bit": "bitsandbytes.optim:AdamW8bit",
        "AdamW8bitWrapper": "bitsandbytes.optim:AdamW8bit",  # the official name
        "Adafactor": "torch.optim:Adafactor",
        "CAME": "came_pytorch:CAME",
        "CAMEWrapper": "sana.training.came:CAMEWrapper",
        "CAME8BitWrapper": "sana.training.came_8bit:CAME8BitWrapper",
        "Lion": "sana.training.lion:Lion",
        "Muon": "sana.training.muon:MuonWithAdamW",
        "Prodigy": "prodigyopt:Prodigy",
    },
)
INSTALL = {
    "bitsandbytes": "pip install 'sana-python[bitsandbytes]'",
    "came_pytorch": "pip install came-pytorch",
    "prodigyopt": "pip install prodigyopt",
}
NOT_OPTIONS = ("self", "params", "args", "kwargs", "optim_bits", "defaults", "fsdp_in_use")  # not for configurations
_8BIT = "its 8-bit blocks belong to whole parameters"
FSDP_REFUSALS = {
    "AdamW8bit": _8BIT,
    "AdamW8bitWrapper": _8BIT,
    "CAME8BitWrapper": _8BIT,
    "CAME": "came_pytorch keeps its row and column statistics as plain tensors; use CAMEWrapper",
    "Adafactor": "torch's one flattens parameters, which fails for shards of unequal size",
    "Prodigy": "it flattens parameters, which fails for shards of unequal size",
}


def fsdp_refusal(name: str) -> str | None:
    """Returns why an optimiser cannot train FSDP2 shards, as a sentence for the user; None when it can."""
    reason = FSDP_REFUSALS.get(name)
    if reason is None:
        return None
    usable = ", ".join(known for known in OPTIMIZERS if known not in FSDP_REFUSALS)
    return f"train.optimizer.type {name} does not work with train.use_fsdp: {reason}. These do: {usable}."


def auto_scale_lr(
    effective_batch_size: int, options: Mapping[str, Any], rule: str = "linear", base_batch_size: int = 256
) -> tuple[float, dict[str, Any]]:
    """Scales the learning rate with the batch size (`train.auto_lr`).

    Args:
        effective_batch_size: images of one optimiser step, over all processes and micro-batches.
        options: `train.optimizer`; not changed.
        rule: "linear", or "sqrt" for the root of the ratio of batch sizes.
        base_batch_size: the batch size that the configured learning rate is for.

    Returns:
        The factor, and a copy of the options with the new `lr`.
    """
    if rule not in ("linear", "sqrt"):
        raise ConfigError(
            f"train.auto_lr.rule is {rule!r}.{suggest(str(rule), ['linear', 'sqrt'])} Known: linear, sqrt."
        )
    base_batch_size = _number(base_batch_size, "train.auto_lr.base_batch_size")
    if effective_batch_size < 1 or base_batch_size <= 0:
        raise ConfigError(
            f"Cannot scale lr from batch size {base_batch_size} to {effective_batch_size}; both must be > 0."
        )
    ratio = effective_batch_size / base_batch_size
    ratio = math.sqrt(ratio) if rule == "sqrt" else ratio
    scaled = dict(options)
    scaled["lr"] = _learning_rate(options.get("lr"), "train.optimizer") * ratio
    if scaled.get("adamw_lr") is not None:  # Muon's second one
        scaled["adamw_lr"] = _number(scaled["adamw_lr"], "train.optimizer.adamw_lr") * ratio
    return ratio, scaled


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    name_scales: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Returns the official groups: one for every trainable parameter, in order, all with the same weight decay.

    Norms, biases and tables decay as well: the official code has exceptions only for modules that ask for them, and
    none does.

    Args:
        named_parameters: pairs (name, parameter).
        lr: base learning rate.
        weight_decay: base weight decay.
        name_scales: `train.lr_scale`, factor -> parts of names. A parameter whose name contains one of the parts learns
            at lr * factor; where several match, the last one counts. Factor 0 is allowed.

    Returns:
        Dicts with params (one pair of name and parameter), lr and weight_decay.

    Raises:
        ConfigError: a factor is not a number, or a part matches no parameter.
    """
    rules = [
        (_number(factor, "a factor of train.lr_scale"), [parts] if isinstance(parts, str) else list(parts))
        for factor, parts in (name_scales or {}).items()
    ]
    groups, unused = [], {part for _, parts in rules for part in parts}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        factor = 1.0
        for scale, parts in rules:
            matching = [part for part in parts if part in name]
            unused.difference_update(matching)
            factor = scale if matching else factor
        groups.append({"params": [(name, parameter)], "lr": lr * factor, "weight_decay": weight_decay})
    if unused:
        raise ConfigError(f"train.lr_scale names {sorted(unused)[0]!r}, which is in no trainable parameter's name.")
    return groups


def merge_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Joins groups whose options are equal, so that an optimiser updates their parameters together (foreach, fused)."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        whole = merged.setdefault(tuple(options.items()), {**options, "params": []})
        whole["params"].extend(group["params"])
    return list(merged.values())


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    options: Mapping[str, Any],
    *,
    lr_scale: float = 1.0,
    name_scales: Mapping[str, Sequence[str]] | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimiser of `train.optimizer`.

    Args:
        named_parameters: pairs (name, parameter), such as `module.named_parameters()`; frozen ones are left out.
        options: `type`, `lr` and arguments of that optimiser; numbers may be texts such as "1e-4", tuples may be lists.
        lr_scale: factor on `lr`.
        name_scales: `train.lr_scale`, see `parameter_groups`.

    Raises:
        ConfigError: unknown type or argument, a value of the wrong kind or range, a package that is missing.
    """
    options = dict(options)
    if not isinstance(options.get("type"), str):
        raise ConfigError(f"train.optimizer.type is missing. Known: {', '.join(OPTIMIZERS)}.")
    name = options.pop("type")
    kind = _load(name)
    arguments = _check_arguments(name, kind, options)
    lr = arguments["lr"] = arguments["lr"] * lr_scale
    if arguments.get("adamw_lr") is not None:
        arguments["adamw_lr"] *= lr_scale
    decay = arguments.get("weight_decay", inspect.signature(kind).parameters["weight_decay"].default)
    groups = merge_groups(parameter_groups(named_parameters, lr, decay, name_scales))
    if not groups:
        raise ConfigError("There is nothing to train: no parameter requires a gradient.")
    if name == "Prodigy" and len(groups) > 1:
        raise ConfigError("train.lr_scale does not work with Prodigy, which finds one learning rate for everything.")
    if name == "AdamW" and not {"fused", "foreach", "capturable", "differentiable"} & arguments.keys():
        arguments["fused"] = True  # one kernel for all parameters, on a CPU as well
    if name != "Muon":
        for group in groups:
            group["params"] = [parameter for _, parameter in group["params"]]
    return kind(groups, **arguments)


def _load(name: str) -> type[torch.optim.Optimizer]:
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"train.optimizer.type is {name!r}.{suggest(name, list(OPTIMIZERS))} Known: {', '.join(OPTIMIZERS)}."
        )
    try:
        return OPTIMIZERS[name]
    except ImportError as error:
        package = OPTIMIZERS.target(name).split(":")[0].split(".")[0]
        raise ConfigError(
            f"train.optimizer.type {name} needs the package {package} ({error}): {INSTALL.get(package, package)}"
        ) from error


def _check_arguments(name: str, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the optimiser's arguments with numbers read and lists as tuples; each in the shape of its default."""
    known = {key: item.default for key, item in inspect.signature(kind).parameters.items() if key not in NOT_OPTIONS}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"train.optimizer: {name} has no argument {key!r}.{suggest(str(key), list(known))} "
                f"Known: {', '.join(known)}."
            )
        if key == "lr" and value is None:
            continue
        where = f"train.optimizer.{key}"
        checked[key] = _in_shape_of(known[key], value, f"{where} of {name}")
        if key.endswith("betas") and not all(0 <= beta < 1 for beta in checked[key]):
            raise ConfigError(f"{where} is {value}; every one must be at least 0 and below 1.")
        if key.endswith("weight_decay") and not 0 <= checked[key] < math.inf:
            raise ConfigError(f"{where} is {value}; it must be a number that is not negative.")
    checked["lr"] = _learning_rate(checked.get("lr"), f"train.optimizer of {name}")
    return checked


def _in_shape_of(default: Any, value: Any, where: str) -> Any:
    if isinstance(default, tuple) and default and isinstance(default[0], str):
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{where} is {value!r}; it must be a list of texts.")
        return tuple(value)
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise ConfigError(f"{where} is {value!r}; it must be a list of {len(default)} numbers.")
        return tuple(
            None if item is None and first is None else _number(item, where) for item, first in zip(value, default)
        )
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; it must be true or false.")
        return value
    if default is None and (value is None or isinstance(value, bool)):
        return value
    number = _number(value, where)
    return int(number) if isinstance(default, int) and number == int(number) else number


def _learning_rate(value: Any, where: str) -> float:
    if value is None:
        raise ConfigError(f"{where}.lr is missing.")
    lr = _number(value, f"{where}.lr")
    if not 0 < lr < math.inf:
        raise ConfigError(f"{where}.lr is {value}; it must be a positive number.")
    return lr


def _number(value: Any, where: str) -> float:
    """A number, also one that YAML left as text ("1e-4" without a point)."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{where} is {value!r}; it must be a number.") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} is {value!r}; it must be a number.")
    return value
