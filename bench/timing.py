"""How long a call takes, and how many kernels it launches: by the library's own timers, on CPUs and GPUs alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Milliseconds: the percentiles 20, 50 and 80 of the runs."""

    p20: float
    p50: float
    p80: float


def measure(call: Call, device: str, *, seconds: float = 1.0) -> Timing:
    """Time a call, warmed up. On a GPU with the L2 cache cleared before every run."""
    call()
    if device == "cuda":
        from triton.testing import do_bench

        return Timing(*do_bench(call, warmup=100, rep=int(1000 * seconds), quantiles=[0.2, 0.5, 0.8]))
    # Blocks of one run each: percentiles are those of calls, not of averages.
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    first = timer.timeit(1).median
    times = torch.tensor([timer.timeit(1).median for _ in range(min(1000, max(5, int(seconds / first))))], dtype=torch.float64)
    return Timing(*(1000 * torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))).tolist())


def launches(call: Call, device: str) -> int | None:
    """Kernels that one call runs on a GPU; None on a CPU, which has none."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in trace.events() if event.device_type.name == "CUDA")
