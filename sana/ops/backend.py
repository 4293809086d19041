"""The one place that chooses between plain PyTorch and Triton kernels. No kernel is here; nothing imports Triton."""

TRITON_ONLY = {
    "triton_linear": ("attn_type", "linear"),
    "triton_mbconvpreglu": ("ffn_type", "mbconvpreglu"),
}


def require_torch_equivalent(kind: str) -> None:
    """Rejects layer kinds whose only implementation is a Triton kernel.

    Args:
        kind: value of `model.attn_type` or `model.ffn_type`.

    Raises:
        NotImplementedError: the kind needs a kernel that this version does not have.
    """
    if kind in TRITON_ONLY:
        key, plain = TRITON_ONLY[kind]
        raise NotImplementedError(
            f"model.{key}={kind!r} needs the fused Triton kernels (sana/ops/<op>/forward.py, backward.py), which "
            f"this version does not include. Set model.{key}={plain!r}: the same function with the same weights."
        )
