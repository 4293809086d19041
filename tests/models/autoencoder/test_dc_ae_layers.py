"""Layers of the DC-AE in inference: fused and in-place forms against the plain ones, and which kernel is asked for."""

import pytest
import torch
from torch import Tensor, nn

from sana.models.autoencoder import dc_ae_layers
from sana.models.autoencoder.dc_ae_blocks import build_block
from sana.models.autoencoder.dc_ae_layers import ConvLayer, OpSequential, ResidualBlock, RMSNorm2d
from sana.ops.backend import TritonUnavailableError
from sana.ops.rms_norm import reference
from tests.tolerance import assert_rms_close

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return module


def assert_inference_equals_training(module: nn.Module, x: Tensor) -> None:
    """Without gradients the same numbers come out, for weights that are trained and for frozen ones; `x` stays."""
    expected, before = module(x).detach(), x.clone()
    for frozen in (False, True):
        module.requires_grad_(not frozen)
        for _ in range(2):  # the second time with what the first kept
            with torch.no_grad():
                assert_rms_close(module(x), expected, what=f"frozen={frozen}")
            assert torch.equal(x, before), "the input was overwritten"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("norm", [None, "trms2d"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_convolution_in_inference(
    kernel_size: int, norm: str | None, act: str | None, layout: torch.memory_format
) -> None:
    layer = randomise(ConvLayer(8, 12, kernel_size, norm=norm, act=act))
    assert_inference_equals_training(layer, torch.randn(2, 8, 5, 7).to(memory_format=layout))


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 4}, {"groups": 4, "stride": 2}, {"bias": False}])
def test_unusual_1x1_convolutions_in_inference(options: dict) -> None:
    assert_inference_equals_training(randomise(ConvLayer(8, 12, 1, **options)), torch.randn(1, 8, 6, 4))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.GELU()])
def test_a_norm_and_its_activation_in_inference(act: nn.Module) -> None:
    x = torch.randn(2, 8, 3, 5)
    layer = OpSequential([randomise(RMSNorm2d(8)), act])
    norm, _ = layer.op_list
    torch.testing.assert_close(layer(x), act(norm(x)))
    assert_inference_equals_training(layer, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("block_type", "size"), [("ResBlock", 5), ("EViT_GLU", 5), ("EViTS3S5_GLU", 5), ("EViTS5_GLU", 2)]
)
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_a_block_in_inference(block_type: str, size: int, act: str, layout: torch.memory_format) -> None:
    """`size` 2 is fewer tokens than channels of a head: attention in the other order."""
    block = randomise(build_block(block_type, 16, head_dim=8, norm="trms2d", act=act))
    for batch in (1, 2):
        assert_inference_equals_training(block, torch.randn(batch, 16, size, size + 1).to(memory_format=layout))


def test_a_residual_may_be_wider_than_its_block() -> None:
    block, x = ResidualBlock(nn.Conv2d(4, 4, 1).bfloat16()), torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)
    block.shortcut = nn.Identity()
    with torch.no_grad():
        assert block(x).dtype == torch.bfloat16
        block.shortcut = nn.Conv2d(4, 4, 1).bfloat16().float()
        block.main.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(),))
        assert block(x.float()).dtype == torch.float32


def test_triton_gets_the_activation_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str | None = None) -> Tensor:
        asked.append(act)
        return reference.rms_norm_2d(x, weight, bias, eps, act)

    layers = [
        randomise(ConvLayer(4, 4, norm="trms2d", act="silu")),
        randomise(ConvLayer(4, 4, norm="trms2d", act="gelu")),
        OpSequential([randomise(RMSNorm2d(4)), nn.ReLU(), randomise(ConvLayer(4, 4))]),
    ]
    x = torch.randn(1, 4, 3, 3)
    expected = [layer(x) for layer in layers]
    monkeypatch.setattr(dc_ae_layers, "choose", lambda backend, x: "triton" if backend == "triton" else "reference")
    monkeypatch.setattr(dc_ae_layers, "rms_norm_2d_triton", kernel)
    for layer, wanted in zip(layers, expected, strict=True):
        for module in layer.modules():
            if isinstance(module, RMSNorm2d):
                module.backend = "triton"
        torch.testing.assert_close(layer(x), wanted)
    assert asked == ["silu", None, "relu"]


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    norm = RMSNorm2d(4)
    norm.backend = "triton"
    with pytest.raises(TritonUnavailableError):
        norm(torch.randn(1, 4, 2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_with_triton_kernels_on_a_gpu(compiled: bool, layout: torch.memory_format) -> None:
    block = randomise(build_block("EViTS5_GLU", 64, head_dim=32, norm="trms2d", act="silu")).cuda().bfloat16()
    x = torch.randn(2, 64, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    expected = block.float()(x.float())
    block.bfloat16()
    for module in block.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"
    run = torch.compile(block) if compiled else block
    with torch.no_grad():
        error = (run(x).float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.02  # several layers, each rounded to bf16
