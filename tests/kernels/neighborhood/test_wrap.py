"""Windows that continue on the other side of the grid, against keys gathered modulo its size in fp64, and under cyclic shifts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.config import Problem as LaunchProblem
from scalediff_kernels.neighborhood.config import launch_config
from scalediff_kernels.neighborhood.geometry import PatchWindow, attention_flops, text_attention_flops, window_bytes, windows
from scalediff_kernels.testing import assert_within_budget, poisoned_memory
from tests.kernels.neighborhood.problems import CHOSEN, TARGETS, Problem, assert_right, draw, expected, run

Pair = tuple[int, int]
X, Y, BOTH = (False, True), (True, False), (True, True)


def test_patches_of_an_axis_that_wraps() -> None:
    assert windows(8, 4, 2, 1, wrap=True) == (
        PatchWindow(-1, 1, -2, 2),
        PatchWindow(1, 3, 0, 4),
        PatchWindow(3, 5, 2, 6),
        PatchWindow(5, 7, 4, 8),
    )
    assert windows(7, 4, 3, 0, wrap=True) == (PatchWindow(0, 3, -1, 3), PatchWindow(3, 6, 2, 6), PatchWindow(6, 7, 5, 9))
    assert windows(5, 9, 4, 3, wrap=True) == (PatchWindow(-3, 1, 0, 5), PatchWindow(1, 2, 0, 5)), "a window over the whole axis"


@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("window", [1, 4, 5, 16])
def test_every_token_is_a_query_once_and_every_window_is_full(length: int, window: int) -> None:
    for patch in range(1, window + 1):
        for offset in range(patch):
            spans = windows(length, window, patch, offset, wrap=True)
            assert sorted(t % length for span in spans for t in range(span.query_start, span.query_stop)) == list(range(length))
            assert {span.key_stop - span.key_start for span in spans} == {min(window, length)}
            rolled = windows(length, window, patch, 0, wrap=True)
            assert [s.query_start + offset for s in spans] == [s.query_start for s in rolled]
            if window < length:
                assert [(s.key_start + offset) % length for s in spans] == [s.key_start % length for s in rolled]


def test_flops_count_full_windows_and_each_window_once() -> None:
    arguments: dict[str, Any] = {"heads": 2, "head_dim": 8}
    assert attention_flops(grid=(8, 12), window=(8, 4), **arguments) == 4 * 2 * 8 * 8 * 12 * 8 * 4
    counted: dict[str, Any] = {"grid": (8, 12), "window": (8, 4), "patch": (8, 2), "offset": (0, 1), **arguments}
    of_text = text_attention_flops(**counted, text=5, rule="window", wrap=X)
    assert of_text == 4 * 2 * 8 * 5 * 6 * (8 * 4 + 5)
    assert text_attention_flops(**counted, text=5, rule="window") == of_text // 6 * 7, "without wrap the offset cuts one patch in two"
    assert window_bytes(**counted, itemsize=2, wrap=X) == 2 * 2 * 8 * 6 * 8 * 4 * 2


def gathered(q: Tensor, k: Tensor, v: Tensor, window: Pair, patch: Pair, offset: Pair, wrap: tuple[bool, bool]) -> Tensor:
    """The same said differently: every query by itself, over keys gathered by their coordinates modulo the size."""
    height, width, dim = q.shape[1], q.shape[2], q.shape[4]
    out = torch.empty_like(q)

    def keys_of(token: int, axis: int) -> list[int]:
        length, w, p, o = (height, width)[axis], window[axis], patch[axis], offset[axis]
        if w >= length:
            return list(range(length))
        if not wrap[axis]:
            start = (token + o) // p * p - o + p // 2 - w // 2
            start = max(0, min(start, length - w))
        else:
            start = (token + o) % length // p * p - o + p // 2 - w // 2
        return [(start + i) % length for i in range(w)]

    for y in range(height):
        for x in range(width):
            b_k, b_v = (one[:, keys_of(y, 0)][:, :, keys_of(x, 1)].flatten(1, 2) for one in (k, v))
            weights = torch.einsum("bhd,bkhd->bhk", q[:, y, x], b_k).mul(dim**-0.5).softmax(-1)
            out[:, y, x] = torch.einsum("bhk,bkhd->bhd", weights, b_v)
    return out


GEOMETRY = [
    ((8, 8), (4, 4), (2, 2), (0, 0), BOTH),
    ((8, 12), (4, 6), (2, 3), (1, 2), X),
    ((12, 4), (6, 4), (3, 2), (2, 1), Y),
    ((7, 11), (5, 6), (4, 5), (3, 4), BOTH),  # prime
    ((3, 13), (9, 5), (4, 2), (3, 1), BOTH),  # a window over the whole axis, whose patch is larger than it
    ((5, 5), (6, 7), (6, 5), (5, 4), BOTH),  # full attention
    ((1, 9), (1, 9), (1, 4), (0, 3), X),
]


def inputs(grid: Pair, dtype: torch.dtype, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *grid, 2, dim, generator=rng).to(dtype) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize(("grid", "window", "patch", "offset", "wrap"), GEOMETRY)
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_implementations_are_gathered_windows(impl: Any, grid: Pair, window: Pair, patch: Pair, offset: Pair, wrap: Any) -> None:
    q, k, v = inputs(grid, torch.float64)
    arguments: dict[str, Any] = {"window": window, "patch": patch, "offset": offset, "wrap": wrap}
    exact = gathered(q, k, v, **arguments)
    with poisoned_memory():
        out, lse = neighborhood_patch_attention(q, k, v, **arguments, impl=impl, return_lse=True)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-13)
    ones = neighborhood_patch_attention(q, k, torch.ones_like(v), **arguments, impl=impl)
    torch.testing.assert_close(ones, torch.ones_like(v), rtol=1e-12, atol=1e-13)
    if window[0] >= grid[0] and window[1] >= grid[1]:
        scores = torch.einsum("byxhd,bzwhd->byxhzw", q, k).flatten(4) * q.shape[-1] ** -0.5
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-13)
    low = [x.half() for x in (q, k, v)]
    out_low = neighborhood_patch_attention(*low, **arguments, impl=impl)
    assert_within_budget(out_low, gathered(*low, **arguments), gathered(*(x.double() for x in low), **arguments))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("offset", [(0, 0), (1, 2)])
def test_a_cyclic_shift_by_a_patch_shifts_the_result(impl: Any, offset: Pair) -> None:
    q, k, v = inputs((6, 12), torch.float64)
    text = [torch.randn(2, 5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    arguments: dict[str, Any] = {"window": (4, 6), "patch": (2, 3), "offset": offset, "wrap": BOTH, "impl": impl}
    image, of_text, lse = joint_neighborhood_patch_attention(q, k, v, *text, **arguments, return_lse=True)
    rolled = (x.roll((2, -3), (1, 2)) for x in (q, k, v))
    shifted = joint_neighborhood_patch_attention(*rolled, *text, **arguments, return_lse=True)
    assert of_text is not None
    assert shifted[1] is not None
    torch.testing.assert_close(shifted[0], image.roll((2, -3), (1, 2)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(shifted[1], of_text, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(shifted[2], lse.roll((2, -3), (1, 2)), rtol=1e-12, atol=1e-13)
    clamped = joint_neighborhood_patch_attention(q, k, v, *text, **{**arguments, "wrap": X})[0]
    assert not torch.allclose(clamped, image), "the axis Y must matter too"


def test_gradients_flow() -> None:
    q, k, v = (x[:1, :, :, :1, :2].requires_grad_() for x in inputs((3, 5), torch.float64))
    arguments: dict[str, Any] = {"window": (2, 4), "patch": (2, 2), "offset": (1, 1), "wrap": BOTH, "impl": "sdpa"}
    assert torch.autograd.gradcheck(lambda *qkv: neighborhood_patch_attention(*qkv, **arguments), (q, k, v))


def test_a_window_that_wraps_sees_nothing_else() -> None:
    q, k, v = inputs((4, 10), torch.float32)
    arguments: dict[str, Any] = {"window": (4, 4), "patch": (4, 2), "wrap": X}
    clean = neighborhood_patch_attention(q, k, v, **arguments, impl="sdpa")
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        x[:, :, 3:9] = float("nan")  # the window of columns 0 and 1 is 9, 0, 1, 2
    out = neighborhood_patch_attention(q, *poisoned, **arguments, impl="sdpa")
    assert torch.equal(out[:, :, :2], clean[:, :, :2])
    assert out[:, :, 2:].isnan().any()


@pytest.mark.parametrize("wrap", [True, (True,), (0, 1), "xy", None])
def test_a_bad_wrap_is_named(wrap: Any) -> None:
    q, k, v = inputs((4, 4), torch.float32)
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans \(Y, X\), got wrap="):
        neighborhood_patch_attention(q, k, v, window=(2, 2), patch=(2, 2), wrap=wrap)


def test_tables_have_a_row_for_each_patch_that_wraps() -> None:
    q, k, v = inputs((4, 4), torch.float32)
    text = torch.zeros(2, 3, 2, 8)
    table = torch.zeros(2, 3, 4)  # with offset 1 the axis X without wrap has three patches, and two with it
    arguments: dict[str, Any] = {"window": (4, 2), "patch": (2, 2), "offset": (0, 1), "text_rope": (table, table)}
    assert joint_neighborhood_patch_attention(q, k, v, text, text, text, **arguments)[0].shape == q.shape
    with pytest.raises(ValueError, match=r"= \(2, 2, 4\) with an even D, got \(2, 3, 4\)"):
        joint_neighborhood_patch_attention(q, k, v, text, text, text, **arguments, wrap=X)


# the kernel


def wrapped(problem: Problem, wrap: tuple[bool, bool]) -> Problem:
    return replace(problem, wrap=wrap)


SHAPES = [
    wrapped(CHOSEN[2], X),  # oblong
    wrapped(CHOSEN[3], BOTH),  # prime
    wrapped(CHOSEN[6], BOTH),  # full attention, in patches larger than the grid
    Problem((4, 6), (2, 4), (2, 2), (1, 1), 16, groups=1, text=5, rope=True, rule="window", layout="joint", dtype=torch.float16, wrap=BOTH),
    Problem((3, 9), (3, 5), (2, 4), (1, 3), 24, heads=1, groups=1, scale=-0.4, wrap=X),
]
MORE = [wrapped(problem, wrap) for problem in CHOSEN for wrap in (X, Y, BOTH)]


@pytest.fixture
def _needs_triton() -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")


@pytest.mark.usefixtures("_needs_triton")
@pytest.mark.parametrize("problem", SHAPES, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}-{p.wrap[0]:d}{p.wrap[1]:d}")
def test_the_kernel_keeps_the_error_budget(problem: Problem) -> None:
    assert_right(problem, TARGETS[0])


@pytest.mark.usefixtures("_needs_triton")
@pytest.mark.parametrize("seed", range(8))
def test_drawn_problems_keep_the_error_budget(seed: int) -> None:
    assert_right(wrapped(draw(seed, TARGETS[0], most_programs=12), (X, Y, BOTH)[seed % 3]), TARGETS[0])


@pytest.mark.slow
@pytest.mark.usefixtures("_needs_triton")
@pytest.mark.parametrize("problem", MORE, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}-{p.wrap[0]:d}{p.wrap[1]:d}")
def test_further_problems_keep_the_error_budget(problem: Problem) -> None:
    assert_right(problem, TARGETS[0])


@pytest.mark.slow
@pytest.mark.usefixtures("_needs_triton")
@pytest.mark.parametrize("block", range(3))
def test_many_drawn_problems_keep_the_error_budget(block: int) -> None:
    for seed in range(5000 + 30 * block, 5030 + 30 * block):
        assert_right(wrapped(draw(seed, TARGETS[0]), (X, Y, BOTH)[seed % 3]), TARGETS[0])


@pytest.mark.usefixtures("_needs_triton")
def test_the_kernel_has_the_log_sum_exp_of_windows_that_wrap() -> None:
    problem = Problem((5, 6), (3, 4), (2, 3), (1, 2), 16, wrap=BOTH)
    _, lse = run(problem, TARGETS[0], return_lse=True)
    q, k, v = problem.inputs()
    exact = neighborhood_patch_attention(q.double(), k.double(), v.double(), **problem.arguments, return_lse=True, impl="reference")[1]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    assert expected(problem, exact=True)[0].shape == q.shape


@pytest.mark.parametrize("device", ["sm_90", "sm_100", "sm_80"])
def test_windows_that_wrap_are_read_by_addresses(device: str) -> None:
    problem = LaunchProblem((256, 256), (64, 64), (32, 32), 128, 2, wrap=True)
    assert launch_config(problem, device).path == "pointer"
    for path in ("warp-specialised", "descriptor"):
        with pytest.raises(NotImplementedError, match=rf"path='{path}' does not support this problem on {device}, got .*wrap=True"):
            launch_config(problem, device, path)  # type: ignore[arg-type]
