"""The names of floating-point precisions and the torch dtypes behind them. Casting policy is not decided here."""

import torch

from sana.registry import suggest

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "no": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Returns the torch dtype of a precision name; a dtype passes unchanged.

    Args:
        name: "fp32", "float32", "no" (the launcher's word for full precision), "fp16", "float16", "bf16" or "bfloat16".

    Raises:
        ValueError: any other name.
    """
    if isinstance(name, torch.dtype):
        return name
    known = DTYPES.get(str(name).removeprefix("torch.").lower())
    if known is None:
        raise ValueError(f"Unknown dtype {name!r}.{suggest(str(name), list(DTYPES))} Allowed: {', '.join(DTYPES)}.")
    return known


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name ("fp32", "fp16", "bf16") of a floating-point dtype."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"{dtype} has no short name; allowed are {sorted({str(known) for known in DTYPES.values()})}.")
