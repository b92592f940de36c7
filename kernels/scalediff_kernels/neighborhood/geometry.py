"""Which tokens attend to which, and what it costs: integers only, no torch.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim. One multiply-add counts as 2 FLOPs.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple


class PatchWindow(NamedTuple):
    """Along one axis: queries `[query_start, query_stop)` attend to keys `[key_start, key_stop)`."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int


def windows(length: int, window: int, patch: int, offset: int = 0) -> tuple[PatchWindow, ...]:
    """Cut one axis into query patches, each with its key window clamped into the axis.

    Patch i covers `[i * patch - offset, (i + 1) * patch - offset)` cut to `[0, length)`, so border patches are smaller and
    nothing is padded. Its window is centred on the whole patch and shifted, never shrunk, at the borders.

    Args:
        length: Tokens along the axis.
        window: Keys of a window; the whole axis where it is larger.
        patch: Queries of a patch, at most `window`.
        offset: How far the patch grid is moved towards the origin, in `[0, patch)`.

    Raises:
        ValueError: a size is below 1, `patch > window` or the offset is outside `[0, patch)`.

    ScaleDiff, arXiv:2510.25818, section 3.2; at offset 0 the windows of NATTEN with kernel_size=window, stride=patch
    (arXiv:2504.16922).
    """
    check_axis(length, window, patch, offset)
    kept = min(window, length)
    spans = []
    for origin in range(-offset, length, patch):
        start = min(max(origin + patch // 2 - window // 2, 0), length - kept)
        spans.append(PatchWindow(max(origin, 0), min(origin + patch, length), start, start + kept))
    return tuple(spans)


def check_axis(length: int, window: int, patch: int, offset: int) -> None:
    """Refuse sizes that `windows` cannot cut; raises as that does."""
    if length < 1 or window < 1 or patch < 1:
        raise ValueError(f"length, window and patch must be at least 1, got {length=}, {window=}, {patch=}")
    if patch > window:
        raise ValueError(f"a patch must not exceed its window, got {patch=}, {window=}")
    if not 0 <= offset < patch:
        raise ValueError(f"offset must lie in [0, patch), got {offset=}, {patch=}")


def attention_flops(*, grid: tuple[int, int], window: tuple[int, int], heads: int, head_dim: int, batch: int = 1, text: int = 0) -> int:
    """Useful FLOPs of the image queries: `4 B H D (Y X) (W_y W_x + T)`; padding never counts.

    Args:
        grid: Tokens, `(Y, X)`.
        window: Key window in tokens, `(Y, X)`, cut to the grid; the grid itself for full attention.
        heads, head_dim, batch: H, D and B.
        text: T, text tokens that every image query attends to as well.
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
) -> int:
    """Useful FLOPs of the text queries: `4 B H D T (K + T)`, K the grid (`"global"`) or all windows, T counted with each (`"window"`).

    Args:
        grid, window, patch, offset: As in `windows`, per axis `(Y, X)`.
        heads, head_dim, batch: H, D and B.
        text: T, queries and keys alike.
        rule: `"window"` or `"global"`, as in `joint_neighborhood_patch_attention`.

    Raises:
        ValueError: another rule.
    """
    if rule not in ("window", "global"):
        raise ValueError(f"rule must be 'window' or 'global', got {rule=}")
    count, keys = 1, prod(grid)
    if rule == "window":
        count = prod(len(windows(n, w, p, o)) for n, w, p, o in zip(grid, window, patch, offset, strict=True))
        keys = prod(min(w, n) for w, n in zip(window, grid, strict=True))
    return 4 * batch * heads * head_dim * text * count * (keys + text)


def attention_bytes(*, grid: tuple[int, int], heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
    """Compulsory traffic in bytes: q, k, v read once and the output written once, `itemsize` bytes an element."""
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
) -> int:
    """Bytes of K and V over all windows, overlaps counted each time: what an implementation that copies windows moves.

    Arguments as in `windows`, per axis `(Y, X)`, and as in `attention_bytes`.
    """
    axes = [windows(n, w, p, o) for n, w, p, o in zip(grid, window, patch, offset, strict=True)]
    keys = prod(sum(span.key_stop - span.key_start for span in axis) for axis in axes)
    return 2 * batch * heads * head_dim * keys * itemsize
