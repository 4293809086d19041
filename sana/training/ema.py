"""Exponential moving average of a module's parameters, updated after the optimiser's step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ExponentialMovingAverage:
    """Keeps `average = decay * average + (1 - decay) * parameter`, in fp32; under FSDP each process keeps its shards.

    Args:
        module: whose parameters are averaged.
        decay: the final decay; after n updates min(decay, (1 + n) / (10 + n)) is used, so that the average does not
            remember the random start.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        named = dict(module.named_parameters())
        torch._foreach_lerp_(
            [_local(self.average[name]) for name in named],
            [_local(parameter.detach()).float() for parameter in named.values()],
            1 - decay,
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into a module with the same parameters."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module has the averaged parameters inside, and its own again, bit for bit, afterwards."""
        own: dict[str, Tensor] = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(own[name])

    def state_dict(self) -> dict:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of an FSDP2 shard, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
