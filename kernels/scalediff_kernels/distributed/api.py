"""Neighborhood patch attention of a grid whose rows are shared out among ranks: the public functions, with their argument checks.

A rank sends its neighbours the rows of keys and values that their windows reach into. Meanwhile it computes the windows that lie inside its
own rows. The operation on each section of rows is `neighborhood_patch_attention` on a slab of keys.

Legend: B batch, H heads, G key heads, Y x X token grid of one rank, T text tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, distributed

from scalediff_kernels.distributed.exchange import Exchange
from scalediff_kernels.distributed.geometry import Rows, Section, owned_rows, sections, transfers
from scalediff_kernels.distributed.groups import group_of
from scalediff_kernels.distributed.merge import merge_softmax, merge_sums
from scalediff_kernels.neighborhood.api import Impl, Pair, TextQueries, joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.geometry import windows


def sharded_neighborhood_patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    rows: Sequence[int],
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`neighborhood_patch_attention` of a token grid whose rows are shared out among the ranks of a process group.

    All ranks must call it, with the same arguments except for the tensors. `scalediff_kernels.distributed.groups.check_agreement` compares
    what should be the same.

    Args:
        q, k, v: This rank's rows, `[B, Y, X, H, D]` and `[B, Y, X, G, D]`, as in `neighborhood_patch_attention`.
        group: A process group, or a `DeviceMesh` of one dimension. Messages are those of `torch.distributed.batch_isend_irecv`; NCCL wants
            another collective of all ranks on their GPUs before the first of them, such as `torch.distributed.all_reduce`.
        rows: Numbers of rows of all ranks, in their order from the top of the grid; each at least 1.
        window, patch, offset: As in `neighborhood_patch_attention`, for the whole grid. Windows may reach over several ranks.
        scale, impl: As in `neighborhood_patch_attention`.

    Returns:
        This rank's rows of the result, `[B, Y, X, H, D]`, within rounding of those that one process computes.

    Raises:
        ValueError: As `neighborhood_patch_attention`; also if `rows` do not fit the group or q, or this process is not in the group.
        TypeError: As `neighborhood_patch_attention`; also if `group` is neither a group nor a mesh.
        RuntimeError: There is no process group; or a rank has ended, a `LostRankError` that names it.
        NotImplementedError: As `neighborhood_patch_attention`; also if gradients are needed.

    ScaleDiff, arXiv:2510.25818, section 3.2; the halo exchange of domain decomposition.
    """
    call = _Sharded(q, k, v, group, rows, window, patch, offset)
    exchange, out = call.exchange(k, v), None
    for section in call.sections(exchange):
        image = q[:, call.local(section.queries)], *exchange.rows(section.keys)
        part: Tensor = neighborhood_patch_attention(*image, **call.geometry(section), scale=scale, impl=impl)
        out = call.placed(out, part, section)
    assert out is not None
    return out


def sharded_joint_neighborhood_patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    *,
    group: Any,
    rows: Sequence[int],
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    scale: float | None = None,
    text_rope: tuple[Tensor, Tensor] | None = None,
    text_queries: TextQueries | None = "window",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`joint_neighborhood_patch_attention` of a token grid whose rows are shared out among the ranks of a process group.

    Args:
        q, k, v, group, rows, window, patch, offset, scale, impl: As in `sharded_neighborhood_patch_attention`.
        text_q, text_k, text_v: All text tokens, the same on every rank, as in `joint_neighborhood_patch_attention`.
        text_rope: Tables of all windows of the whole grid, as in `joint_neighborhood_patch_attention`.
        text_queries: As in `joint_neighborhood_patch_attention`. `"window"` sums over the windows of the ranks, `"global"` merges the
            attention to the keys of each rank by its log-sum-exp, both in the order of the ranks.

    Returns:
        This rank's rows of the image output, and the text output `[B, T, H, D]` or None, which has the same bits on every rank.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: As `sharded_neighborhood_patch_attention` and
            `joint_neighborhood_patch_attention`.

    ScaleDiff, arXiv:2510.25818, section 3.2 and its released code for the text rule.
    """
    call = _Sharded(q, k, v, group, rows, window, patch, offset)
    if text_queries not in (*get_args(TextQueries), None):
        raise ValueError(f"text_queries must be 'window', 'global' or None, got {text_queries=}")
    call.check_tables(text_rope)
    text, by_window = (text_q, text_k, text_v), text_queries == "window"
    exchange, out = call.exchange(k, v), None
    merged = merge_softmax(*_attend_to_all(call, k, v, text, scale, impl), call.group) if text_queries == "global" else None
    total = torch.zeros_like(text_q, dtype=torch.promote_types(q.dtype, torch.float32))
    for section in call.sections(exchange, by_window=by_window):
        rope = None if text_rope is None else tuple(x[slice(*section.patches)] for x in text_rope)
        how: dict[str, Any] = call.geometry(section) | {"scale": scale, "text_rope": rope, "impl": impl}
        image = q[:, call.local(section.queries)], *exchange.rows(section.keys)
        rule: Any = "window" if by_window and section.counted else None
        part, mean = joint_neighborhood_patch_attention(*image, *text, text_queries=rule, **how)
        out = call.placed(out, part, section)
        if mean is not None:
            total += mean * (section.patches.size * call.patches[1])
    assert out is not None
    if by_window:
        merged = merge_sums(total, call.patches[0] * call.patches[1], out.dtype, call.group)
    return out, merged


class _Sharded:
    """One call's geometry on this rank."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, group: Any, rows: Sequence[int], window: Pair, patch: Pair, offset: Pair) -> None:
        self.group, self.rows = group_of(group), tuple(rows)
        self.rank, ranks = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        if len(self.rows) != ranks:
            raise ValueError(f"rows must have a number for each of the {ranks} ranks of the group, got {rows=}")
        self.own = owned_rows(self.rows)[self.rank]
        if any(x.ndim != 5 or x.shape[1] != self.own.size for x in (q, k, v)):
            raise ValueError(
                f"q, k and v must be [B, Y, X, H, D] with the {self.own.size} rows of rank {self.rank}, "
                f"got {tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}"
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise NotImplementedError("attention over ranks does not support gradients: use torch.no_grad()")
        self.columns, self.window, self.patch, self.offset = q.shape[2], window, patch, offset
        axes = zip((sum(self.rows), self.columns), window, patch, offset, strict=True)
        self.patches: Pair = tuple(len(windows(*axis)) for axis in axes)  # type: ignore[assignment]

    def exchange(self, k: Tensor, v: Tensor) -> Exchange:
        """Start to send and receive rows."""
        messages = transfers(self.rows, self.window[0], self.patch[0], self.offset[0])
        return Exchange(k, v, own=self.own, messages=messages, group=self.group)

    def sections(self, exchange: Exchange, *, by_window: bool = False) -> Iterator[Section]:
        """This rank's sections: those that need no other rank's keys, and the others when these have been received."""
        ready, waiting = sections(self.rows, self.rank, self.window[0], self.patch[0], self.offset[0], by_window=by_window)
        yield from ready
        exchange.wait()
        yield from waiting

    def local(self, rows: Rows) -> slice:
        """Rows of the whole grid as a slice of this rank's."""
        return slice(rows.start - self.own.start, rows.stop - self.own.start)

    def geometry(self, section: Section) -> dict[str, Any]:
        """Window, patch, offset and origin of a section."""
        return {
            "window": self.window,
            "patch": self.patch,
            "offset": (section.offset, self.offset[1]),
            "origin": (section.queries.start - section.keys.start, 0),
        }

    def placed(self, out: Tensor | None, part: Tensor, section: Section) -> Tensor:
        """The output with a section in its place; in the dtype that autocast chose."""
        if section.queries == self.own:
            return part
        if out is None:
            out = part.new_empty(part.shape[0], self.own.size, *part.shape[2:])
        out[:, self.local(section.queries)] = part
        return out

    def check_tables(self, rope: tuple[Tensor, Tensor] | None) -> None:
        """Check that rotary tables are those of all windows; the operation checks the rest."""
        if rope is not None and any(tuple(x.shape[:2]) != self.patches for x in rope):
            raise ValueError(
                f"text_rope must be tables of all windows of the whole grid, [{self.patches[0]}, {self.patches[1]}, D / 2], "
                f"got {[tuple(x.shape) for x in rope]}"
            )


def _attend_to_all(
    call: _Sharded, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor, Tensor], scale: float | None, impl: Impl
) -> tuple[Tensor, Tensor]:
    """Attention of the text queries to the image keys of this rank, on rank 0 to the text as well; `[B, T, H, D]` and its log-sum-exp.

    The fused operation attends from a grid of queries to as many keys and to "text". Here the text queries are the grid, in one row. Its
    keys are those of the text, or else the first of the image, and the (other) image keys are the "text".
    """
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    if call.rank == 0:
        return _attend_in_one_row(text[0], (text[1], k), (text[2], v), scale, impl)
    parts = []
    for queries in text[0].split(min(text[0].shape[1], k.shape[1]), dim=1):
        n = queries.shape[1]
        parts.append(_attend_in_one_row(queries, (k[:, :n], k[:, n:]), (v[:, :n], v[:, n:]), scale, impl))
    out, lse = (torch.cat(found, dim=1) for found in zip(*parts, strict=True))
    return out, lse


def _attend_in_one_row(
    q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], scale: float | None, impl: Impl
) -> tuple[Tensor, Tensor]:
    """Attention of queries `[B, T, H, D]` to T keys and any number of others, with its log-sum-exp."""
    grid, whole = (q[:, None], k[0][:, None], v[0][:, None]), (1, q.shape[1])
    if k[1].shape[1] == 0:
        out, lse = neighborhood_patch_attention(*grid, window=whole, patch=whole, scale=scale, return_lse=True, impl=impl)
        return out[:, 0], lse[:, 0]
    no_queries = q[:, :1].expand(-1, k[1].shape[1], -1, -1)
    others = no_queries, k[1], v[1]
    out, _, lse = joint_neighborhood_patch_attention(
        *grid, *others, window=whole, patch=whole, scale=scale, text_queries=None, return_lse=True, impl=impl
    )
    return out[:, 0], lse[:, 0]
