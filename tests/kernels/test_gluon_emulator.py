"""The emulator of Gluon kernels: right kernels give right values under every schedule, and each error of synchronisation is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this platform")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels.gluon_emulator import run
from tests.kernels.gluon_machine import Deadlock, EmulationError, Race

N = gl.constexpr(16)  # blocks are N x N
load_by_alias = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def descriptor(tensor: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [16, 16], layout)


def blocks(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half()


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
        if FAULT != "no wait for the load":
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
    "no wait for the load": (EmulationError, r"load of ring\[0\] by partition . .* is not ordered after (TMA )?load|nobody has waited"),
    "early release": (Race, r"TMA load of ring.* is not ordered after load of ring|load of ring.* is not ordered after TMA load of ring"),
    "one arrival": (EmulationError, r"load of ring.* is not ordered after (TMA )?load of ring|empty.* nobody has waited for phase"),
    "three arrivals": (Deadlock, r"waits for parity 0 of empty\[0\]: phase 0, 1 of 3 arrivals and 0 bytes pending"),
    "two arrivals": (EmulationError, r"too many arrivals at empty\[.\]: phase ., 1 of 2|is not ordered after|nobody has waited"),
    "flipped phase": (Deadlock, r"waits for parity 0 of empty\[0\]: phase 0, 2 of 2 arrivals and 0 bytes pending"),
    "half of the bytes": (Deadlock, r"waits for parity 0 of full\[0\]: phase 0, 0 of 1 arrivals and -256 bytes pending"),
    "no bytes": (Deadlock, r"waits for parity 0 of full\[0\]: phase 0, 1 of 1 arrivals and -512 bytes pending"),
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


def test_a_deadlock_lists_every_partition() -> None:
    with pytest.raises(Deadlock) as found:
        ring(0, "three arrivals", stages=1)
    assert str(found.value).splitlines() == [
        "deadlock, and no load is in flight",
        "partition 0 (_ring_consumer) waits for parity 1 of full[0]: phase 1, 1 of 1 arrivals and 0 bytes pending",
        "partition 1 (_ring_consumer) waits for parity 1 of full[0]: phase 1, 1 of 1 arrivals and 0 bytes pending",
        "partition 2 (_ring_producer) waits for parity 0 of empty[0]: phase 0, 1 of 3 arrivals and 0 bytes pending",
    ]


# Products: w @ x of every block, added up by asynchronous products, turned into halves in shared memory and stored by TMA.


@gluon.jit
def _product_producer(x_desc, ring, full, empty, count):
    for i in range(count):
        mbarrier.wait(empty.index(i % 2), i // 2 & 1 ^ 1)
        mbarrier.expect(full.index(i % 2), x_desc.block_type.nbytes)
        tma.async_load(x_desc, [i * N, 0], full.index(i % 2), ring.index(i % 2))


@gluon.jit
def _product_consumer(w_ptr, out_desc, ring, result, full, empty, count, REGISTERS: gl.constexpr, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    offsets = gl.arange(0, N, gl.SliceLayout(1, layout))[:, None] * N + gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
    w = gl.load(w_ptr + offsets)
    if REGISTERS:
        a = gl.convert_layout(w, gl.DotOperandLayout(0, layout, 2))
    else:
        result.store(w)
        if FAULT != "no fence before a product":
            fence_async_shared()
        a = result
    acc = warpgroup_mma_init(gl.zeros([N, N], gl.float32, layout))
    for i in range(count):
        if FAULT != "no wait for the load":
            mbarrier.wait(full.index(i % 2), i // 2 & 1)
        acc = warpgroup_mma(a, ring.index(i % 2), acc, is_async=True)
        if FAULT != "early release":
            acc = warpgroup_mma_wait(1 if FAULT == "wait(1)" else 0, deps=[acc])
        if FAULT == "no wait for the product":
            acc = warpgroup_mma(a, ring.index(i % 2), acc, is_async=True)
        mbarrier.arrive(empty.index(i % 2), count=1)
    if FAULT == "early release":
        acc = warpgroup_mma_wait(0, deps=[acc])
    result.store((acc * 1.0).to(out_desc.dtype))
    if FAULT != "no fence before a TMA store":
        fence_async_shared()
    tma.async_store(out_desc, [0, 0], result)
    if FAULT == "overwritten store":
        result.store(w)
    if FAULT != "no wait for the TMA store":
        tma.store_wait(0)


@gluon.jit
def _product(x_desc, w_ptr, out_desc, count, REGISTERS: gl.constexpr, FAULT: gl.constexpr):
    ring = gl.allocate_shared_memory(x_desc.dtype, [2, N, N], x_desc.layout)
    result = gl.allocate_shared_memory(x_desc.dtype, [N, N], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_product_consumer, (w_ptr, out_desc, ring, result, full, empty, count, REGISTERS, FAULT)),
            (_product_producer, (x_desc, ring, full, empty, count)),
        ],
        [1],
        [24],
    )


def product(seed: int, fault: str = "", *, registers: bool = False) -> None:
    x, w, out = blocks(5 * 16, 16), blocks(16, 16), torch.full((16, 16), float("nan")).half()
    arguments = {"x_desc": descriptor(x), "w_ptr": w, "out_desc": descriptor(out), "count": 5, "REGISTERS": registers, "FAULT": fault}
    run(_product, (1,), arguments, seed=seed)
    torch.testing.assert_close(out, (w.float() @ x.float().unflatten(0, (5, 16)).sum(0)).half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("registers", [False, True])
def test_asynchronous_products(registers: bool) -> None:
    for seed in range(10):
        product(seed, registers=registers)


PRODUCT_FAULTS = {
    "no wait for the load": (EmulationError, r"product of ring\[0\] .* is not ordered after TMA load|nobody has waited"),
    "early release": (Race, r"TMA load of ring\[0\] .* is not ordered after product of ring\[0\] by partition 0 \(_product_consumer\)"),
    "wait(1)": (Race, r"TMA load of ring\[.\] .* is not ordered after product of ring\[.\]|an accumulator is used before a wait"),
    "no wait for the product": (EmulationError, r"TMA load of ring.*is not ordered after product|an accumulator is used before a wait"),
    "no fence before a product": (Race, r"product of result .* needs a fence_async_shared after store of result"),
    "no fence before a TMA store": (Race, r"TMA store of result .* needs a fence_async_shared after store of result"),
    "overwritten store": (Race, r"store of result .* is not ordered after TMA store of result"),
    "no wait for the TMA store": (EmulationError, r"partition 0 \(_product_consumer\) ends with 0 products and 1 TMA stores in flight"),
}


@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_faults_of_products_are_found_by_every_schedule(fault: str) -> None:
    error, message = PRODUCT_FAULTS[fault]
    for seed in range(10):
        with pytest.raises(error, match=message):
            product(seed, fault)


# Accumulators: each use that a wait must come before.


@gluon.jit
def _accumulator(out_ptr, USE: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    one = gl.full([N, N], 1.0, gl.float16, layout)
    operand = gl.allocate_shared_memory(gl.float16, [N, N], gl.NVMMASharedLayout(32, 16, 2), one)
    fence_async_shared()
    zero = gl.zeros([N, N], gl.float32, layout)
    first = warpgroup_mma(one, operand, zero, use_acc=False, is_async=True)
    second = warpgroup_mma(one, operand, first, is_async=True)  # products into the same accumulator keep their order
    if USE == "sum":
        gl.sum(first, 1)
    elif USE == "left":
        first * 2.0
    elif USE == "right":
        zero + first
    elif USE == "method":
        first.to(gl.float16)
    elif USE == "younger":
        first, second = warpgroup_mma_wait(1, deps=[first, second])
        gl.maximum(second, first)
    elif USE == "never":
        return
    second = warpgroup_mma_wait(0, deps=[second])
    third = warpgroup_mma(one, operand, second)
    gl.store(out_ptr, gl.max(gl.max(third, 1), 0))


def test_products_keep_their_order() -> None:
    out = torch.zeros(1)
    run(_accumulator, (1,), {"out_ptr": out, "USE": "none"})
    assert out.item() == 48


@pytest.mark.parametrize("use", ["sum", "left", "right", "method", "younger"])
def test_an_accumulator_is_of_no_use_before_its_wait(use: str) -> None:
    with pytest.raises(EmulationError, match="an accumulator is used before a wait has returned it complete"):
        run(_accumulator, (1,), {"out_ptr": torch.zeros(1), "USE": use})


def test_products_must_be_waited_for() -> None:
    with pytest.raises(EmulationError, match="the kernel ends with 2 products and 0 TMA stores in flight"):
        run(_accumulator, (1,), {"out_ptr": torch.zeros(1), "USE": "never"})


# TMA at the border, and the programs of a grid.


@gluon.jit
def _copy(x_desc, out_desc, WIDTH: gl.constexpr):
    y, x = gl.program_id(0) * N - 4, gl.program_id(1) * N - 4
    buffer = gl.allocate_shared_memory(x_desc.dtype, [N, WIDTH], x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_load(x_desc, [y, x], bar, buffer, pred=gl.num_programs(0) == 2)
    mbarrier.wait(bar, 0)
    mbarrier.invalidate(bar)
    gl.static_assert(x_desc.shape[0] == 20)
    tma.async_copy_shared_to_global(out_desc, [y + 1, x], buffer)
    tma.store_wait(pendings=0)


def test_tma_fills_with_zeros_and_clips() -> None:
    x, out = blocks(20, 24), torch.full((20, 24), float("nan")).half()
    run(_copy, (2, 2), {"x_desc": descriptor(x), "out_desc": descriptor(out), "WIDTH": 16}, seed=1)
    torch.testing.assert_close(out, torch.cat([torch.zeros(1, 24), x[:-1]]).half(), rtol=0, atol=0)


def test_a_box_is_as_large_as_its_buffer() -> None:
    x = blocks(20, 24)
    with pytest.raises(EmulationError, match=r"got \[16, 16\] torch.float16 and buffer of \[16, 32\] torch.float16"):
        run(_copy, (2, 2), {"x_desc": descriptor(x), "out_desc": descriptor(x), "WIDTH": 32})


# The language.


@gluon.jit
def _halves(a, b):
    return a // 2, b % 4


@gluon.jit(do_not_specialize=["n"])
def _language(x_ptr, out_ptr, n, OTHER: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs = gl.arange(0, N, layout)
    x = gl.load(x_ptr + offs, mask=offs < n, other=OTHER)
    x *= 2.0
    y = x
    y += 1.0  # another tensor: x stays
    pairs = gl.join(x, y).reshape([2 * N])
    even, odd = gl.split(pairs.reshape([N, 2]))
    gl.store(out_ptr + offs, even + odd, mask=offs < n)
    quotient, rest = _halves(n - 10, n - 10)
    first = gl.load(x_ptr)
    gl.store(out_ptr + N, gl.where(n < 10, quotient, 100))
    gl.store(out_ptr + N + 1, gl.minimum(rest, 7))
    gl.store(out_ptr + N + 2, gl.maximum(first, -1e3) / 2)
    gl.store(out_ptr + N + 3, gl.sum((offs - 8) // 3, 0) + gl.cdiv(n, 4))


def test_language() -> None:
    x, out = torch.arange(1.0, 6.0), torch.zeros(20)
    run(_language, (1,), {"x_ptr": x, "out_ptr": out, "n": 5, "OTHER": gl.constexpr(0.0)})
    # C divides towards zero: -5 // 2 == -2, -5 % 4 == -1
    assert out.tolist() == [5, 9, 13, 17, 21, *[0] * 11, -2, -1, 0.5, sum(int((i - 8) / 3) for i in range(16)) + 2]


def test_pointers_stay_inside_their_tensor() -> None:
    with pytest.raises(EmulationError, match="a pointer leaves its tensor of 4 elements, got offset 4"):
        run(_language, (1,), {"x_ptr": torch.ones(4), "out_ptr": torch.zeros(20), "n": 5, "OTHER": 0.0})


@gluon.jit
def _shared(MISUSE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    buffers = gl.allocate_shared_memory(gl.float16, [2, N, N], gl.NVMMASharedLayout(32, 16, 3))
    buffers.index(0).store(gl.full([N, N], 3.0, gl.float16, layout))
    buffers.index(1).slice(8, 8).store(gl.full([8, N], 4.0, gl.float16, layout))
    flat = buffers.reshape([2 * N, N]).permute((1, 0)).load(layout)
    gl.device_assert(flat[0, 0] == 3)
    gl.device_assert(flat[0, N] != flat[0, N], "shared memory starts as NaN")
    gl.device_assert(flat[0, 31] == 4)
    if MISUSE == "index":
        buffers.index(2).load(layout)
    elif MISUSE == "dtype":
        buffers.index(0).store(gl.zeros([N, N], gl.float32, layout))
    elif MISUSE == "shape":
        buffers.index(0).store(gl.zeros([N, 8], gl.float16, layout))
    elif MISUSE == "assertion":
        gl.device_assert(flat[0, 0] == 4, "four")
    buffers._keep_alive()


def test_views_share_their_memory() -> None:
    run(_shared, (1,), {"MISUSE": "none"})


MISUSES = {
    "index": r"buffers has 2 buffers, got index 2",
    "dtype": r"buffers\[0\] holds \[16, 16\] torch.float16, got \[16, 16\] torch.float32",
    "shape": r"buffers\[0\] holds \[16, 16\] torch.float16, got \[16, 8\] torch.float16",
    "assertion": "an assertion of the kernel failed: four",
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_of_shared_memory(misuse: str) -> None:
    with pytest.raises(EmulationError, match=MISUSES[misuse]):
        run(_shared, (1,), {"MISUSE": misuse})


# Partitions that share a buffer without TMA: ordinary accesses are ordered by barriers alone, and a fence may stand on either side.


@gluon.jit
def _writer(buffer, bar, FENCE: gl.constexpr, ORDERED: gl.constexpr):
    buffer.store(gl.full([N, N], 1.0, gl.float16))
    if FENCE == "writer":
        fence_async_shared()
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
    "no warps": (lambda seed: handover(seed, "writer", workers=2), "warp_specialize of 1 workers"),
}


@pytest.mark.parametrize("fault", FAULTY_HANDOVERS)
def test_faulty_handovers_are_found_by_every_schedule(fault: str) -> None:
    faulty, message = FAULTY_HANDOVERS[fault]
    for seed in range(10):
        with pytest.raises(EmulationError, match=message):
            faulty(seed)
