"""What tests and benchmarks share: the error budget, inputs, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Demand `error(actual) <= 2 * error(eager) + rounding`.

    Args:
        actual: The result under test.
        eager: The plain low-precision computation of the same inputs.
        exact: The fp64 result of the same (already quantised) inputs.

    Raises:
        AssertionError: the budget is exceeded or the result is not finite.

    The rule of flash-attention's tests: error is judged by error, with one rounding of the result in its own dtype on top.
    """
    if actual.dtype != eager.dtype:  # raised, not asserted: benchmarks lean on it under `python -O`, too
        raise AssertionError(f"compared in different dtypes, got {actual.dtype=}, {eager.dtype=}")
    if not actual.isfinite().all():
        raise AssertionError("the result has NaN or infinite values")
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= allowed:  # an error that is NaN is none
        raise AssertionError(f"error {error:.3e} exceeds the budget {allowed:.3e}")


def attention_inputs(
    shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of `[B, Y, X, H, D]`, unit normal."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return q, k, v


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, so that an element nobody wrote is seen."""
    # Both take down torch's functions when they are first used, for good, and must not meet ours.
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
