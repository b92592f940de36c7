"""The ceilings of a machine, measured: the rates of a large copy and of a large matrix product."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.harness.timing import measure_in_turn


class Ceilings(NamedTuple):
    """What a machine reaches in this run.

    Attributes:
        copy_gbs: GB/s of a copy far larger than its caches, bytes read and written.
        matrix_tflops: TFLOP/s of a large matrix product of random numbers in one dtype.
    """

    copy_gbs: float
    matrix_tflops: float


def ceilings(device: str, dtype: torch.dtype, *, seconds: float = 0.5) -> Ceilings:
    """Measure both; 2 GB and 8192 x 8192 x 8192 on a GPU, 256 MB and 2048 x 2048 x 2048 on a CPU."""
    size, side = (2**31, 8192) if device == "cuda" else (2**28, 2048)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure_in_turn([lambda: target.copy_(source)], device, seconds=seconds).p50
    rng = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=rng, dtype=dtype, device=device) for _ in range(2))
    product = measure_in_turn([lambda: a @ b], device, seconds=seconds).p50
    return Ceilings(2 * size / copy / 1e6, 2 * side**3 / product / 1e9)
