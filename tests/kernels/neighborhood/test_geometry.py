"""Windows and costs, against definitions written token by token."""

from __future__ import annotations

import random

import pytest

from scalediff_kernels.neighborhood.geometry import attention_bytes, attention_flops, text_attention_flops, window_bytes, windows

AXES = [
    (256, 64, 32, 0),
    (128, 32, 16, 5),
    (16, 16, 8, 0),
    (13, 7, 3, 2),
    (7, 4, 4, 3),
    (9, 5, 2, 1),
    (5, 64, 32, 31),
    (64, 6, 5, 4),
    (1, 1, 1, 0),
]


def drawn_axes(n: int) -> list[tuple[int, int, int, int]]:
    rng = random.Random(0)
    axes = []
    for _ in range(n):
        window = rng.randint(1, 40)
        patch = rng.randint(1, window)
        axes.append((rng.randint(1, 90), window, patch, rng.randrange(patch)))
    return axes


@pytest.mark.parametrize(("length", "window", "patch", "offset"), AXES + drawn_axes(60))
def test_windows_follow_the_definition(length: int, window: int, patch: int, offset: int) -> None:
    spans = windows(length, window, patch, offset)
    assert [t for span in spans for t in range(span.query_start, span.query_stop)] == list(range(length))
    assert len(spans) == -(-(length + offset) // patch)
    for i, span in enumerate(spans):
        start = min(max(i * patch - offset + patch // 2 - window // 2, 0), max(length - window, 0))
        assert (span.query_start, span.query_stop) == (max(i * patch - offset, 0), min((i + 1) * patch - offset, length))
        assert (span.key_start, span.key_stop) == (start, start + min(window, length))


@pytest.mark.parametrize(("length", "window", "patch"), [(a[0], a[1], a[2]) for a in AXES + drawn_axes(60) if a[1] <= a[0]])
def test_windows_at_offset_zero_are_nattens(length: int, window: int, patch: int) -> None:
    """NATTEN: the leader of a query's stride group, its centre clamped so that the window fits."""
    for span in windows(length, window, patch):
        for query in range(span.query_start, span.query_stop):
            leader = min(query // patch * patch + patch // 2, length - 1)
            center = min(max(leader, window // 2), length - 1 - (window - 1 - window // 2))
            assert span.key_start == center - window // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 2, 0), r"at least 1, got length=0"),
        ((8, 0, 2, 0), r"at least 1.*window=0"),
        ((8, 4, 0, 0), r"at least 1.*patch=0"),
        ((8, 4, 5, 0), r"patch must not exceed window, got patch=5, window=4"),
        ((8, 4, 2, 2), r"offset must lie in \[0, patch\), got offset=2"),
        ((8, 4, 2, -1), r"offset must lie in \[0, patch\), got offset=-1"),
    ],
)
def test_windows_refuse_what_they_cannot_mean(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(*arguments)


def test_useful_flops_count_every_query_key_pair_once() -> None:
    pairs = sum(
        (y.query_stop - y.query_start) * (x.query_stop - x.query_start) * (y.key_stop - y.key_start) * (x.key_stop - x.key_start)
        for y in windows(13, 7, 3, 2)
        for x in windows(9, 20, 5, 1)
    )
    assert attention_flops(grid=(13, 9), window=(7, 20), heads=3, head_dim=8, batch=2) == 2 * 2 * pairs * 3 * 8 * 2


@pytest.mark.parametrize(
    ("heads", "head_dim", "tera"),
    [pytest.param(10, 64, 0.687, id="SDXL"), pytest.param(24, 128, 3.30, id="FLUX")],
)
def test_useful_flops_at_true_size(heads: int, head_dim: int, tera: float) -> None:
    flops = attention_flops(grid=(256, 256), window=(64, 64), heads=heads, head_dim=head_dim)
    assert flops / 1e12 == pytest.approx(tera, rel=2e-3)
    assert attention_flops(grid=(256, 256), window=(256, 256), heads=heads, head_dim=head_dim) == 16 * flops


def test_text_keys_are_seen_by_every_image_query() -> None:
    with_text = attention_flops(grid=(8, 8), window=(4, 4), heads=1, head_dim=1, text=10)
    assert with_text == 4 * 64 * (16 + 10)


def test_copied_windows_move_four_times_the_keys_at_half_window_patches() -> None:
    common = {"grid": (256, 256), "heads": 1, "head_dim": 1, "itemsize": 2}
    copied = window_bytes(**common, window=(64, 64), patch=(32, 32))  # type: ignore[arg-type]
    assert copied / (attention_bytes(**common) / 2) == 4  # type: ignore[arg-type]


def test_text_queries_of_flux_at_4096_pixels() -> None:
    """57 blocks: 211 TFLOP for the image queries and 106 more for the authors' text rule, an exact global rule a tenth of that."""
    flux = {"grid": (256, 256), "window": (64, 64), "heads": 24, "head_dim": 128, "text": 512}
    image = 57 * attention_flops(**flux)  # type: ignore[arg-type]
    window, whole = (57 * text_attention_flops(**flux, patch=(32, 32), rule=rule) for rule in ("window", "global"))  # type: ignore[arg-type]
    assert round(image / 1e12, 1) == 211.5
    assert window * 2 == image
    assert round(whole / 1e12, 1) == 23.7
    with pytest.raises(ValueError, match="rule must be 'window' or 'global', got rule='mean'"):
        text_attention_flops(**flux, patch=(32, 32), rule="mean")  # type: ignore[arg-type]
