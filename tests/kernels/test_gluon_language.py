"""Gluon's language in the emulator: integers, tensors and pointers, views of shared memory, and boxes of TMA."""

from __future__ import annotations

from dataclasses import replace

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
def _views(out_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    buffers = gl.allocate_shared_memory(gl.float16, [2, N, N], gl.NVMMASharedLayout(32, 16, 2))
    buffers.index(0).store(gl.full([N, N], 3.0, gl.float16, layout))
    buffers.index(1).slice(8, 8).store(gl.full([8, N], 4.0, gl.float16, layout))
    rows = gl.arange(0, N, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, 2 * N, layout=gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows[:, None] * 2 * N + columns[None, :], buffers.reshape([2 * N, N]).permute((1, 0)).load(layout))
    buffers._keep_alive()


def test_views_share_their_memory() -> None:
    out = torch.zeros(16, 32)
    run(_views, (1,), {"out_ptr": out})
    nan = float("nan")  # of what is never written
    torch.testing.assert_close(out, torch.tensor([3.0] * 16 + [nan] * 8 + [4.0] * 8).expand(16, -1), equal_nan=True)


ZEROS = "buffers.index(0).store(gl.zeros({}, layout))"
MISUSES = {
    "buffers.index(2).load(layout)": "buffers has 2 buffers, got index 2",
    ZEROS.format("[N, N], gl.float32"): r"buffers\[0\] holds \[16, 16\] torch.float16, got \[16, 16\] torch.float32",
    ZEROS.format("[N, 8], gl.float16"): r"buffers\[0\] holds \[16, 16\] torch.float16, got \[16, 8\] torch.float16",
    "gl.device_assert(gl.max(rows, 0) == N, 'rows')": "an assertion of the kernel failed: rows",
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_of_shared_memory(misuse: str) -> None:
    with pytest.raises(EmulationError, match=MISUSES[misuse]):
        run(_views, (1,), {"out_ptr": torch.zeros(16, 32)}, edits={"buffers._keep_alive()": misuse})


@gluon.jit
def _shift(x_desc, out_desc):
    """Each program copies a block one row down; blocks reach beyond the border."""
    y, x = gl.program_id(0) * N - 4, gl.program_id(1) * N - 4
    buffer = gl.allocate_shared_memory(x_desc.dtype, [N, N], x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_load(x_desc, [y, x], bar, buffer, pred=gl.num_programs(0) == 2)
    mbarrier.wait(bar, 0)
    mbarrier.invalidate(bar)
    gl.static_assert(x_desc.shape[0] == 20)
    tma.async_store(out_desc, [y + 1, x], buffer)
    tma.store_wait(pendings=0)


@pytest.mark.parametrize(("padding", "value"), [("zero", 0.0), ("nan", float("nan"))])
def test_tma_pads_loads_and_clips_stores(padding: str, value: float) -> None:
    x, out = blocks(20, 24), torch.full((20, 24), -1.0).half()
    run(_shift, (2, 2), {"x_desc": replace(descriptor(x), padding=padding), "out_desc": descriptor(out)})
    torch.testing.assert_close(out, torch.cat([torch.full((1, 24), value), x[:-1]]).half(), rtol=0, atol=0, equal_nan=True)


def test_a_box_is_as_large_as_its_buffer() -> None:
    x = blocks(20, 24)
    with pytest.raises(EmulationError, match=r"got \[16, 16\] torch.float16 and buffer of \[16, 32\] torch.float16"):
        run(_shift, (2, 2), {"x_desc": descriptor(x), "out_desc": descriptor(x)}, edits={"[N, N]": "[N, 2 * N]"})
