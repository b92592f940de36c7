"""Asynchronous products in the emulator of Gluon kernels: their values, and each error in waiting for them."""

from __future__ import annotations

import pytest
import torch

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

from tests.kernels.gluon_blocks import N, blocks, descriptor
from tests.kernels.gluon_emulator import run
from tests.kernels.gluon_machine import EmulationError

SEEDS = range(10)


@gluon.jit
def _producer(x_desc, ring, full, empty, count):
    for i in range(count):
        mbarrier.wait(empty.index(i % 2), i // 2 & 1 ^ 1)
        mbarrier.expect(full.index(i % 2), x_desc.block_type.nbytes)
        tma.async_load(x_desc, [i * N, 0], full.index(i % 2), ring.index(i % 2))


@gluon.jit
def _consumer(w_ptr, out_desc, ring, buffer, full, empty, count):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    offsets = gl.arange(0, N, gl.SliceLayout(1, layout))[:, None] * N + gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
    w = gl.load(w_ptr + offsets)
    buffer.store(w)
    fence_async_shared()
    acc = warpgroup_mma_init(gl.zeros([N, N], gl.float32, layout))
    for i in range(count):
        mbarrier.wait(full.index(i % 2), i // 2 & 1)
        acc = warpgroup_mma(buffer, ring.index(i % 2), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(i % 2), count=1)
    acc *= 2.0
    buffer.store(acc.to(out_desc.dtype))
    fence_async_shared()  # before the store
    tma.async_store(out_desc, [0, 0], buffer)
    tma.store_wait(0)


@gluon.jit
def _sum_of_products(x_desc, w_ptr, out_desc, count):
    """Twice the sum of w @ x over the blocks of x."""
    ring = gl.allocate_shared_memory(x_desc.dtype, [2, N, N], x_desc.layout)
    buffer = gl.allocate_shared_memory(x_desc.dtype, [N, N], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [(_consumer, (w_ptr, out_desc, ring, buffer, full, empty, count)), (_producer, (x_desc, ring, full, empty, count))], [1], [24]
    )


def run_products(seed: int, edits: dict[str, str]) -> None:
    x, w, out = blocks(5 * 16, 16), blocks(16, 16), torch.full((16, 16), float("nan")).half()
    arguments = {"x_desc": descriptor(x), "w_ptr": w, "out_desc": descriptor(out), "count": 5}
    run(_sum_of_products, (1,), arguments, seed=seed, edits=edits)
    torch.testing.assert_close(out, (2 * w.float() @ x.float().unflatten(0, (5, 16)).sum(0)).half())


PRODUCT = "acc = warpgroup_mma(buffer, ring.index(i % 2), acc, is_async=True)"
WAIT, ARRIVE = "acc = warpgroup_mma_wait(0, deps=[acc])", "mbarrier.arrive(empty.index(i % 2), count=1)"
OPERAND_FENCE, STORE_FENCE = "buffer.store(w)\n    fence_async_shared()", "fence_async_shared()  # before the store"

PRODUCTS = {
    "two buffers": {},
    "registers": {PRODUCT: PRODUCT.replace("buffer", "gl.convert_layout(w, gl.DotOperandLayout(0, layout, 2))")},
    "synchronous": {PRODUCT: PRODUCT.replace("True", "False"), WAIT: "pass"},
}


@pytest.mark.parametrize("edits", PRODUCTS.values(), ids=PRODUCTS)
def test_products_of_every_schedule_are_right(edits: dict[str, str]) -> None:
    for seed in SEEDS:
        run_products(seed, edits)


OVERWRITTEN = r"TMA load of ring\[.\] by .* is not ordered after product of ring\[.\] by partition 0 \(_consumer\)"
NO_FENCE = r"{} of buffer by .* needs a fence_async_shared after store of buffer"
USED_EARLY = "an accumulator is used before the wait for its product"

PRODUCT_FAULTS = {
    "no wait for the load": (
        {"mbarrier.wait(full.index(i % 2), i // 2 & 1)": "pass"},
        r"(product|TMA load) of ring.* is not ordered after (product|TMA load) of ring|before anyone has waited",
    ),
    "early release": ({f"{WAIT}\n        {ARRIVE}": f"{ARRIVE}\n        {WAIT}"}, OVERWRITTEN),
    "wait(1)": ({WAIT: WAIT.replace("0", "1")}, f"{OVERWRITTEN}|{USED_EARLY}"),
    "no wait": ({WAIT: "pass"}, f"{OVERWRITTEN}|{USED_EARLY}"),
    "no fence before a product": ({OPERAND_FENCE: "buffer.store(w)"}, NO_FENCE.format("product")),
    "no fence before a TMA store": ({STORE_FENCE: "pass"}, NO_FENCE.format("TMA store")),
    "overwritten operand": ({PRODUCT: f"{PRODUCT}; buffer.store(w)"}, "store of buffer by .* is not ordered after product of buffer"),
    "overwritten store": ({"tma.store_wait(0)": "buffer.store(w)"}, "store of buffer by .* is not ordered after TMA store of buffer"),
    "no wait for the TMA store": ({"tma.store_wait(0)": "pass"}, "partition 0 .* ends with 0 products and 1 TMA stores in flight"),
    "product at the end": ({STORE_FENCE: f"fence_async_shared(); {PRODUCT}"}, "partition 0 .* ends with 1 products and 0 TMA stores"),
    "two dtypes": (
        {PRODUCT: PRODUCT.replace("buffer", "w.to(gl.float32)")},
        "the operands of a product have two dtypes, got torch.float32 and torch.float16",
    ),
}


@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_every_schedule_shows_the_fault_of_a_product(fault: str) -> None:
    edits, message = PRODUCT_FAULTS[fault]
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            run_products(seed, edits)


@gluon.jit
def _chain(out_ptr):
    """Two products in flight, into the same accumulator: they keep their order."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    one = gl.full([N, N], 1.0, gl.float16, layout)
    operand = gl.allocate_shared_memory(gl.float16, [N, N], gl.NVMMASharedLayout(32, 16, 2), one)
    fence_async_shared()
    zero = gl.zeros([N, N], gl.float32, layout)
    first = warpgroup_mma(one, operand, zero, use_acc=False, is_async=True)
    second = warpgroup_mma(one, operand, first, is_async=True)
    first, second = warpgroup_mma_wait(0, deps=[first, second])
    gl.store(out_ptr, gl.max(gl.max(first * second, 1), 0))


def test_products_keep_their_order() -> None:
    out = torch.zeros(1)
    run(_chain, (1,), {"out_ptr": out})
    assert out.item() == 16 * 32


@pytest.mark.parametrize("use", ["gl.sum(first, 1)", "first * 2.0", "zero + first", "-first", "first.to(gl.float16)", "first[:, None]"])
def test_an_accumulator_is_of_no_use_before_its_wait(use: str) -> None:
    wait = "first, second = warpgroup_mma_wait(0, deps=[first, second])"
    with pytest.raises(EmulationError, match=USED_EARLY):
        run(_chain, (1,), {"out_ptr": torch.zeros(1)}, edits={wait: f"{use}; {wait}"})


def test_a_wait_returns_the_older_products_alone() -> None:
    edits = {"warpgroup_mma_wait(0,": "warpgroup_mma_wait(1,"}
    with pytest.raises(EmulationError, match=USED_EARLY):
        run(_chain, (1,), {"out_ptr": torch.zeros(1)}, edits=edits)
    out = torch.zeros(1)
    run(_chain, (1,), {"out_ptr": out}, edits=edits | {"first * second": "first * warpgroup_mma_wait(0, deps=[second])"})
    assert out.item() == 16 * 32
