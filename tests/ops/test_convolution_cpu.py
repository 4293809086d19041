"""Convolutions for inference on a CPU: the numbers of PyTorch's own, and the same bits for a crop and for the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.convolution.cpu import CHANNELS_AT_ONCE, SQUARE, conv2d_cpu
from tests.tolerance import assert_rms_close

# in, out, kernel, stride, padding: those of the released autoencoders whose kernels oneDNN or PyTorch chose by the size
LAYERS = [
    (3, 128, 3, 1, 1), (128, 128, 3, 1, 1), (128, 3, 3, 1, 1), (256, 256, 3, 1, 1), (512, 512, 3, 1, 1),
    (256, 512, 2, 1, 1), (512, 1024, 2, 1, 1), (1024, 32, 3, 1, 1), (32, 1024, 3, 1, 1), (512, 128, 3, 1, 1),
    (256, 512, 3, 2, 1), (512, 512, 3, 2, 1), (1024, 256, 3, 1, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def layer(channels: int, out: int, kernel: int) -> tuple[Tensor, Tensor]:
    return torch.randn(out, channels, kernel, kernel) / (channels * kernel**2) ** 0.5, torch.randn(out)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("channels", "out", "kernel", "stride"), [(7, 5, 3, 1), (600, 9, 3, 2), (513, 4, 2, 1)])
def test_the_numbers_of_pytorch(channels, out, kernel, stride, biased, dtype):
    (weight, bias), x = layer(channels, out, kernel), last(torch.randn(2, channels, 6, 9))
    bias = bias if biased else None
    wide = [None if one is None else one.double() for one in (x, weight, bias)]
    expected = F.conv2d(*wide, stride, 1)
    cast = [None if one is None else one.to(dtype) for one in (x, weight, bias)]
    actual = conv2d_cpu(*cast, stride=stride, padding=1)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    assert_rms_close(actual, expected.to(dtype))


@pytest.mark.parametrize(("channels", "out", "kernel", "stride", "padding"), LAYERS)
def test_a_crop_has_the_bits_of_the_whole(channels, out, kernel, stride, padding):
    """Sizes on both sides of PyTorch's 20480 numbers, and of every change of oneDNN's blocks that was seen."""
    weight, bias = layer(channels, out, kernel)
    large = (34, 140) if channels * out > 2**18 else (40, 200)
    x = last(torch.randn(1, channels, *large))
    whole = conv2d_cpu(x, weight, bias, stride=stride, padding=padding)
    for height, width in ((4, 4), (4, 60), (9, 8), (14, 13), (16, 24), (23, 22), (24, 32)):
        top, left = stride * ((large[0] - height) // (2 * stride)), stride * ((large[1] - width) // (2 * stride))
        crop = last(x[:, :, top : top + height, left : left + width])
        part = conv2d_cpu(crop, weight, bias, stride=stride, padding=padding)
        inner = part[:, :, 1:-1, 1:-1]  # the outermost see the padding instead of neighbours
        rows, columns = top // stride + 1, left // stride + 1
        same = whole[:, :, rows : rows + inner.shape[2], columns : columns + inner.shape[3]]
        assert torch.equal(inner, same), (height, width)


def test_long_sums_are_cut_at_the_same_channels_for_every_size(monkeypatch):
    seen = []
    own = torch.ops.mkldnn._convolution_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_convolution_pointwise", lambda x, *rest: seen.append(x.shape[1]) or own(x, *rest)
    )
    for size in (3, 20):
        conv2d_cpu(last(torch.randn(1, 600, size, size)), layer(600, 4, 3)[0], padding=1)
        assert seen == [CHANNELS_AT_ONCE, CHANNELS_AT_ONCE, 600 - 2 * CHANNELS_AT_ONCE]
        seen.clear()
    conv2d_cpu(last(torch.randn(1, SQUARE, 3, 3)), layer(SQUARE, SQUARE, 3)[0], padding=1)
    assert seen == [SQUARE]
