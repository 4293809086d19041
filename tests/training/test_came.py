"""CAME against the published package where both agree, its own rules elsewhere, and no waiting for the device."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sana.training.came import CAMEWrapper, is_matrix
from sana.training.optimizer import build_optimizer


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def gradients(shape: tuple[int, ...], count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(9, 5), (7,)])
def test_matrices_and_vectors_follow_the_published_package(shape: tuple[int, ...]) -> None:
    came_pytorch = pytest.importorskip("came_pytorch")
    ours, theirs = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    torch.testing.assert_close(
        steps(CAMEWrapper([ours], **options), ours, gradients(shape)),
        steps(came_pytorch.CAME([theirs], **options), theirs, gradients(shape)),
    )


def test_a_1x1_convolution_is_a_linear_layer() -> None:
    linear, convolution = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4, 1, 1))
    expected = steps(CAMEWrapper([linear], 1e-2), linear, gradients((6, 4)))
    actual = steps(CAMEWrapper([convolution], 1e-2), convolution, [g[..., None, None] for g in gradients((6, 4))])
    assert torch.equal(actual[..., 0, 0], expected)


def test_only_matrices_are_factored() -> None:
    shapes = [(6, 4), (6, 4, 1, 1), (6, 1, 3, 3), (2, 3, 4), (5,), ()]
    assert [is_matrix(torch.Size(shape)) for shape in shapes] == [True, True, False, False, False, False]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = CAMEWrapper(parameters, 1e-2)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        assert ("exp_avg_res_row" in optimizer.state[parameter]) == is_matrix(parameter.shape)


def test_an_update_is_no_larger_than_the_threshold() -> None:
    parameter = nn.Parameter(torch.zeros(5))
    (first,) = gradients((5,), 1)
    change = steps(CAMEWrapper([parameter], lr=1.0, clip_threshold=0.5, betas=(0.0, 0.999, 0.9999)), parameter, [first])
    assert float(change.square().mean().sqrt()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(change.sign(), -first.sign())


def test_16_bit_parameters_keep_float32_state_over_a_restart() -> None:
    parameter = nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    optimizer = CAMEWrapper([parameter], 1e-2)
    steps(optimizer, parameter, [g.bfloat16() for g in gradients((6, 4))])
    fresh = CAMEWrapper([nn.Parameter(parameter.detach().clone())], 1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    (loaded,) = fresh.state.values()
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor):
            assert loaded[key].dtype == torch.float32
            assert torch.equal(loaded[key], value)


class NoWaiting(TorchDispatchMode):
    """Fails where a value of a tensor is read by Python: on a GPU that waits for everything before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


def test_the_guard_against_waiting_works() -> None:
    with pytest.raises(AssertionError, match="was read"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize("name", ["CAMEWrapper", "CAME8BitWrapper", "Lion", "Muon"])
def test_no_step_waits_for_the_device(name: str) -> None:
    shapes = [(130, 140), (6, 4, 1, 1), (6, 1, 3, 3), (5,)]
    named = [(f"p{i}", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]
    rest = {} if name != "Muon" else {"exclude": ["p1", "p2", "p3"]}
    optimizer = build_optimizer(named[:1] if name == "Muon" else named, {"type": name, "lr": 1e-2, **rest})
    for _ in range(2):
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        with NoWaiting():
            optimizer.step()


def test_a_closure_gives_gradients_and_the_loss() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = CAMEWrapper([parameter], 1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert bool((parameter < 1).all())
