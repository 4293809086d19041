"""Kinds that only a Triton kernel computes are refused by name."""

import pytest

from sana.ops.backend import require_torch_equivalent


@pytest.mark.parametrize(
    ("kind", "key", "plain"),
    [("triton_linear", "attn_type", "linear"), ("triton_mbconvpreglu", "ffn_type", "mbconvpreglu")],
)
def test_a_triton_kind_says_what_is_missing_and_what_to_set(kind: str, key: str, plain: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"model\.{key}='{kind}'.*Triton.*model\.{key}='{plain}'"):
        require_torch_equivalent(kind)


def test_other_kinds_pass() -> None:
    for kind in ("linear", "flash", "vanilla", "glumbconv"):
        require_torch_equivalent(kind)
