"""Muon: momentum whose update is orthogonalised, for the matrices of a network; convolution kernels count as matrices.

`torch.optim.Muon` takes 2-D parameters only, and half of this model's matrices are 1x1 and 3x3 convolutions. Everything
else (norms, biases, embeddings, depthwise kernels, output layers) belongs in AdamW: `MuonWithAdamW` does both.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from sana.training.skipping import unchanged_if

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon

EXCLUDED = ("embed_tokens", "final_layer", "x_embedder", "t_block", "t_embedder")  # inputs, outputs and conditioning


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately: Newton-Schulz iteration on a (rows, columns) float matrix."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that its RMS matches AdamW's (factor 0.2 sqrt(max(rows, columns))).

    Args:
        params: parameters of at least two dimensions; dimensions after the first are flattened.
        lr: learning rate, on the scale of AdamW's.
        momentum: decay of the momentum buffer.
        weight_decay: decoupled weight decay.
    """

    skips_on_device = True
    found_inf: Tensor | None = None

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                with unchanged_if(self.found_inf, [parameter, state["momentum"]]):
                    self._move(parameter, state["momentum"], group)

    def _move(self, parameter: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(momentum, group["momentum"])
        matrix = _whole(update).flatten(1).bfloat16()
        scale = 0.2 * max(matrix.shape) ** 0.5
        direction = orthogonalise(matrix).reshape(parameter.shape).to(parameter.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_like(direction, parameter), alpha=-group["lr"] * scale)


def _whole(tensor: Tensor) -> Tensor:
    """An FSDP2 shard as the whole tensor, on every process: one exchange a matrix, then no more."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, cut as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=parameter.placements)


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimiser: Muon for the matrices, fused `torch.optim.AdamW` for everything else. A configuration's "Muon".

    Where the attribute `found_inf` (see `skipping.py`) is 1, a step changes nothing.

    Args:
        params: pairs (name, parameter), or groups of them; each group becomes one of matrices and one of the rest.
        lr: of the matrices.
        momentum: of the matrices.
        weight_decay: of the matrices.
        adamw_lr: of the rest; None: like `lr`. A group's own lr scales both.
        adamw_betas, adamw_eps, adamw_weight_decay: of the rest.
        exclude: parameters with one of these words in their name belong to the rest.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.98),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        exclude: tuple[str, ...] = EXCLUDED,
    ) -> None:
        entries = list(params)
        groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
        matrices, rest = [], []
        for group in groups:
            own_lr = group.get("lr", lr)
            adamw_own_lr = own_lr if adamw_lr is None else adamw_lr * own_lr / lr
            orthogonal, other = split_named_parameters(group["params"], exclude)
            if orthogonal:
                matrices.append(
                    {"params": orthogonal, "lr": own_lr, "weight_decay": group.get("weight_decay", weight_decay)}
                )
            if other:
                rest.append({"params": other, "lr": adamw_own_lr})
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, lr, momentum, weight_decay))
        if rest:
            self._parts.append(
                torch.optim.AdamW(rest, betas=adamw_betas, eps=adamw_eps, weight_decay=adamw_weight_decay, fused=True)
            )
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @property
    def skips_on_device(self) -> bool:
        """Whether every group of AdamW is fused; those of an older checkpoint are not."""
        return all("momentum" in group or group["fused"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:  # they work on this optimiser's own groups and state, which loading replaces
            orthogonal = isinstance(part, Muon)
            part.param_groups = [group for group in self.param_groups if ("momentum" in group) == orthogonal]
            part.state = self.state
            part.found_inf = self.found_inf  # type: ignore[attr-defined]
            part.step()
        return loss


def split_named_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], exclude: tuple[str, ...] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW), without frozen parameters; `exclude`: words of names for the rest."""
    matrices, rest = [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        columns = parameter[0].numel() if parameter.ndim > 1 else 0
        is_matrix = parameter.ndim in (2, 4) and columns > 25 and len(parameter) > 4
        (matrices if is_matrix and not any(word in name for word in exclude) else rest).append(parameter)
    return matrices, rest


def split_parameters(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """`split_named_parameters` of a module."""
    return split_named_parameters(model.named_parameters(), exclude)
