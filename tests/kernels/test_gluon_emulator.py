"""The emulator of Gluon kernels: correct kernels pass under every schedule, and each error of synchronisation is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tests.kernels.gluon_blocks import N, blocks, descriptor
from tests.kernels.gluon_emulator import run
from tests.kernels.gluon_machine import Deadlock, EmulationError, Race

load_by_alias = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


# A ring of buffers: a producer loads the blocks of x by TMA, two consumers add them up. FAULT names the error that is made.


@gluon.jit
def _ring_producer(x_desc, ring, full, empty, count, STAGES: gl.constexpr, NAMES: gl.constexpr, FAULT: gl.constexpr):
    for i in range(count):
        stage = i % STAGES
        phase = i // STAGES & 1
        if FAULT == "flipped phase":
            mbarrier.wait(empty.index(stage), phase)
        elif FAULT != "no wait for the buffer":
            mbarrier.wait(empty.index(stage), phase ^ 1)
        if FAULT == "half of the bytes":
            mbarrier.expect(full.index(stage), x_desc.block_type.nbytes // 2)
        elif FAULT != "no bytes":
            mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        if NAMES == "3.6":
            tma.async_copy_global_to_shared(x_desc, [i * N, 0], full.index(stage), ring.index(stage))
        elif NAMES == "3.9":
            tma.async_load(x_desc, [i * N, 0], full.index(stage), ring.index(stage))
        else:
            load_by_alias(x_desc, [i * N, 0], full.index(stage), ring.index(stage))
    if FAULT == "a load too many" or FAULT == "bytes too many":
        mbarrier.wait(empty.index(0), (count + 1) // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(0), x_desc.block_type.nbytes)
        if FAULT == "a load too many":
            tma.async_load(x_desc, [0, 0], full.index(0), ring.index(0))


@gluon.jit
def _ring_consumer(ring, full, empty, out_ptr, count, PART: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    total = gl.zeros([N, N], gl.float32, layout)
    for i in range(count):
        stage = i % STAGES
        if FAULT == "unmasked phase":
            mbarrier.wait(full.index(stage), i // STAGES)
        elif FAULT != "no wait for the load":
            mbarrier.wait(full.index(stage), i // STAGES & 1)
        if FAULT == "early release":
            mbarrier.arrive(empty.index(stage), count=1)
        total += ring.index(stage).load(layout).to(gl.float32)
        if FAULT != "early release":
            mbarrier.arrive(empty.index(stage), count=2 if FAULT == "two arrivals" else 1)
    rows = gl.arange(0, N, layout=gl.SliceLayout(1, total.type.layout))
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, total.type.layout))
    gl.store(out_ptr + PART * N * N + rows[:, None] * N + columns[None, :], total)


@gluon.jit
def _ring(x_desc, out_ptr, count, STAGES: gl.constexpr, NAMES: gl.constexpr, FAULT: gl.constexpr):
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        if FAULT != "no init":
            mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count={"one arrival": 1, "three arrivals": 3}.get(FAULT, 2))
        if FAULT == "two inits":
            mbarrier.init(empty.index(i), count=2)
    if FAULT != "no fence":
        fence_async_shared()
    gl.warp_specialize(
        [
            (_ring_consumer, (ring, full, empty, out_ptr, count, 0, STAGES, FAULT)),
            (_ring_consumer, (ring, full, empty, out_ptr, count, 1, STAGES, FAULT)),
            (_ring_producer, (x_desc, ring, full, empty, count, STAGES, NAMES, FAULT)),
        ],
        [4, 1],
        [96, 24],
    )


def ring(seed: int, fault: str = "", *, count: int = 5, stages: int = 2, names: str = "alias") -> None:
    x, out = blocks(16 * max(count, 1), 16), torch.full((2, 16, 16), float("nan"))
    arguments = {"x_desc": descriptor(x), "out_ptr": out, "count": count, "STAGES": stages, "NAMES": names, "FAULT": fault}
    run(_ring, (1,), arguments | {"num_warps": 4}, seed=seed)
    torch.testing.assert_close(out, x[: 16 * count].float().unflatten(0, (count, 16)).sum(0).expand(2, -1, -1))


@pytest.mark.parametrize("names", ["3.6", "3.9", "alias"])
@pytest.mark.parametrize(("count", "stages"), [(0, 1), (1, 2), (5, 1), (7, 3)])
def test_ring_of_buffers(names: str, count: int, stages: int) -> None:
    for seed in range(10):
        ring(seed, count=count, stages=stages, names=names)


RING_FAULTS = {
    "no wait for the buffer": (EmulationError, r"TMA load of ring.* is not ordered after (TMA )?load of ring|too many arrivals at full"),
    "no wait for the load": (
        EmulationError,
        r"load of ring\[0\] by partition . .* is not ordered after (TMA )?load|before anyone has waited",
    ),
    "early release": (Race, r"TMA load of ring.* is not ordered after load of ring|load of ring.* is not ordered after TMA load of ring"),
    "one arrival": (EmulationError, r"load of ring.* is not ordered after (TMA )?load of ring|empty.* before anyone has waited"),
    "three arrivals": (Deadlock, r"for parity 0 of empty\[0\]: phase 0, 1 of 3 arrivals and 0 bytes pending"),
    "two arrivals": (EmulationError, r"too many arrivals at empty\[.\]: phase ., 1 of 2|is not ordered after|before anyone has waited"),
    "flipped phase": (Deadlock, r"for parity 0 of empty\[0\]: phase 0, 2 of 2 arrivals and 0 bytes pending"),
    "unmasked phase": (EmulationError, r"the phase of a wait is 0 or 1, got phase=2 at full\[0\]"),
    "half of the bytes": (Deadlock, r"for parity 0 of full\[0\]: phase 0, 0 of 1 arrivals and -256 bytes pending"),
    "no bytes": (Deadlock, r"for parity 0 of full\[0\]: phase 0, 1 of 1 arrivals and -512 bytes pending"),
    "no init": (EmulationError, r"full\[0\] is used before mbarrier.init"),
    "two inits": (EmulationError, r"empty\[0\] is initialised twice"),
    "no fence": (Race, r"a TMA load needs a fence_async_shared after mbarrier.init of full\[0\]"),
    "a load too many": (EmulationError, r"nobody waited for TMA load of ring\[0\] by partition 2"),
    "bytes too many": (EmulationError, r"at the end of the kernel bytes are expected at full\[0\]: phase 3, 0 of 1 arrivals and 512 bytes"),
}


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_faults_of_a_ring_are_found_by_every_schedule(fault: str) -> None:
    error, message = RING_FAULTS[fault]
    for seed in range(10):
        with pytest.raises(error, match=message):
            ring(seed, fault)


def test_a_seed_repeats_its_schedule() -> None:
    def message(seed: int) -> str:
        with pytest.raises(EmulationError) as found:
            ring(seed, "no wait for the buffer")
        return str(found.value)

    messages = [message(seed) for seed in range(10)]
    assert messages == [message(seed) for seed in range(10)]
    assert len(set(messages)) > 1


def test_a_deadlock_lists_every_partition() -> None:
    with pytest.raises(Deadlock) as found:
        ring(0, "three arrivals", stages=1)
    assert re.sub(r" at \w+.py:\d+", "", str(found.value)).splitlines() == [
        "deadlock, and no load is in flight",
        "partition 0 (_ring_consumer) waits for parity 1 of full[0]: phase 1, 1 of 1 arrivals and 0 bytes pending",
        "partition 1 (_ring_consumer) waits for parity 1 of full[0]: phase 1, 1 of 1 arrivals and 0 bytes pending",
        "partition 2 (_ring_producer) waits for parity 0 of empty[0]: phase 0, 1 of 3 arrivals and 0 bytes pending",
    ]


# Partitions that share a buffer without TMA: ordinary accesses are ordered by barriers alone, and a fence may stand on either side.


@gluon.jit
def _halt():
    return


@gluon.jit
def _writer(buffer, bar, FENCE: gl.constexpr, ORDERED: gl.constexpr):
    buffer.store(gl.full([N, N], 1.0, gl.float16))
    if FENCE == "writer":
        fence_async_shared()
    if FENCE == "nested":
        gl.warp_specialize([(_halt, ())], [], [])
    if ORDERED:
        mbarrier.arrive(bar, count=1)
    return 3, gl.program_id(0)


@gluon.jit
def _reader(buffer, bar, out_desc, FENCE: gl.constexpr, ORDERED: gl.constexpr):
    if ORDERED:
        mbarrier.wait(bar, 0)
    if FENCE == "reader":
        fence_async_shared()
    tma.async_store(out_desc, [0, 0], buffer)
    tma.store_wait(0)


@gluon.jit
def _handover(out_desc, FENCE: gl.constexpr, ORDERED: gl.constexpr, WORKERS: gl.constexpr):
    buffer = gl.allocate_shared_memory(gl.float16, [N, N], out_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    results = gl.warp_specialize(
        [(_writer, (buffer, bar, FENCE, ORDERED)), (_reader, (buffer, bar, out_desc, FENCE, ORDERED))], [4] * WORKERS, [24]
    )
    gl.device_assert(results == (3, 0))


def handover(seed: int, fence: str, *, ordered: bool = True, workers: int = 1) -> None:
    out = torch.zeros(16, 16).half()
    run(_handover, (1,), {"out_desc": descriptor(out), "FENCE": fence, "ORDERED": ordered, "WORKERS": workers}, seed=seed)
    assert (out == 1).all()


@pytest.mark.parametrize("fence", ["writer", "reader"])
def test_a_fence_orders_asynchronous_accesses_of_another_partition(fence: str) -> None:
    for seed in range(10):
        handover(seed, fence)


FAULTY_HANDOVERS: dict[str, tuple[Callable[[int], Any], str]] = {
    "no fence": (lambda seed: handover(seed, "none"), "TMA store of buffer .* needs a fence_async_shared after store of buffer"),
    "no barrier": (lambda seed: handover(seed, "writer", ordered=False), "store of buffer .* is not ordered after (TMA )?store of buffer"),
    "nested": (lambda seed: handover(seed, "nested"), r"warp_specialize cannot be nested, got a call in partition 0 \(_writer\)"),
    "no warps": (lambda seed: handover(seed, "writer", workers=2), "warp_specialize has 1 workers"),
}


@pytest.mark.parametrize("fault", FAULTY_HANDOVERS)
def test_faulty_handovers_are_found_by_every_schedule(fault: str) -> None:
    faulty, message = FAULTY_HANDOVERS[fault]
    for seed in range(10):
        with pytest.raises(EmulationError, match=message):
            faulty(seed)
