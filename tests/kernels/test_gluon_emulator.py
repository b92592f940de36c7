"""The emulator of Gluon kernels: correct kernels pass under every schedule, and each error of synchronisation is found."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tests.kernels.gluon_blocks import N, blocks, descriptor
from tests.kernels.gluon_emulator import run
from tests.kernels.gluon_machine import Deadlock, EmulationError, Race

SEEDS = range(10)
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _ring_producer(x_desc, ring, full, empty, count, STAGES: gl.constexpr):
    for i in range(0, count):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        async_load(x_desc, [i * N, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _ring_consumer(ring, full, empty, out_ptr, count, PART: gl.constexpr, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    total = gl.zeros([N, N], gl.float32, layout)
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        total += ring.index(stage).load(layout).to(gl.float32)
        mbarrier.arrive(empty.index(stage), count=1)
    rows = gl.arange(0, N, layout=gl.SliceLayout(1, total.type.layout))
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, total.type.layout))
    gl.store(out_ptr + PART * N * N + rows[:, None] * N + columns[None, :], total)


@gluon.jit
def _ring(x_desc, out_ptr, count, STAGES: gl.constexpr):
    """A producer loads the blocks of x into a ring of buffers, two consumers add them up."""
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, N, N], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_ring_consumer, (ring, full, empty, out_ptr, count, 0, STAGES)),
            (_ring_consumer, (ring, full, empty, out_ptr, count, 1, STAGES)),
            (_ring_producer, (x_desc, ring, full, empty, count, STAGES)),
        ],
        [4, 1],
        [96, 24],
    )


def run_ring(seed: int, edits: dict[str, str] | None = None, *, count: int = 5, stages: int = 2) -> None:
    x, out = blocks(16 * max(count, 1), 16), torch.full((2, 16, 16), float("nan"))
    arguments = {"x_desc": descriptor(x), "out_ptr": out, "count": count, "STAGES": stages, "num_warps": 4}
    run(_ring, (1,), arguments, seed=seed, edits=edits)
    torch.testing.assert_close(out, x[: 16 * count].float().unflatten(0, (count, 16)).sum(0).expand(2, -1, -1))


WAIT_EMPTY, WAIT_FULL = "mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)", "mbarrier.wait(full.index(stage), i // STAGES & 1)"
EXPECT, ARRIVE = "mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)", "mbarrier.arrive(empty.index(stage), count=1)"
INIT_FULL, INIT_EMPTY = "mbarrier.init(full.index(i), count=1)", "mbarrier.init(empty.index(i), count=2)"
LOAD = "total += ring.index(stage).load(layout).to(gl.float32)"
UNORDERED = r"(TMA )?load of ring\[.\] by partition . \(.*\) at test_gluon_emulator.py:\d+ is not ordered after (TMA )?load of ring\[.\]"
NOT_AWAITED = r"completes phase . before anyone has waited for phase ."


@pytest.mark.parametrize("name", ["async_load", "tma.async_load", "tma.async_copy_global_to_shared"])
@pytest.mark.parametrize(("count", "stages"), [(0, 1), (1, 2), (5, 1), (7, 3)])
def test_ring_of_buffers(name: str, count: int, stages: int) -> None:
    for seed in SEEDS:
        run_ring(seed, {"async_load": name}, count=count, stages=stages)


def test_predicates_skip_what_nobody_needs() -> None:
    edits = {
        WAIT_EMPTY: WAIT_EMPTY.replace("^ 1)", "^ 1, pred=i >= STAGES)"),
        ARRIVE: ARRIVE.replace("=1)", "=1, pred=i + STAGES < count)"),
    }
    for seed in SEEDS:
        run_ring(seed, edits)


RING_FAULTS = {
    "no wait for the buffer": ({WAIT_EMPTY: "pass"}, f"{UNORDERED}|too many arrivals at full"),
    "no wait for the load": ({WAIT_FULL: "pass"}, f"{UNORDERED}|{NOT_AWAITED}"),
    "early release": ({f"{LOAD}\n        {ARRIVE}": f"{ARRIVE}\n        {LOAD}"}, UNORDERED),
    "one arrival": ({INIT_EMPTY: INIT_EMPTY.replace("2", "1")}, f"{UNORDERED}|{NOT_AWAITED}"),
    "three arrivals": ({INIT_EMPTY: INIT_EMPTY.replace("2", "3")}, r"parity 0 of empty\[0\]: phase 0, 1 of 3 arrivals and 0 bytes pending"),
    "two arrivals": ({ARRIVE: ARRIVE.replace("1", "2")}, rf"too many arrivals at empty\[.\]: phase ., 1 of 2|{UNORDERED}|{NOT_AWAITED}"),
    "flipped phase": ({"& 1 ^ 1": "& 1"}, r"parity 0 of empty\[0\]: phase 0, 2 of 2 arrivals and 0 bytes pending"),
    "unmasked phase": ({WAIT_FULL: WAIT_FULL.replace("& 1", "")}, r"the phase of a wait is 0 or 1, got phase=2 at full\[0\]"),
    "half of the bytes": ({"nbytes": "nbytes // 2"}, r"parity 0 of full\[0\]: phase 0, 0 of 1 arrivals and -256 bytes pending"),
    "no bytes": ({EXPECT: "pass"}, r"parity 0 of full\[0\]: phase 0, 1 of 1 arrivals and -512 bytes pending"),
    "no init": ({INIT_FULL: "pass"}, r"full\[0\] is used before mbarrier.init"),
    "two inits": ({INIT_FULL: f"{INIT_FULL}; {INIT_FULL}"}, r"full\[0\] is initialised twice"),
    "no fence": ({"fence_async_shared()": "pass"}, r"a TMA load needs a fence_async_shared after mbarrier.init of full\[0\]"),
    "a load too many": ({"range(0, count)": "range(0, count + 1)"}, r"nobody waited for TMA load of ring\[1\] by partition 2"),
    "bytes too many": (
        {
            "range(0, count)": "range(0, count + 1)",
            "full.index(stage), ring.index(stage))": "full.index(stage), ring.index(stage), i < count)",
        },
        r"at the end of the kernel bytes are expected at full\[1\]: phase 2, 0 of 1 arrivals and 512 bytes pending",
    ),
    "no warps": ({"[4, 1]": "[4]"}, r"warp_specialize has 2 workers, got worker_num_warps=\[4\] and worker_num_regs=\[96, 24\]"),
    "no registers": ({"[96, 24]": "[96]"}, r"warp_specialize has 2 workers, got worker_num_warps=\[4, 1\] and worker_num_regs=\[96\]"),
    "nested": (
        {LOAD: "gl.warp_specialize([(gl.zeros, ())], [])"},
        r"warp_specialize cannot be nested, got a call in partition . \(_ring_consumer\)",
    ),
}


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_every_schedule_shows_the_fault_of_a_ring(fault: str) -> None:
    edits, message = RING_FAULTS[fault]
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            run_ring(seed, edits)


def test_a_deadlock_lists_every_partition() -> None:
    with pytest.raises(Deadlock) as found:
        run_ring(0, RING_FAULTS["three arrivals"][0], stages=1)
    assert re.sub(r" at \w+.py:\d+", "", str(found.value)).splitlines() == [
        "deadlock, and no load is in flight",
        "partition 0 (_ring_consumer) waits for parity 1 of full[0]: phase 1, 1 of 1 arrivals and 0 bytes pending",
        "partition 1 (_ring_consumer) waits for parity 1 of full[0]: phase 1, 1 of 1 arrivals and 0 bytes pending",
        "partition 2 (_ring_producer) waits for parity 0 of empty[0]: phase 0, 1 of 3 arrivals and 0 bytes pending",
    ]


def test_a_seed_repeats_its_schedule() -> None:
    def message(seed: int) -> str:
        with pytest.raises(EmulationError) as found:
            run_ring(seed, {WAIT_EMPTY: "pass"})
        return str(found.value)

    messages = [message(seed) for seed in SEEDS]
    assert messages == [message(seed) for seed in SEEDS]
    assert len(set(messages)) > 1


@pytest.mark.parametrize("text", ["no such text", "stage = i % STAGES"])
def test_edits_apply_once(text: str) -> None:
    with pytest.raises(ValueError, match="each edit must apply exactly once, got"):
        run_ring(0, {text: text})


@gluon.jit
def _writer(buffer, bar):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    buffer.store(gl.full([N, N], 1.0, gl.float16, layout))
    fence_async_shared()
    mbarrier.arrive(bar, count=1)
    return 3, gl.program_id(0)


@gluon.jit
def _reader(buffer, bar, out_desc):
    mbarrier.wait(bar, 0)
    tma.async_store(out_desc, [0, 0], buffer)
    tma.store_wait(0)


@gluon.jit
def _handover(out_desc):
    """One partition writes a buffer, another one stores it by TMA."""
    buffer = gl.allocate_shared_memory(gl.float16, [N, N], out_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    three, program = gl.warp_specialize([(_writer, (buffer, bar)), (_reader, (buffer, bar, out_desc))], [4], [24])
    gl.device_assert(three + program == 3)


HANDOVERS = {
    "the writer's fence": {},
    "the reader's fence": {"fence_async_shared()": "pass", "mbarrier.wait(bar, 0)": "mbarrier.wait(bar, 0); fence_async_shared()"},
    "the name in Triton 3.6": {"tma.async_store(": "tma.async_copy_shared_to_global("},
}


@pytest.mark.parametrize("edits", HANDOVERS.values(), ids=HANDOVERS)
def test_a_buffer_is_handed_over(edits: dict[str, str]) -> None:
    for seed in SEEDS:
        out = torch.zeros(16, 16).half()
        run(_handover, (1,), {"out_desc": descriptor(out)}, seed=seed, edits=edits)
        assert (out == 1).all()


HANDOVER_FAULTS = {
    "no fence": ({"fence_async_shared()": "pass"}, "TMA store of buffer by .* needs a fence_async_shared after store of buffer by"),
    "early fence": (
        {"fence_async_shared()": "pass", "buffer.store(": "fence_async_shared(); buffer.store("},
        "TMA store of buffer by .* needs a fence_async_shared after store of buffer by",
    ),
    "no wait": ({"mbarrier.wait(bar, 0)": "pass"}, "store of buffer by .* is not ordered after (TMA )?store of buffer by"),
}


@pytest.mark.parametrize("fault", HANDOVER_FAULTS)
def test_every_schedule_shows_the_fault_of_a_handover(fault: str) -> None:
    edits, message = HANDOVER_FAULTS[fault]
    for seed in SEEDS:
        with pytest.raises(Race, match=message):
            run(_handover, (1,), {"out_desc": descriptor(torch.zeros(16, 16).half())}, seed=seed, edits=edits)
