"""A model of memory that runs blocks and chunks once a kind against one that runs them all: the same bytes."""

import importlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.config import SanaConfig, load_config
from sana.ops.linear_attention import cpu, wide
from sana.pipelines.loading import find_model, source_config
from sana.pipelines.memory.repeats import Repeats, kind
from sana.pipelines.memory.stages import MemoryModel

LARGE = "configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml"
SPRINT = "configs/sana_sprint_config/1024ms/SanaSprint_1600M_1024px_allqknorm_bf16_scm_ladd.yaml"


def bundled() -> SanaConfig:
    return source_config(find_model("asset/models/sana_tiny"))


def assert_same(config: SanaConfig, stage: str, *args: int, keywords: dict | None = None, **options) -> None:
    model, whole = MemoryModel(config, **options), MemoryModel(config, **options)
    whole.thorough = True
    assert getattr(model, stage)(*args, **(keywords or {})) == getattr(whole, stage)(*args, **(keywords or {})) > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bundled_model(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PAG, whose layers are of another kind, two prompts, and many chunks."""
    for module in (wide, cpu, importlib.import_module("sana.ops.mix_ffn.cpu")):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2**15)
    options = {"device": device, "dtype": dtype}
    assert_same(bundled(), "denoise", 256, 256, 2, keywords={"pag": True}, **options)
    assert_same(bundled(), "encode_text", 2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_large_models(device: str) -> None:
    large, options = load_config(LARGE), {"device": device, "dtype": torch.bfloat16}
    assert_same(large, "denoise", 4096, 4096, 1, **options)
    assert_same(large, "encode_text", 2, **options)
    assert_same(large, "decode", 4096, 4096, 1, **options)
    assert_same(large, "denoise", 1024, 1024, 1, **options, quantization="int8")
    assert_same(load_config(SPRINT), "denoise", 1024, 1024, 2, **options)


class Block(nn.Module):
    """Counts its runs."""

    runs = 0

    def __init__(self, size: int, style: str = "a") -> None:
        super().__init__()
        self.style, self.linear = style, nn.Linear(size, size)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        type(self).runs += 1
        return self.linear(x)


@pytest.mark.parametrize(
    ("styles", "inputs", "runs"),
    [("aaaaa", 1, 2), ("aabba", 1, 4), ("a", 1, 1), ("ababab", 1, 4), ("aaaaa", 3, 6)],
)
def test_the_first_and_the_last_of_a_kind_are_run_in_every_pass(styles: str, inputs: int, runs: int) -> None:
    Block.runs = 0
    with FakeTensorMode():
        blocks = [Block(8, style) for style in styles]
        Repeats(blocks)
        for _ in range(inputs):
            x = torch.empty(2, 8)
            for block in blocks:
                x = block(x)
            assert x.shape == (2, 8)
    assert Block.runs == runs


def test_other_inputs_are_another_kind() -> None:
    Block.runs = 0
    with FakeTensorMode():
        blocks = [Block(8) for _ in range(4)]
        Repeats(blocks)
        for index, block in enumerate(blocks):
            block(torch.empty(2 + (index == 1), 8))
    assert Block.runs == 3  # the first, the one of three rows, the last
    assert kind(Block(8)) == kind(Block(8)) != kind(Block(4))
