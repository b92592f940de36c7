"""Sequences whose text and image arrive in parts, as Ulysses attention gathers them, against the same tokens in one piece.

Legend: B batch, S tokens of a sequence, H heads, D head dim, Y x X token grid.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff import AttentionPlan, Layout, Sequence, TextRotation
from scalediff.families.grid import split_sizes

GRID, WINDOW = (8, 6), (4, 4)
ROTATION = TextRotation((4, 4, 4), 10000.0)


def arrival(sequence: Sequence, *, keys: bool = True) -> Tensor:
    """Indices of the tokens `[text, image]` or `[image, text]` in the order in which their parts arrive."""
    if not keys and sequence.queries == "image":
        return torch.arange(sequence.area)
    text, image = torch.arange(sequence.text), torch.arange(sequence.area)
    first, second = (text, image + sequence.text) if sequence.side == "prefix" else (image, text + sequence.area)
    parts = zip(first.tensor_split(sequence.shards), second.tensor_split(sequence.shards), strict=True)
    return torch.cat(list(chain.from_iterable(parts)))


def drawn(sequence: Sequence, *, heads: int = 3, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    queries, keys = sequence.lengths
    q, k, v = (torch.randn(batch, n, heads, 12, dtype=torch.float64, generator=rng) for n in (queries, keys, keys))
    return q, k, v


def both(sequence: Sequence, *, weights: Tensor | None = None, masked: bool = False, **options: Any) -> tuple[Tensor | None, Tensor | None]:
    """A call whose tokens arrive in parts, put back into one piece; and the same call of tokens in one piece."""
    layout = Layout(GRID, (sequence,), masked=masked, weights=weights)
    whole = replace(layout, sequences=(replace(sequence, shards=1),))
    rotation = ROTATION if sequence.level == 0 else None
    plans = [AttentionPlan(one, window=WINDOW, text_rope=rotation, **options) for one in (layout, whole)]
    q, k, v = drawn(sequence)
    of_queries, of_keys = arrival(sequence, keys=False), arrival(sequence)
    mask = torch.zeros(2, 1, 1, k.shape[1], dtype=torch.bool) if sequence.real else None  # padding needs one, which `real` replaces
    out = plans[0](q[:, of_queries], k[:, of_keys], v[:, of_keys], mask=mask)
    return None if out is None else out[:, of_queries.argsort()], plans[1](q, k, v, mask=mask)


CASES = {
    "text before": Sequence(GRID, text=6, shards=2),
    "text after": Sequence(GRID, side="suffix", text=6, shards=2),
    "four parts": Sequence(GRID, text=8, shards=4),
    "uneven text": Sequence(GRID, text=5, shards=2),
    "uneven text and image": Sequence((9, 7), side="suffix", text=11, shards=4),
    "less text than parts": Sequence(GRID, text=2, shards=3),
    "keys only": Sequence(GRID, text=6, queries="image", shards=2),
    "keys only, after": Sequence(GRID, side="suffix", text=6, queries="image", shards=3),
    "no text": Sequence(GRID, shards=2),
    "padding": Sequence(GRID, text=6, real=(6, 3), shards=2),
    "padding after": Sequence(GRID, side="suffix", text=6, real=(2, 5), shards=2),
    "no real text": Sequence(GRID, text=6, real=(0, 6), shards=2),
    "a lower level": Sequence((4, 3), level=1, text=6, shards=2),
}


@pytest.mark.parametrize("text_queries", ["window", "global"])
@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_one_piece_gives(name: str, text_queries: str) -> None:
    sequence = CASES[name]
    out, expected = both(sequence, masked=True, text_queries=text_queries)
    assert out is not None
    assert expected is not None
    assert torch.equal(out, expected)


def test_the_order_of_the_parts_matters() -> None:
    """Without `shards` the interleaved tokens would be taken for a picture."""
    sequence = CASES["text before"]
    q, k, v = (x[:, arrival(sequence)] for x in drawn(sequence))
    right, wrong = (AttentionPlan(Layout(GRID, (one,)), window=WINDOW)(q, k, v) for one in (sequence, replace(sequence, shards=1)))
    assert right is not None
    assert wrong is not None
    assert (right - wrong).abs().max() > 0.1


def test_masks_arrive_in_parts_and_weights_in_one_piece() -> None:
    sequence = Sequence(GRID, text=6, shards=2)
    layout, order = Layout(GRID, (sequence,)), arrival(sequence)
    whole = replace(layout, sequences=(replace(sequence, shards=1),))
    q, k, v = drawn(sequence)
    mask = torch.ones(2, 1, 1, q.shape[1], dtype=torch.bool)
    mask[0, ..., 1], mask[1, ..., 3:6] = False, False
    expected = AttentionPlan(whole, window=WINDOW)(q, k, v, mask=mask)
    out = AttentionPlan(layout, window=WINDOW)(q[:, order], k[:, order], v[:, order], mask=mask[..., order])
    assert torch.equal(out[:, order.argsort()], expected)  # type: ignore[index, arg-type]
    assert not torch.equal(expected, AttentionPlan(whole, window=WINDOW)(q, k, v))  # type: ignore[arg-type]

    weights = torch.rand(2, q.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, expected = both(sequence, weights=weights, masked=True)
    assert torch.equal(out, expected)  # type: ignore[arg-type]
    assert not torch.equal(out, both(sequence, masked=True)[0])  # type: ignore[arg-type]


def test_gradients_flow_through_the_parts() -> None:
    sequence = CASES["uneven text"]
    layout, order = Layout(GRID, (sequence,)), arrival(sequence)
    whole = replace(layout, sequences=(replace(sequence, shards=1),))
    inputs = [x.requires_grad_() for x in drawn(sequence)]
    target = drawn(sequence)[1].square()
    out = AttentionPlan(layout, window=WINDOW, text_rope=ROTATION)(*(x[:, order] for x in inputs))
    gradients = torch.autograd.grad((out * target[:, order]).sum(), inputs)  # type: ignore[operator]
    expected = torch.autograd.grad((AttentionPlan(whole, window=WINDOW, text_rope=ROTATION)(*inputs) * target).sum(), inputs)  # type: ignore[operator]
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_parts_are_constants_in_a_compiled_graph() -> None:
    """Also where the compiler takes the number of tokens for a symbol."""
    call, shapes = AttentionPlan(Layout(GRID, (CASES["uneven text"],)), window=WINDOW).calls[0], list[torch.Size]()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "call_function"]
        shapes.extend(value.shape for value in values if isinstance(value, Tensor))
        return graph

    x = drawn(CASES["uneven text"])[0]
    out = torch.compile(call.as_it_arrives, backend=backend, fullgraph=True, dynamic=True)(x)
    assert torch.equal(out, x[:, arrival(CASES["uneven text"])])
    assert shapes
    assert all(type(shape[1]) is int for shape in shapes)


def test_parts_are_those_of_tensor_split() -> None:
    for tokens, shards in ((6, 2), (7, 2), (3, 4), (64, 3)):
        assert split_sizes(tokens, shards) == tuple(len(part) for part in torch.arange(tokens).tensor_split(shards))


def test_what_cannot_have_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="shards must be at least 1, got shards=0"):
        Sequence(GRID, shards=0)
    with pytest.raises(TypeError):
        Sequence(GRID, shards=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a ragged sequence has its padding at the end and must have one shard, got shards=2"):
        Sequence(GRID, text=6, real=(4, 6), ragged=True, shards=2)
