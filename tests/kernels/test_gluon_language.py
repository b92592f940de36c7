"""Gluon's language in the emulator: integers, tensors and pointers, views of shared memory, and boxes of TMA."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tests.kernels.gluon_blocks import N, blocks, descriptor
from tests.kernels.gluon_emulator import run
from tests.kernels.gluon_machine import EmulationError


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
