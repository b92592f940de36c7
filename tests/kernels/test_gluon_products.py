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
from tests.kernels.gluon_machine import EmulationError, Race

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
    "no wait for the load": (EmulationError, r"(product|TMA load) of ring.* is not ordered after|before anyone has waited"),
    "early release": (Race, r"TMA load of ring\[0\] .* is not ordered after product of ring\[0\] by partition 0 \(_product_consumer\)"),
    "wait(1)": (
        Race,
        r"TMA load of ring\[.\] .* is not ordered after product of ring\[.\]|an accumulator is used that no wait has returned",
    ),
    "no wait for the product": (
        EmulationError,
        r"TMA load of ring.*is not ordered after product|an accumulator is used that no wait has returned",
    ),
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
    elif USE == "dtypes":
        warpgroup_mma(one.to(gl.float32), operand, zero)
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
    with pytest.raises(EmulationError, match="an accumulator is used that no wait has returned complete"):
        run(_accumulator, (1,), {"out_ptr": torch.zeros(1), "USE": use})


def test_operands_have_one_dtype() -> None:
    with pytest.raises(EmulationError, match=r"the operands of a product have two dtypes, got torch\.float32 and torch\.float16"):
        run(_accumulator, (1,), {"out_ptr": torch.zeros(1), "USE": "dtypes"})


def test_products_must_be_waited_for() -> None:
    with pytest.raises(EmulationError, match="the kernel ends with 2 products and 0 TMA stores in flight"):
        run(_accumulator, (1,), {"out_ptr": torch.zeros(1), "USE": "never"})
