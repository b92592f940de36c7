"""The sections of a rank, the rows that it needs from others, and the bytes that this moves: integers alone."""

from __future__ import annotations

import pytest

from scalediff_kernels.distributed.geometry import (
    Rows,
    Transfer,
    gathered_bytes,
    halo_bytes,
    head_exchange_bytes,
    owned_rows,
    sections,
    split_rows,
    text_bytes,
    transfers,
)
from scalediff_kernels.neighborhood.geometry import windows
from tests.kernels.distributed.ranks import draw

FLUX = {"columns": 256, "head_dim": 128, "itemsize": 2}  # 4096 x 4096 pixels


@pytest.mark.parametrize("by_window", [False, True])
def test_sections_are_the_rows_of_a_rank_and_their_windows_those_of_the_whole_grid(by_window: bool) -> None:
    for seed in range(300):
        shared = draw(seed, 1 + seed % 6)
        window, patch, offset = (of_axes[0] for of_axes in (shared.problem.window, shared.problem.patch, shared.problem.offset))
        spans, counted = windows(sum(shared.rows), window, patch, offset), 0
        for rank, own in enumerate(owned_rows(shared.rows)):
            inside, outside = sections(shared.rows, rank, window, patch, offset, by_window=by_window)
            assert all(own.start <= s.keys.start and s.keys.stop <= own.stop for s in inside)
            ordered = sorted(inside + outside)
            assert [row for s in ordered for row in range(*s.queries)] == list(range(*own))
            for s in ordered:
                local = windows(s.queries.size, window, patch, s.offset, keys=s.keys.size, origin=s.queries.start - s.keys.start)
                whole = spans[s.patches.start : s.patches.stop]
                assert [(k + s.keys.start, stop + s.keys.start) for _, _, k, stop in local] == [(w.key_start, w.key_stop) for w in whole]
                assert s.keys == (whole[0].key_start, whole[-1].key_stop)
                counted += s.counted * s.patches.size
        assert not by_window or counted == len(spans)


def test_rows_come_from_several_ranks_where_a_window_reaches_over_them() -> None:
    assert owned_rows((2, 1, 3)) == (Rows(0, 2), Rows(2, 3), Rows(3, 6))
    assert transfers((2, 1, 3), 6, 2, 0) == (
        Transfer(1, 0, Rows(2, 3)), Transfer(2, 0, Rows(3, 6)), Transfer(0, 1, Rows(0, 2)), Transfer(2, 1, Rows(3, 6)),
        Transfer(0, 2, Rows(0, 2)), Transfer(1, 2, Rows(2, 3)),
    )  # fmt: skip
    assert transfers((4, 4), 4, 4, 0) == ()


def test_windows_that_need_no_halo_are_most_of_a_large_part() -> None:
    """FLUX at 4096 pixels on two GPUs: three of four rows of patches need nothing, the last 16 rows of the other rank."""
    inside, outside = sections((128, 128), 0, 64, 32, 0)
    assert [s.queries for s in inside] == [Rows(0, 96)]
    assert [(s.queries, s.keys) for s in outside] == [(Rows(96, 128), Rows(80, 144))]


def test_bytes_of_flux_at_4096_pixels() -> None:
    """16 rows from each neighbour, of keys and values of 256 columns in 24 heads of 128 channels and 2 bytes."""
    row, rows = 2 * 256 * 24 * 128 * 2, split_rows(256, 4)
    assert halo_bytes(rows=rows, window=64, patch=32, groups=24, **FLUX) == (16 * row, 32 * row, 32 * row, 16 * row)
    assert gathered_bytes(rows=rows, groups=24, **FLUX) == (192 * row,) * 4
    # q, k, v of 192 rows for a quarter of the heads, and the output of 64 rows for the other three quarters
    assert head_exchange_bytes(rows=rows, heads=24, **FLUX) == ((3 * 192 * row // 8 + 3 * 64 * row // 8),) * 4
    assert text_bytes(ranks=4, text=512, heads=24, head_dim=128, itemsize=2, rule="window") == 3 * 128 * 24 * 128 * (4 + 2)
    assert text_bytes(ranks=4, text=512, heads=24, head_dim=128, itemsize=2, rule="global") == 3 * 128 * 24 * (129 * 4 + 128 * 2)
    assert text_bytes(ranks=4, text=512, heads=24, head_dim=128, itemsize=2, rule=None) == 0


def test_more_ranks_than_rows_are_refused() -> None:
    assert split_rows(7, 3) == (3, 2, 2)
    with pytest.raises(ValueError, match="3 ranks cannot share 2 rows: every rank needs at least one"):
        split_rows(2, 3)
    with pytest.raises(ValueError, match=r"every rank needs at least one row, got rows=\(1, 0\)"):
        owned_rows((1, 0))
