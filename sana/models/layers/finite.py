"""Finding the layer that first gives a value that is not finite. What to do about it is the caller's decision."""

from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite_layer(model: nn.Module, *args: Any, **kwargs: Any) -> str | None:
    """Runs a model once and names the first module whose output holds NaN or infinity.

    Modules are watched in the order in which they finish, so the answer is the innermost layer at fault.

    Args:
        model: any module.
        *args: positional arguments of its forward.
        **kwargs: keyword arguments of its forward.

    Returns:
        The module's name; "inputs" if an input is not finite already; the parameter's name if a weight of that module
        is the cause, as "blocks.3.attn.qkv.weight"; None if everything is finite.
    """
    found = [] if _finite((args, kwargs)) else ["inputs"]  # it is run all the same: a sharded model runs on all or none
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append(_blame(module, names[module]))

    handles = [module.register_forward_hook(watch) for module in names]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _blame(module: nn.Module, name: str) -> str:
    local = {key: getattr(weight, "to_local", lambda w=weight: w)() for key, weight in module.named_parameters()}
    bad = [key for key, weight in local.items() if not torch.isfinite(weight).all()]
    return f"{name}.{bad[0]}" if bad else name


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(item) for item in value)
    return True
