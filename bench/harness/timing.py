"""How long calls take, how much memory they need, which kernels they launch, and what a machine reaches at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], Any]
FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
CPU_CACHE = 2**26  # bytes, assumed
MOST_SETS, MOST_RUNS = 16, 500


class Timing(NamedTuple):
    """The percentiles 20, 50 and 80 of the runs, in milliseconds."""

    p20: float
    p50: float
    p80: float


def sets_of_inputs(size: int, device: str) -> int:
    """How many sets of so many bytes are four times the last cache together: taken in turn, each is cold. At most 16."""
    last = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE
    return min(MOST_SETS, math.ceil(4 * last / size))


def measure_in_turn(calls: Sequence[Call], device: str, *, seconds: float = 1.0) -> Timing:
    """Time one call on several sets of inputs in turn: where caches do not hold all sets, every run finds its own cold."""
    (found,) = measure_together([calls], device, seconds=seconds)
    if isinstance(found, Exception):
        raise found
    return found


def measure_together(entrants: Sequence[Sequence[Call]], device: str, *, seconds: float = 1.0) -> list[Timing | Exception]:
    """Time several calls, each on its sets of inputs in turn, in `seconds` for all together; an exception in place of its timing.

    On a CPU in rounds of one run of each, so that other work on the machine slows all of them alike; on a GPU one after the other.
    """
    if device == "cpu":
        return _in_rounds(entrants, seconds)
    found: list[Timing | Exception] = []
    for calls in entrants:
        try:
            found.append(_by_events(calls, seconds / len(entrants)))
        except Exception as problem:
            found.append(problem)
    return found


def _by_events(calls: Sequence[Call], seconds: float) -> Timing:
    """Events are recorded around every call without waiting in between: launches that the host is too slow for count as in a model.

    Warm after all sets, a tenth of the time and 0.3 s. At least five runs (three of two seconds and more), at most 500.
    """
    turn = cycle(calls)
    for _ in calls:
        next(turn)()
    torch.cuda.synchronize()
    begun = started = ended = time.perf_counter()
    while ended - begun < max(seconds / 10, 0.3):
        started = time.perf_counter()
        next(turn)()
        torch.cuda.synchronize()
        ended = time.perf_counter()
    once, pairs = ended - started, []
    for _ in range(min(MOST_RUNS, max(5 if once < 2 else 3, int(seconds / once)))):
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        next(turn)()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    return percentiles([begin.elapsed_time(end) for begin, end in pairs])


def _in_rounds(entrants: Sequence[Sequence[Call]], seconds: float) -> list[Timing | Exception]:
    """By the host's clock, warm after all sets; at least five rounds, at most 500. One that raises takes no further part."""
    turns = [cycle(calls) for calls in entrants]
    times: list[list[float]] = [[] for _ in entrants]
    raised: dict[int, Exception] = {}

    def run(i: int) -> None:
        if i in raised:
            return
        try:
            begun = time.perf_counter()
            next(turns[i])()
            times[i].append(1000 * (time.perf_counter() - begun))
        except Exception as problem:
            raised[i] = problem

    for i, calls in enumerate(entrants):
        for _ in calls:
            run(i)
        times[i].clear()
    rounds, begun = 0, time.perf_counter()
    while rounds < 5 or (rounds < MOST_RUNS and time.perf_counter() - begun < seconds):
        for i in range(len(entrants)):
            run(i)
        rounds += 1
    return [raised[i] if i in raised else percentiles(found) for i, found in enumerate(times)]


def percentiles(times: Sequence[float]) -> Timing:
    """The percentiles 20, 50 and 80, in the unit of the times."""
    values, quantiles = (torch.tensor(numbers, dtype=torch.float64) for numbers in (times, (0.2, 0.5, 0.8)))
    return Timing(*torch.quantile(values, quantiles).tolist())


def peak_memory(call: Call, device: str) -> int | None:
    """Bytes that a call allocates on a GPU at once, its result included; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def kernels(call: Call, device: str) -> list[tuple[str, float]] | None:
    """Name and microseconds of every kernel that one call runs on a GPU; None on a CPU."""
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
    """Inside, torch's attention on a GPU uses the fastest fused backend that can run a call, or math. torch prefers another order."""
    if device != "cuda":
        yield
        return
    with sdpa_kernel([*by_speed(device, dtype, head_dim), SDPBackend.MATH], set_priority=True):
        yield


@cache
def by_speed(device: str, dtype: torch.dtype, head_dim: int, *, seconds: float = 0.1) -> tuple[SDPBackend, ...]:
    """The fused backends that run here, the fastest first, in self-attention of 64 x 64 tokens with 24 heads."""
    q = torch.randn(1, 24, 4096, head_dim, device=device, dtype=dtype)
    times: dict[SDPBackend, float] = {}
    for backend in FUSED:
        with suppress(RuntimeError), sdpa_kernel(backend):  # torch has no kernel of this backend here
            times[backend] = measure_in_turn([lambda: F.scaled_dot_product_attention(q, q, q)], device, seconds=seconds).p50
    return tuple(sorted(times, key=times.__getitem__))


class Ceilings(NamedTuple):
    """What a machine reaches in this run: the rates of a large copy, bytes read and written, and of a large matrix product in one dtype."""

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
