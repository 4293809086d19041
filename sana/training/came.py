"""CAME as Sana trains with it: confidence-guided updates whose second moments are a row and a column. No 8 bits here.

Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient Optimization", algorithm 2. Sana's variant treats
linear layers and 1x1 convolutions as matrices; every other tensor keeps a full second moment and has no confidence
term. `came_pytorch.CAME` (type "CAME") agrees for tensors of one or two dimensions and differs for the rest. Operations
stand in the order in which they round as the official ones do: on a CPU both give the same bits.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from sana.training.skipping import unchanged_if


def is_matrix(shape: torch.Size) -> bool:
    """Whether a parameter is a linear layer or a 1x1 convolution, whose second moments are factored."""
    return len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1))


class CAMEWrapper(torch.optim.Optimizer):
    """CAME with the official Sana rules; parameters may be FSDP2 shards (of rows). No step waits for the device.

    The state of each parameter: step (int), exp_avg (the parameter's shape); for a matrix (R, C) exp_avg_sq_row and
    exp_avg_res_row (R,), exp_avg_sq_col and exp_avg_res_col (C,); otherwise exp_avg_sq. Float32 for 16-bit parameters.
    Where the attribute `found_inf` (see `skipping.py`) is 1, a step changes none of them; `step` is counted.

    Args:
        params: parameters or groups.
        lr: learning rate.
        eps: added to the squared gradient and to the squared deviation of the update from its average.
        clip_threshold: greatest root mean square of an update.
        betas: decay of the averages of the update, of its square and of the deviation.
        weight_decay: decoupled weight decay.
    """

    skips_on_device = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        **defaults: Any,
    ) -> None:
        options = {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, options | defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state keeps its own dtype where torch would cast it to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][key].dtype:
                    self.state[parameter][key] = value.to(parameter.device)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter."""
        gradient = parameter.grad
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.float()
        matrix = is_matrix(gradient.shape)
        if matrix:
            gradient = gradient.flatten(1)  # (R, C)
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            self._create(state, gradient, parameter, group)
        state["step"] += 1
        with unchanged_if(self.found_inf, [parameter, *(one for one in state.values() if isinstance(one, Tensor))]):
            self._move(parameter, gradient, state, group, matrix)

    def _move(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], matrix: bool
    ) -> None:
        """Changes the parameter and its state by a gradient, which is (R, C) for a matrix."""
        squared = gradient.square().add_(group["eps"][0])
        if matrix:
            update = _normalise(gradient, squared, state, "exp_avg_sq", group["betas"][1])
        else:
            _average_into(state["exp_avg_sq"], squared, group["betas"][1])
            update = state["exp_avg_sq"].rsqrt().mul_(gradient)
        size = update.norm() / update.numel() ** 0.5
        update.div_((size / group["clip_threshold"]).clamp_(min=1.0))

        average = self._average(state, update, group)
        if matrix:
            deviation = (update - average).square_().add_(group["eps"][1])
            average = _normalise(average, deviation, state, "exp_avg_res", group["betas"][2])
        if group["weight_decay"]:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
        parameter.sub_((average * group["lr"]).reshape(parameter.shape))

    def _create(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor, group: dict[str, Any]) -> None:
        """Fills the state of a new parameter; `gradient` is a matrix where the parameter counts as one."""
        state["exp_avg"] = torch.zeros_like(parameter, dtype=gradient.dtype)
        if not is_matrix(parameter.shape):
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            return
        for name in ("exp_avg_sq", "exp_avg_res"):
            state[f"{name}_row"] = torch.zeros_like(gradient[:, 0])
            state[f"{name}_col"] = torch.zeros_like(_column_mean(gradient))

    def _average(self, state: dict[str, Any], update: Tensor, group: dict[str, Any]) -> Tensor:
        """Moves the average towards the update and returns it in the update's shape, to be read only."""
        return _average_into(state["exp_avg"].view(update.shape), update, group["betas"][0])


def _column_mean(matrix: Tensor) -> Tensor:
    """The mean over rows, (C,); whole on every process where the rows are sharded."""
    mean = matrix.mean(dim=0)
    if isinstance(mean, DTensor):
        return mean.redistribute(placements=[Replicate()] * mean.device_mesh.ndim)
    return mean


def _average_into(average: Tensor, values: Tensor, beta: float) -> Tensor:
    """average = beta * average + (1 - beta) * values, in place."""
    return average.mul_(beta).add_(values, alpha=1 - beta)


def _normalise(values: Tensor, squares: Tensor, state: dict[str, Any], name: str, beta: float) -> Tensor:
    """Averages the squares by row and column and returns values / sqrt(row * col / mean(row)), a new (R, C) tensor."""
    row = _average_into(state[f"{name}_row"], squares.mean(dim=1), beta)
    col = _average_into(state[f"{name}_col"], _column_mean(squares), beta)
    by_row = (row / row.mean()).rsqrt_()
    return (by_row[:, None] * col.rsqrt()[None, :]).mul_(values)
