"""Names of precisions."""

import pytest
import torch

from sana.utils.dtype import dtype_name, parse_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("FP32", torch.float32),
        ("no", torch.float32),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_parse(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert parse_dtype(name) is dtype
    assert parse_dtype(dtype_name(dtype)) is dtype


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"Unknown dtype 'bfloat61'. Did you mean 'bfloat16'\? Allowed: fp32"):
        parse_dtype("bfloat61")
    with pytest.raises(ValueError, match="torch.int8 has no short name"):
        dtype_name(torch.int8)
