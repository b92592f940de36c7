"""How long a call takes, and how many kernels it launches: by the library's own timers, on CPUs and GPUs alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

Call = Callable[[], Any]


FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


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


def measure_in_turn(calls: Sequence[Call], device: str, *, seconds: float = 1.0) -> Timing:
    """Time one call on several sets of inputs, taken in turn: with more of them than caches hold, every run finds its own set cold.

    On a GPU by events around every call, without waiting in between; what the host cannot launch fast enough counts, as it does in a
    model. On a CPU by the host's clock. At least three runs, at most 500, warmed up on every set and for a tenth of the time.
    """
    begun = time.perf_counter()
    for call in calls:
        call()
    _wait(device)
    while time.perf_counter() - begun < seconds / 10:
        calls[0]()
        _wait(device)
    begun = time.perf_counter()
    calls[0]()
    _wait(device)
    runs = min(500, max(3, int(seconds / (time.perf_counter() - begun))))
    times = _by_events(calls, runs) if device == "cuda" else _by_clock(calls, runs)
    return Timing(*torch.quantile(torch.tensor(times, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def _by_events(calls: Sequence[Call], runs: int) -> list[float]:
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
    for (begin, end), call in zip(events, islice(cycle(calls), runs), strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _by_clock(calls: Sequence[Call], runs: int) -> list[float]:
    times = []
    for call in islice(cycle(calls), runs):
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(call: Call, device: str) -> int | None:
    """Bytes that a call takes on a GPU beside what is there, its result among them; None on a CPU, where nobody counts."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def launches(call: Call, device: str) -> int | None:
    """Kernels that one call runs on a GPU; None on a CPU, which has none."""
    found = kernels(call, device)
    return None if found is None else len(found)


def kernels(call: Call, device: str) -> list[tuple[str, float]] | None:
    """Name and microseconds of every kernel that one call runs on a GPU; None on a CPU, which has none."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return [(event.name, event.time_range.elapsed_us()) for event in trace.events() if event.device_type.name == "CUDA"]


@contextmanager
def fused_attention(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, torch's attention takes the fastest of its fused backends that can run a call, and the math one where none can.

    torch's own order is another one: on Hopper GPUs its first choice is not the fastest. On a CPU there is one to choose.
    """
    if device != "cuda":
        yield
        return
    with sdpa_kernel([*by_speed(device, dtype), SDPBackend.MATH], set_priority=True):
        yield


@cache
def by_speed(device: str, dtype: torch.dtype, *, seconds: float = 0.1) -> tuple[SDPBackend, ...]:
    """The fused backends that run here, the fastest first, on the self-attention of 64 x 64 tokens."""
    head_dim = 64 if dtype == torch.float16 else 128  # SDXL's and FLUX's
    q = torch.randn(1, 24, 4096, head_dim, device=device, dtype=dtype)
    times: dict[SDPBackend, float] = {}
    for backend in FUSED:
        with suppress(RuntimeError), sdpa_kernel(backend):  # torch has no kernel of this backend here
            times[backend] = measure(lambda: F.scaled_dot_product_attention(q, q, q), device, seconds=seconds).p50
    return tuple(sorted(times, key=times.__getitem__))
