"""Helpers for tests and benchmarks: the error budget, random inputs, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Check that `error(actual) <= 2 * error(eager) + rounding`.

    Args:
        actual: The result under test.
        eager: The result of an eager computation in low precision, from the same inputs.
        exact: The fp64 result from the same (already quantised) inputs.

    Raises:
        AssertionError: The budget is exceeded, the result is not finite, or the dtypes of actual and eager differ.

    This is the rule of flash-attention's tests: the error is compared to that of the eager computation, plus one rounding of the result.
    """
    if actual.dtype != eager.dtype:  # raised explicitly, because benchmarks also need it under `python -O`
        raise AssertionError(f"actual and eager must have the same dtype, got {actual.dtype=}, {eager.dtype=}")
    if not actual.isfinite().all():
        raise AssertionError("the result has NaN or infinite values")
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= allowed:  # also fails if the error is NaN
        raise AssertionError(f"error {error:.3e} exceeds the budget {allowed:.3e}")


def attention_inputs(
    shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v of shape `[B, Y, X, H, D]`, from a unit normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return q, k, v


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make `torch.empty` and `torch.empty_like` return NaN, so that elements that are never written are detected."""
    # Both store references to these torch functions on first use, and must not store the replacements.
    import torch._dynamo

    with torch.device("cpu"):
        torch.empty(0)

    originals = {"empty": torch.empty, "empty_like": torch.empty_like}

    def poisoned(make: Any) -> Any:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return fill

    try:
        for name, make in originals.items():
            setattr(torch, name, poisoned(make))
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)
