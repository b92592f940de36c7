"""Patches and windows of neighborhood patch attention, its FLOPs and memory traffic: integers only, no torch.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim. One multiply-add counts as 2 FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class PatchWindow(NamedTuple):
    """One patch along one axis: queries `[query_start, query_stop)` attend to keys `[key_start, key_stop)`.

    On an axis that wraps, tokens are counted modulo its length: a range may begin before token 0 or end after the last token.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int


def windows(
    length: int, window: int, patch: int, offset: int = 0, *, keys: int | None = None, origin: int = 0, wrap: bool = False
) -> tuple[PatchWindow, ...]:
    """Split one axis into query patches, each with a key window clamped into the axis, or continued on the other side.

    Patch i covers `[i * patch - offset, (i + 1) * patch - offset)` cut to `[0, length)`, so border patches are smaller and there is no
    padding. Its window is centred on the uncut patch, and shifted at the borders without becoming smaller.

    With `wrap` the ends of the axis are joined. The patches are those of offset 0 on the axis rolled by `offset`: the first starts at token
    `-offset`, and only the last is cut, where the first begins again. Windows are not shifted. If the patch divides the length, a cyclic
    shift by a patch maps patches to patches and windows to windows; otherwise the cut patch shows where the axis begins.

    Args:
        length: Number of query tokens along the axis.
        window: Number of keys of a window; if it is larger than the axis, the whole axis.
        patch: Number of queries of a patch, at most `window`.
        offset: Shift of the patch grid towards the origin in tokens, in `[0, patch)`.
        keys: Number of keys along the axis, if the queries are a part of it; `length` when None.
        origin: Position of the first query among the keys.
        wrap: Whether the axis continues on the other side. The queries are then the whole axis.

    Returns:
        The patches, counted from the first query, and their windows, counted from the first key.

    Raises:
        ValueError: A size is below 1, patch exceeds window, the offset is outside `[0, patch)`, or the queries are not among the keys.

    ScaleDiff, arXiv:2510.25818, section 3.2; at offset 0 the windows of NATTEN with kernel_size=window, stride=patch
    (arXiv:2504.16922).
    """
    keys = length if keys is None else keys
    check_axis(length, window, patch, offset, keys=keys, origin=origin)
    kept = min(window, keys)
    low, high = (-offset, length - offset) if wrap else (0, length)
    spans = []
    for first in range(-offset, high, patch):
        start = origin + first + patch // 2 - window // 2
        if not wrap or kept == keys:
            start = min(max(start, 0), keys - kept)
        spans.append(PatchWindow(max(first, low), min(first + patch, high), start, start + kept))
    return tuple(spans)


def grid_windows(
    queries: Sequence[int],
    keys: Sequence[int],
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
    wrap: tuple[bool, bool] = (False, False),
) -> tuple[tuple[PatchWindow, ...], tuple[PatchWindow, ...]]:
    """`windows` along both axes of the grids `(Y, X)` of the queries and of the keys: rows and columns of patches."""
    axes = zip(queries, window, patch, offset, keys, origin, wrap, strict=True)
    rows, columns = (windows(*axis[:4], keys=axis[4], origin=axis[5], wrap=axis[6]) for axis in axes)
    return rows, columns


def patch_count(length: int, patch: int, offset: int, *, wrap: bool) -> int:
    """Number of patches of `windows`."""
    return -(-(length + (0 if wrap else offset)) // patch)


def check_axis(length: int, window: int, patch: int, offset: int, *, keys: int, origin: int) -> None:
    """Check the arguments of `windows`; raises as `windows`."""
    if length < 1 or window < 1 or patch < 1:
        raise ValueError(f"length, window and patch must be at least 1, got {length=}, {window=}, {patch=}")
    if patch > window:
        raise ValueError(f"patch must not exceed window, got {patch=}, {window=}")
    if not 0 <= offset < patch:
        raise ValueError(f"offset must lie in [0, patch), got {offset=}, {patch=}")
    if not 0 <= origin <= keys - length:
        raise ValueError(f"the queries must be among the keys, {length} of {keys} from origin on, got {origin=}")


def attention_flops(*, grid: tuple[int, int], window: tuple[int, int], heads: int, head_dim: int, batch: int = 1, text: int = 0) -> int:
    """Useful FLOPs of the image queries, `4 B H D (Y X) (W_y W_x + T)`; padding is not counted. Every window is full, also one that wraps.

    Args:
        grid: Token grid `(Y, X)`.
        window: Key window in tokens, `(Y, X)`, clamped to the grid. Use the grid itself for full attention.
        heads, head_dim, batch: H, D and B.
        text: T, the number of text tokens that every image query also attends to.
    """
    keys = prod(min(w, n) for w, n in zip(window, grid, strict=True)) + text
    return 4 * batch * heads * head_dim * prod(grid) * keys


def text_attention_flops(
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    patch: tuple[int, int],
    heads: int,
    head_dim: int,
    text: int,
    rule: str,
    offset: tuple[int, int] = (0, 0),
    batch: int = 1,
    wrap: tuple[bool, bool] = (False, False),
) -> int:
    """Useful FLOPs of the text queries: `4 B H D T (K + T)`, for K = grid (`"global"`), or K = window, summed over windows (`"window"`).

    Args:
        grid, window, patch, offset, wrap: As in `windows`, per axis `(Y, X)`.
        heads, head_dim, batch: H, D and B.
        text: T, the number of text tokens.
        rule: `"window"` or `"global"`, as in `joint_neighborhood_patch_attention`.

    Raises:
        ValueError: The rule is unknown.
    """
    if rule not in ("window", "global"):
        raise ValueError(f"rule must be 'window' or 'global', got {rule=}")
    count, keys = 1, prod(grid)
    if rule == "window":
        axes = zip(grid, window, patch, offset, wrap, strict=True)
        count = prod(len(windows(n, w, p, o, wrap=around)) for n, w, p, o, around in axes)
        keys = prod(min(w, n) for w, n in zip(window, grid, strict=True))
    return 4 * batch * heads * head_dim * text * count * (keys + text)


def attention_bytes(*, grid: tuple[int, int], heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
    """Minimum memory traffic in bytes: q, k and v read once and the output written once, with `itemsize` bytes per element."""
    return 4 * batch * heads * head_dim * prod(grid) * itemsize


def window_bytes(
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    patch: tuple[int, int],
    heads: int,
    head_dim: int,
    itemsize: int,
    offset: tuple[int, int] = (0, 0),
    batch: int = 1,
    wrap: tuple[bool, bool] = (False, False),
) -> int:
    """Bytes of K and V summed over all windows, as moved by an implementation that copies every window.

    Arguments as in `windows`, per axis `(Y, X)`, and as in `attention_bytes`.
    """
    axes = [windows(n, w, p, o, wrap=around) for n, w, p, o, around in zip(grid, window, patch, offset, wrap, strict=True)]
    keys = prod(sum(span.key_stop - span.key_start for span in axis) for axis in axes)
    return 2 * batch * heads * head_dim * keys * itemsize
