"""`AttentionPlan`: the windows of one pass without a model, and what it leaves to its caller."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff import AttentionPlan, Layout, Sequence, TextRotation
from tests.conftest import seeded
from tests.scalediff.families.test_families import allowed

GRID, WINDOW, TEXT, HEADS, DIM = (10, 6), (4, 4), 5, 4, 16
AREA = GRID[0] * GRID[1]
IMAGE = Layout(GRID, (Sequence(GRID),))
SDPA = F.scaled_dot_product_attention


def drawn(tokens: int, heads: int = HEADS, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, heads, DIM, generator=seeded(seed), dtype=torch.float64)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return SDPA(q, k, v, mask, **options).transpose(1, 2)


def mask_of(side: str, text: int = TEXT, grid: tuple[int, int] = GRID) -> Tensor:
    area = grid[0] * grid[1]
    mask = torch.ones(text + area, text + area, dtype=torch.bool)
    image = slice(text, None) if side == "prefix" else slice(0, area)
    mask[image, image] = allowed(grid, WINDOW, (2, 2))
    return mask


def plan_of(side: Any = "prefix", **options: Any) -> AttentionPlan:
    layout = Layout(GRID, (Sequence(GRID, side=side, text=TEXT), Sequence(GRID)), others=(7,))
    return AttentionPlan(layout, window=WINDOW, text_queries="global", **options)


def close(out: Tensor | None, expected: Tensor) -> None:
    assert out is not None
    assert (out - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("side", ["prefix", "suffix"])
def test_text_and_image_in_one_softmax(side: str) -> None:
    plan, (q, k, v) = plan_of(side), (drawn(TEXT + AREA, seed=seed) for seed in range(3))
    close(plan(q, k, v, scale=0.3), by_hand(q, k, v, mask_of(side), scale=0.3))
    assert plan.why == ""


def test_the_image_alone_and_text_among_the_keys_only() -> None:
    q, k, v = (drawn(AREA, seed=seed) for seed in range(3))
    close(plan_of()(q, k, v), by_hand(q, k, v, mask_of("prefix", 0)))
    plan = AttentionPlan(Layout(GRID, (Sequence(GRID, text=TEXT, queries="image"),)), window=WINDOW)
    k, v = drawn(TEXT + AREA, seed=4), drawn(TEXT + AREA, seed=5)
    close(plan(q, k, v), by_hand(q, k, v, mask_of("prefix")[TEXT:]))


@pytest.mark.parametrize("shape", ["one head", "grouped", "one key head", "one sample"])
def test_keys_are_broadcast_as_torch_does(shape: str) -> None:
    q, k, v = (drawn(TEXT + AREA, seed=seed) for seed in range(3))
    options: dict[str, Any] = {}
    if shape == "grouped":
        k, v, options = k[:, :, :2], v[:, :, :2], {"enable_gqa": True}
    elif shape == "one sample":
        k, v = k[:1], v[:1]
    else:
        k, v = k[:, :, :1], v[:, :, :1] if shape == "one head" else v
    close(plan_of()(q, k, v, **options), by_hand(q, k, v, mask_of("prefix"), **options))


def test_a_mask_of_the_keys() -> None:
    q, k, v = (drawn(TEXT + AREA, seed=seed) for seed in range(3))
    keys = torch.ones(2, 1, 1, TEXT + AREA, dtype=torch.bool)
    keys[1, ..., 3:TEXT] = False
    close(plan_of()(q, k, v, mask=keys), by_hand(q, k, v, mask_of("prefix") & keys))
    close(plan_of()(q, k, v, mask=torch.ones_like(keys)), by_hand(q, k, v, mask_of("prefix")))


def test_score_weights_are_those_of_the_layout() -> None:
    q, k, v = (drawn(TEXT + AREA, seed=seed) for seed in range(3))
    weights = torch.rand(2, TEXT + AREA, generator=seeded(9), dtype=torch.float64)
    plan = AttentionPlan(Layout(GRID, (Sequence(GRID, text=TEXT),), weights=weights), window=WINDOW, text_queries="global")
    bias = (weights[:, None, :, None] * weights[:, None, None, :]).masked_fill(~mask_of("prefix"), -torch.inf)
    close(plan(q, k, v), by_hand(q, k, v, bias))


def test_levels_and_offsets() -> None:
    """A level has half the window; an offset is a fraction of a patch."""
    layout = Layout(GRID, tuple(Sequence(grid, level) for level, grid in enumerate([GRID, (5, 3)])))
    plan = AttentionPlan(layout, window=WINDOW, offset=(0.5, 0.0))
    assert [(call.window, call.patch, call.offset) for call in plan.calls] == [((4, 4), (2, 2), (1, 0)), ((2, 2), (1, 1), (0, 0))]
    q, k, v = (drawn(15, seed=seed) for seed in range(3))
    close(plan(q, k, v), by_hand(q, k, v, allowed((5, 3), (2, 2), (1, 1))))


def test_rotary_tables_follow_the_device_and_dtype() -> None:
    rotation = TextRotation(axes=(4, 6, 6), theta=10000.0)
    q, k, v = (drawn(TEXT + AREA, seed=seed) for seed in range(3))
    plan, moved = plan_of(text_rope=rotation), plan_of(text_rope=rotation).to("cpu", torch.float32)
    out, single = plan(q, k, v), plan(q.float(), k.float(), v.float())
    again = moved(q.float(), k.float(), v.float())
    assert out is not None
    assert single is not None
    assert again is not None
    assert torch.equal(single, again)
    assert (single - out).abs().max() < 1e-5
    assert not torch.allclose(out, plan_of()(q, k, v))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "options", "why"),
    [
        ((TEXT + AREA, 7), {}, "65 queries and 7 keys are not the tokens of 10 x 6"),
        ((64, 64), {}, "q, k and v must have the tokens of 10 x 6, got 64, 64"),
        ((AREA, AREA), {"is_causal": True}, "causal attention is not supported"),
        ((AREA, AREA), {"mask": torch.eye(AREA)}, "this attention mask is not supported, got (60, 60) of torch.float32"),
    ],
)
def test_calls_that_are_left_to_the_caller(lengths: tuple[int, int], options: dict[str, Any], why: str) -> None:
    plan = plan_of()
    assert plan(drawn(lengths[0]), drawn(lengths[1]), drawn(lengths[1]), **options) is None
    assert plan.why == why
    assert plan(drawn(AREA), drawn(AREA), drawn(AREA)) is not None
    assert plan.why == ""


def test_keys_and_values_that_do_not_fit() -> None:
    plan = plan_of()
    assert plan(drawn(AREA), drawn(AREA, heads=3), drawn(AREA, heads=3)) is None
    assert plan.why.startswith("q, k and v must have the same shape except for their lengths, got (2, 60, 4, 16)")
    assert plan(drawn(AREA)[0], drawn(AREA)[0], drawn(AREA)[0]) is None
    assert plan.why.startswith("q, k and v must be [B, S, H, D], got (60, 4, 16)")


@pytest.mark.parametrize("dim", [8, 32])
def test_rotary_positions_of_other_heads(dim: int) -> None:
    plan = plan_of(text_rope=TextRotation((4, 6, 6), 10000.0))
    q = torch.randn(2, TEXT + AREA, HEADS, dim, generator=seeded(0))
    assert plan(q, q, q) is None
    assert plan.why.startswith("text_rope rotates heads of 16 channels: pass dim= if the others are not rotated, got")
    if dim > 16:
        assert plan_of(text_rope=TextRotation((4, 6, 6), 10000.0, dim=dim))(q, q, q) is not None


def test_rotary_tables_keep_their_precision_and_have_gradients() -> None:
    """A first call in fp32, or in inference mode, leaves nothing behind that a later call in fp64, or with gradients, cannot use."""
    rotation = TextRotation(axes=(4, 6, 6), theta=10000.0)
    q = drawn(TEXT + AREA)
    with torch.inference_mode():
        plan = plan_of(text_rope=rotation)
        plan(q.float(), q.float(), q.float())
    with_gradients = q.float().requires_grad_()
    out = plan(with_gradients, with_gradients, with_gradients)
    assert out is not None
    out.sum().backward()
    assert with_gradients.grad is not None
    assert torch.equal(plan(q, q, q), plan_of(text_rope=rotation)(q, q, q))  # type: ignore[arg-type]


def test_nothing_is_computed_at_native_size() -> None:
    plan = AttentionPlan(Layout((8, 2), (Sequence((8, 2)),)), window=WINDOW)
    assert plan.is_native
    assert plan(drawn(16), drawn(16), drawn(16)) is None
    assert plan.why == "the grid is not larger than the window"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttentionPlan((4, 4), window=WINDOW), TypeError, "layout must be a Layout, got layout=(4, 4)"),
        (lambda: AttentionPlan(IMAGE, window=(4, 0)), ValueError, "window must be two positive integers (Y, X) in tokens"),
        (lambda: AttentionPlan(IMAGE, window=4), TypeError, "window must be two positive integers (Y, X) in tokens, got window=4"),
        (lambda: plan_of(offset=(0.5, 1.0)), ValueError, "offset must be two fractions of a patch (Y, X) in [0, 1), got offset=(0.5, 1.0)"),
        (lambda: plan_of(text_rope=True), TypeError, "text_rope must be a TextRotation, got text_rope=True"),
        (lambda: Layout((4, 0), ()), ValueError, "grid must be two positive integers (Y, X) in tokens, got grid=(4, 0)"),
        (lambda: Layout((4, 4, 4), ()), ValueError, "grid must be two positive integers (Y, X) in tokens, got grid=(4, 4, 4)"),
        (lambda: Layout(GRID, ((4, 4),)), TypeError, "sequences must be a tuple of Sequence, got sequences=((4, 4),)"),
        (lambda: Layout(GRID, Sequence(GRID)), TypeError, "sequences must be a tuple of Sequence, got sequences=Sequence(grid=(10, 6)"),
        (lambda: Layout(GRID, ()), ValueError, "sequences must have at least one Sequence, got sequences=()"),
        (lambda: Layout(GRID, (Sequence(GRID),), others=7), TypeError, "others must be a tuple of integers, got others=7"),
        (lambda: Layout(GRID, (Sequence(GRID),), others=(-7,)), ValueError, "others must not be negative, got others=-7"),
        (
            lambda: Layout(GRID, (Sequence(GRID), Sequence((5, 3)))),
            ValueError,
            "a sequence at level=0 must have the layout's grid (10, 6), halved 0 times, got grid=(5, 3)",
        ),
        (lambda: Sequence(4), TypeError, "grid must be two positive integers (Y, X) in tokens, got grid=4"),
        (lambda: Sequence((4.0, 4)), TypeError, "grid must be two positive integers (Y, X) in tokens, got grid=(4.0, 4)"),
        (lambda: Sequence(GRID, text=4.0), TypeError, "text must be an integer, got text=4.0"),
        (lambda: Sequence(GRID, text=4, real=(2.0,)), TypeError, "real must be an integer, got real=2.0"),
        (lambda: TextRotation(16, 1e4), TypeError, "axes must be a tuple of integers, got axes=16"),
        (lambda: TextRotation((5, 5, 6), 1e4), ValueError, "axes must be even numbers of channels, got axes=(5, 5, 6)"),
        (
            lambda: TextRotation((8, 8), 1e4),
            ValueError,
            "y and x must be the indices of two of the 2 axes, those of rows and columns, got y=1, x=2",
        ),
        (lambda: TextRotation((8, 8), 1e4, y=0, x="1"), TypeError, "x must be an integer, got x='1'"),
        (lambda: TextRotation((4, 6, 6), "1e4"), TypeError, "theta must be a number, got theta='1e4'"),
        (lambda: TextRotation((4, 6, 6), 0), ValueError, "theta must be positive, got theta=0"),
        (lambda: TextRotation((4, 6, 6), 1e4, dim=8), ValueError, "dim must be even and at least the sum of axes, 16, got dim=8"),
        (lambda: TextRotation((4, 6, 6), 1e4, shift=1), TypeError, "shift must be a function, got shift=1"),
        (lambda: Sequence(GRID, text=-1), ValueError, "text must not be negative, got text=-1"),
        (lambda: Sequence(GRID, level=-1), ValueError, "level must not be negative, got level=-1"),
        (lambda: Sequence(GRID, side="left"), ValueError, "side must be one of prefix, suffix, got side='left'"),
        (lambda: Sequence(GRID, queries="text"), ValueError, "queries must be one of all, image, got queries='text'"),
        (lambda: Sequence(GRID, text=4, real=(5,)), ValueError, "real must be numbers of text tokens from 0 to text=4, got real=(5,)"),
    ],
)
def test_wrong_descriptions(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_lists_make_a_layout() -> None:
    layout = Layout(list(GRID), [Sequence(list(GRID), text=4, real=[3, 4])], others=[7])  # type: ignore[arg-type]
    assert hash(layout) == hash(Layout(GRID, (Sequence(GRID, text=4, real=(3, 4)),), others=(7,)))
    assert hash(TextRotation([4, 6, 6], 1e4)) == hash(TextRotation((4, 6, 6), 1e4))  # type: ignore[arg-type]


def test_integers_of_other_kinds_make_a_grid() -> None:
    assert Layout((torch.tensor(10), torch.tensor(6)), IMAGE.sequences).grid == GRID  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Layout((10.0, 6.0), ())  # type: ignore[arg-type]


def test_a_plan_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    plan, (q, k, v) = plan_of(), (drawn(TEXT + AREA, seed=seed) for seed in range(3))
    expected = plan(q, k, v)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plan(q, k, v)
        return q if out is None else out

    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(q, k, v), expected)
    torch._dynamo.reset()
