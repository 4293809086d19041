"""Sizes by hand for the released widths, and what a scheme refuses to store."""

import pytest
import torch

from sana.models.quantization.schemes import SCHEMES, check_shape, group_size, is_stored_key, quantized_bytes, scheme_of

QKV_600M = (3456, 1152)  # values 3981312


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        ("int8", 3981312 + 4 * 3456),
        ("int8-dynamic", 3981312 + 4 * 3456),
        ("fp8", 3981312 + 4 * 3456),
        ("nf4", 3981312 // 2 + 4 * 3981312 // 64),
        ("int4", 3981312 // 2 + 4 * 3981312 // 64),
        (None, 3981312 * 2),
    ],
)
def test_bytes_of_the_largest_attention_layer(scheme, size):
    assert quantized_bytes(QKV_600M, scheme, torch.bfloat16) == size
    assert quantized_bytes((*QKV_600M, 1, 1), scheme, torch.bfloat16) == size


def test_only_exact_weights_depend_on_the_dtype():
    for scheme in SCHEMES:
        sizes = {quantized_bytes((64, 64), scheme, dtype) for dtype in (torch.float32, torch.bfloat16)}
        assert len(sizes) == 1
    assert quantized_bytes((64, 64), None, torch.float32) == 16384


def test_where_no_group_divides_a_row_nf4_counts_its_last_group_whole():
    assert quantized_bytes((3, 80), "nf4", torch.float32) == 120 + 4 * 4
    assert quantized_bytes((3, 96), "nf4", torch.float32) == 144 + 4 * 9  # groups of 32


@pytest.mark.parametrize(("width", "size"), [(1152, 64), (2240, 64), (2880, 64), (5600, 32), (9216, 64)])
@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_groups_divide_the_released_widths(scheme, width, size):
    assert group_size(width, SCHEMES[scheme]) == size


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        ("fp8", (40, 32), "outputs that is a multiple of 16, and 40 is none"),
        ("int4", (8, 48), "inputs that is a multiple of 32, and 48 is none"),
        ("int8-dynamic", (12, 32), "outputs that is a multiple of 8, and 12 is none"),
        ("nf4", (8, 31), "inputs that is a multiple of 2, and 31 is none"),
        ("int8", (8, 4, 3, 3), "no matrix"),
        ("int8", (8,), "no matrix"),
    ],
)
def test_shapes_that_cannot_be_stored(scheme, shape, words):
    with pytest.raises(ValueError, match=words):
        check_shape(shape, SCHEMES[scheme])
    with pytest.raises(ValueError, match=words):
        quantized_bytes(shape, scheme, torch.float32)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown quantisation 'int3'; known: int8, int8-dynamic, int4, nf4, fp8"):
        scheme_of("int3")


def test_devices_in_words():
    assert SCHEMES["int4"].hardware == "CUDA devices of compute capability 8.0 or newer"
    assert SCHEMES["fp8"].hardware == "CUDA devices of compute capability 9.0 to 10.x"
    assert SCHEMES["nf4"].hardware == "the CPU and CUDA devices"


def test_keys_of_quantised_weights():
    for key in ("blocks.0.attn.qkv.int8_values", "int8_dynamic_values", "layers.0.mlp.up_proj.nf4_values"):
        assert is_stored_key(key)
    for key in ("blocks.0.attn.qkv.weight", "blocks.0.attn.values", "blocks.0.attn.qkv.int3_values", "int8_scale"):
        assert not is_stored_key(key)
