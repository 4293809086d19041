"""Muon: momentum whose update is orthogonalised, for the matrices of a network; convolution kernels count as matrices.

`torch.optim.Muon` takes 2-D parameters only, and half of this model's matrices are 1x1 and 3x3 convolutions. Everything
else (norms, biases, embeddings, depthwise kernels, output layers) belongs in AdamW: `split_parameters` sorts them.
"""

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon


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
                buffer = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                matrix = update.reshape(len(update), -1).bfloat16()
                scale = 0.2 * max(matrix.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(
                    orthogonalise(matrix).reshape(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * scale
                )


def split_parameters(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW), without frozen parameters; `exclude`: words of names for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        columns = parameter[0].numel() if parameter.ndim > 1 else 0
        is_matrix = parameter.ndim in (2, 4) and columns > 25 and len(parameter) > 4
        (matrices if is_matrix and not any(word in name for word in exclude) else rest).append(parameter)
    return matrices, rest
