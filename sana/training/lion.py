"""Lion: the sign of an interpolated momentum is the update (Chen et al. 2023, algorithm 2).

`bitsandbytes.optim.Lion` needs an extra package and a build for the device; this is the same in a few lines.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sana.training.skipping import unchanged_if

AT_ONCE = 8  # parameters that are kept twice while a step may still be left out


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay; all parameters of a group are updated together, without waiting for the device.

    Where the attribute `found_inf` (see `skipping.py`) is 1, a step changes nothing.

    Args:
        params: parameters or groups.
        lr: learning rate, three to ten times smaller than AdamW's.
        betas: share of the momentum in the update, and decay of the momentum.
        weight_decay: decoupled weight decay, as much larger than AdamW's.
    """

    skips_on_device = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            at_once = len(parameters) if self.found_inf is None else AT_ONCE
            for start in range(0, len(parameters), at_once or 1):
                self._update(parameters[start : start + at_once], group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        gradients = [_local(parameter.grad) for parameter in parameters]
        averages = [_local(self.state[parameter]["exp_avg"]) for parameter in parameters]
        parameters = [_local(parameter) for parameter in parameters]
        beta1, beta2 = group["betas"]
        with unchanged_if(self.found_inf, [*parameters, *averages]):
            updates = torch._foreach_lerp(averages, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - beta2)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of an FSDP2 shard, sharing its memory: no value of Lion depends on another one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
