"""How long a call takes, and how many kernels it launches: by the library's own timers, on CPUs and GPUs alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    return _percentiles([1000 * timer.timeit(1).median for _ in range(min(1000, max(5, int(seconds / first))))])


def measure_in_turn(calls: Sequence[Call], device: str, *, seconds: float = 1.0) -> Timing:
    """Time one call on several sets of inputs, taken in turn: with more of them than caches hold, every run finds its own set cold.

    On a GPU by events around every call, without waiting in between; what the host cannot launch fast enough counts, as it does in a
    model. On a CPU by the host's clock. Warmed up on every set, then in turn for a tenth of the time, on a GPU for 0.3 s at least, until
    its clocks are up. At most 500 runs; at least five, or three of those that take two seconds or more.
    """
    turn = cycle(calls)
    for call in islice(turn, len(calls)):
        call()
    _wait(device)
    once = _warmed_up(turn, device, max(seconds / 10, 0.3 if device == "cuda" else 0.0))
    timed = islice(turn, min(500, max(5 if once < 2 else 3, int(seconds / once))))
    return _percentiles(_by_events(timed) if device == "cuda" else _by_clock(timed))


def measure_side_by_side(entrants: Sequence[Sequence[Call]], *, seconds: float = 1.0) -> list[Timing | Exception]:
    """Time several calls by the host's clock, one run of each and then the next of each: what else the machine does meets all alike.

    Each takes its own sets of inputs in turn, and is warmed up on all of them. At most 500 rounds, at least five. One that breaks is left
    out from then on: what it raised stands in place of its time.

    Args:
        entrants: Of each the call on every set of inputs.
        seconds: For all of them together.
    """
    turns = [cycle(calls) for calls in entrants]
    times: list[list[float]] = [[] for _ in entrants]
    broken: dict[int, Exception] = {}

    def run(i: int) -> None:
        if i not in broken:
            try:
                times[i] += _by_clock([next(turns[i])])
            except Exception as problem:
                broken[i] = problem

    for i, calls in enumerate(entrants):
        for _ in calls:
            run(i)
        times[i].clear()
    rounds, begun = 0, time.perf_counter()
    while rounds < 5 or (rounds < 500 and time.perf_counter() - begun < seconds):
        for i in range(len(entrants)):
            run(i)
        rounds += 1
    return [broken[i] if i in broken else _percentiles(found) for i, found in enumerate(times)]


def _percentiles(milliseconds: Sequence[float]) -> Timing:
    times = torch.tensor(milliseconds, dtype=torch.float64)
    return Timing(*torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def _warmed_up(turn: Iterator[Call], device: str, seconds: float) -> float:
    """Seconds of the last of the runs, waited for."""
    begun = time.perf_counter()
    while True:
        started = time.perf_counter()
        next(turn)()
        _wait(device)
        ended = time.perf_counter()
        if ended - begun >= seconds:
            return ended - started


def _by_events(calls: Iterable[Call]) -> list[float]:
    pairs = [(call, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for call in calls]
    for call, begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for _, begin, end in pairs]


def _by_clock(calls: Iterable[Call]) -> list[float]:
    times = []
    for call in calls:
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
def fused_attention(device: str, dtype: torch.dtype, head_dim: int) -> Iterator[None]:
    """Inside, torch's attention takes the fastest of its fused backends that can run a call, and the math one where none can.

    torch's own order is another one: on Hopper GPUs its first choice is not the fastest. On a CPU there is one to choose.
    """
    if device != "cuda":
        yield
        return
    with sdpa_kernel([*by_speed(device, dtype, head_dim), SDPBackend.MATH], set_priority=True):
        yield


@cache
def by_speed(device: str, dtype: torch.dtype, head_dim: int, *, seconds: float = 0.1) -> tuple[SDPBackend, ...]:
    """The fused backends that run here, the fastest first, on the self-attention of 64 x 64 tokens, 24 heads of this dimension."""
    q = torch.randn(1, 24, 4096, head_dim, device=device, dtype=dtype)
    times: dict[SDPBackend, float] = {}
    for backend in FUSED:
        with suppress(RuntimeError), sdpa_kernel(backend):  # torch has no kernel of this backend here
            times[backend] = measure(lambda: F.scaled_dot_product_attention(q, q, q), device, seconds=seconds).p50
    return tuple(sorted(times, key=times.__getitem__))
