"""One table of tolerances by dtype, and comparisons that say how far off a result is. No test is here."""

import torch

RMS_RATIO_FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
RMS_RATIO_BACKWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns RMS(actual - expected) / RMS(expected), computed in float64."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.pow(2).mean().sqrt().clamp_min(1e-30)
    return float((actual - expected).pow(2).mean().sqrt() / scale)


def assert_rms_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    backward: bool = False,
    what: str = "result",
) -> None:
    """Asserts equal shapes, finite values and an RMS ratio within the table's limit for `dtype` (`actual`'s)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    table = RMS_RATIO_BACKWARD if backward else RMS_RATIO_FORWARD
    limit = table[dtype or actual.dtype]
    ratio = rms_ratio(actual, expected)
    assert ratio <= limit, f"{what}: RMS ratio {ratio:.3e} exceeds {limit:.0e}"


def assert_all_close(
    actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float, what: str = "result"
) -> None:
    """Asserts equal shapes and |actual - expected| <= atol + rtol * |expected| everywhere; NaN is never close."""
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if actual.is_complex() or expected.is_complex():
        actual, expected = torch.view_as_real(actual + 0j), torch.view_as_real(expected + 0j)
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = (actual - expected).abs()
    close = (error <= atol + rtol * expected.abs()) | (actual == expected)
    if not bool(close.all()):
        raise AssertionError(
            f"{what}: {int((~close).sum())} of {close.numel()} values differ by more than "
            f"rtol={rtol:g}, atol={atol:g}; "
            f"greatest error {float(error.nan_to_num(float('inf')).max()):.3e}, "
            f"greatest expected value {float(expected.abs().max()):.3e}"
        )
