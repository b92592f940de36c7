"""A token grid whose rows are shared out among ranks: who has which rows, who needs which, and the bytes that move. No torch.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from scalediff_kernels.neighborhood.geometry import PatchWindow, windows


class Rows(NamedTuple):
    """Rows `[start, stop)` of the whole grid."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Section(NamedTuple):
    """Rows of a rank that one call of the operation computes.

    Attributes:
        queries: The rows.
        keys: The rows of the keys that they attend to: one slab, from the first window to the last.
        patches: Rows of patches `[start, stop)`, counted on the whole grid.
        offset: Shift of the patch grid towards the first query, in rows.
        counted: Whether text queries attend to the windows of this section. A patch that two ranks share belongs to the first of them.
    """

    queries: Rows
    keys: Rows
    patches: Rows
    offset: int
    counted: bool


class Transfer(NamedTuple):
    """Rows of keys and values that one rank sends to another."""

    source: int
    target: int
    rows: Rows


def split_rows(rows: int, ranks: int) -> tuple[int, ...]:
    """Numbers of rows of each rank, as `torch.tensor_split` does: equal, or the first ranks have one more.

    Raises:
        ValueError: There are fewer rows than ranks.
    """
    if not 1 <= ranks <= rows:
        raise ValueError(f"{ranks} ranks cannot share {rows} rows: every rank needs at least one")
    least, longer = divmod(rows, ranks)
    return tuple(least + (rank < longer) for rank in range(ranks))


@cache
def owned_rows(rows: tuple[int, ...]) -> tuple[Rows, ...]:
    """The rows of every rank, from their numbers.

    Raises:
        ValueError: A rank has no row.
    """
    if not rows or min(rows) < 1:
        raise ValueError(f"every rank needs at least one row, got {rows=}")
    stops = list(accumulate(rows))
    return tuple(Rows(stop - count, stop) for count, stop in zip(rows, stops, strict=True))


@cache
def sections(
    rows: tuple[int, ...], rank: int, window: int, patch: int, offset: int, *, by_window: bool = False
) -> tuple[tuple[Section, ...], tuple[Section, ...]]:
    """The sections of a rank: those that need no other rank's keys, and the others.

    In a section, windows that are clamped into its slab of keys are those of the whole grid: the slab ends where the grid ends wherever a
    window is clamped, and at the outermost windows elsewhere.

    Args:
        rows: Numbers of rows of all ranks.
        rank: The rank.
        window, patch, offset: As in `windows`, along the axis of rows.
        by_window: Whether a patch that begins in an earlier rank has a section of its own, which is not counted.

    Raises:
        ValueError: As `owned_rows` and `windows`.
    """
    own = owned_rows(rows)[rank]
    spans = windows(sum(rows), window, patch, offset)
    mine = [i for i, span in enumerate(spans) if span.query_stop > own.start and span.query_start < own.stop]
    inside = [i for i in mine if own.start <= spans[i].key_start and spans[i].key_stop <= own.stop]
    outside = [[i for i in mine if i < inside[0]], [i for i in mine if i > inside[-1]]] if inside else [mine]
    shared = by_window and spans[mine[0]].query_start < own.start

    def of(groups: Sequence[Sequence[int]]) -> tuple[Section, ...]:
        parts: list[Sequence[int]] = []
        for group in groups:
            parts += [group[:1], group[1:]] if shared and group[:1] == mine[:1] else [group]
        return tuple(_section(own, spans, part, patch, offset) for part in parts if part)

    return of([inside]), of(outside)


def _section(own: Rows, spans: tuple[PatchWindow, ...], patches: Sequence[int], patch: int, offset: int) -> Section:
    first, last = patches[0], patches[-1]
    start = max(spans[first].query_start, own.start)
    return Section(
        queries=Rows(start, min(spans[last].query_stop, own.stop)),
        keys=Rows(spans[first].key_start, spans[last].key_stop),
        patches=Rows(first, last + 1),
        offset=start - (first * patch - offset),
        counted=spans[first].query_start >= own.start,
    )


@cache
def transfers(rows: tuple[int, ...], window: int, patch: int, offset: int) -> tuple[Transfer, ...]:
    """All messages of one exchange, in an order that all ranks agree on.

    A rank receives every row of its windows that it does not have: from its neighbours, or from more ranks if these have few rows.
    Arguments and errors as in `sections`.
    """
    owned = owned_rows(rows)
    found = []
    for target in range(len(rows)):
        inside, outside = sections(rows, target, window, patch, offset)
        needed = Rows(min(s.keys.start for s in inside + outside), max(s.keys.stop for s in inside + outside))
        for source, theirs in enumerate(owned):
            part = Rows(max(needed.start, theirs.start), min(needed.stop, theirs.stop))
            if source != target and part.size > 0:
                found.append(Transfer(source, target, part))
    return tuple(found)


def halo_bytes(
    *,
    rows: tuple[int, ...],
    columns: int,
    window: int,
    patch: int,
    groups: int,
    head_dim: int,
    itemsize: int,
    offset: int = 0,
    batch: int = 1,
) -> tuple[int, ...]:
    """Bytes of keys and values that every rank receives for one attention call.

    Args:
        rows, window, patch, offset: As in `sections`.
        columns, groups, head_dim, batch: X, G, D and B.
        itemsize: Bytes of an element.
    """
    row = 2 * batch * columns * groups * head_dim * itemsize
    received = [0] * len(rows)
    for transfer in transfers(rows, window, patch, offset):
        received[transfer.target] += transfer.rows.size * row
    return tuple(received)


def gathered_bytes(*, rows: tuple[int, ...], columns: int, groups: int, head_dim: int, itemsize: int, batch: int = 1) -> tuple[int, ...]:
    """Bytes that every rank receives if it gathers all keys and values, at once or around a ring. Arguments as in `halo_bytes`."""
    row = 2 * batch * columns * groups * head_dim * itemsize
    return tuple((sum(rows) - own) * row for own in rows)


def head_exchange_bytes(
    *, rows: tuple[int, ...], columns: int, heads: int, head_dim: int, itemsize: int, batch: int = 1
) -> tuple[int, ...]:
    """Bytes that every rank receives if ranks exchange tokens for heads before attention and back, as Ulysses attention does.

    q, k and v of all other ranks' tokens for 1 / ranks of the heads, and the output of the own tokens for all other heads. Arguments as in
    `halo_bytes`; the same number of heads for q, k and v, a multiple of the ranks.
    """
    ranks = len(rows)
    token = batch * heads // ranks * head_dim * itemsize
    return tuple(columns * token * (3 * (sum(rows) - own) + (ranks - 1) * own) for own in rows)


def text_bytes(*, ranks: int, text: int, heads: int, head_dim: int, itemsize: int, rule: str | None, batch: int = 1) -> int:
    """Bytes that every rank receives to merge the text output: fp32 parts of its share of the tokens, and the other ranks' results.

    Args:
        ranks, text, heads, head_dim, batch: Number of ranks, T, H, D and B.
        itemsize: Bytes of an element of the result; parts have four, or eight where this is eight.
        rule: `"window"`, `"global"` or None, as in `joint_neighborhood_patch_attention`.
    """
    if rule is None or ranks == 1:
        return 0
    share = batch * heads * -(-text // ranks) * (ranks - 1)
    return share * (head_dim + (rule == "global")) * max(4, itemsize) + share * head_dim * itemsize
