"""The picture statistics: zero where they must be, exact where theory says so, and moved by the fault they are there to find."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.quality.metrics import (
    _components,
    count_discs,
    disc_columns,
    high_frequency_ratio,
    laplacian_swd,
    seam_score,
    sky_colors,
    spectrum_distance,
)
from scalediff.demo.scenes import TIMES, describe, render

SEED = 10_500_000


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small() -> Tensor:
    return render(SEED, 64, 64)


@pytest.fixture(scope="module")
def large() -> Tensor:
    return render(SEED, 32, 256)


def blurred(images: Tensor, times: int = 1) -> Tensor:
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return images


def with_disc(images: Tensor, *, y: float, x: float, radius: float) -> Tensor:
    rows, columns = torch.arange(images.shape[2]) + 0.5, torch.arange(images.shape[3]) + 0.5
    distance = torch.hypot(rows[:, None] - y, columns[None] - x)
    alpha = (radius - distance + 0.5).clamp(0, 1)
    return images + alpha * (0.95 - images)


@pytest.mark.parametrize("size", ["small", "large"])
def test_true_renders_have_one_disc_even_blurred_and_noisy(size: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(size)
    noise = 0.02 * torch.randn(images.shape, generator=rng())
    for seen in (images, (images + noise).clamp(0, 1), (blurred(images) + noise).clamp(0, 1)):
        assert count_discs(seen).tolist() == [1] * len(images)


@pytest.mark.parametrize("size", ["small", "large"])
def test_discs_are_added_and_taken_away(size: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(size)[:8]
    side = images.shape[-1]
    none = images.clamp(max=0.8)
    two = with_disc(images, y=0.55 * side, x=0.5 * side, radius=0.07 * side)
    three = with_disc(two, y=0.8 * side, x=0.2 * side, radius=0.07 * side)
    assert count_discs(torch.cat([none, two, three])).tolist() == [0] * 8 + [2] * 8 + [3] * 8


@pytest.mark.parametrize(("radius", "count"), [(5.5, 1), (4.2, 1), (2.1, 1), (0.5, 0)])
def test_a_disc_of_native_pixel_size_counts_on_a_large_canvas(large: Tensor, radius: float, count: int) -> None:
    empty = large[:8].clamp(max=0.8)
    for y, x in ((60.0, 200.0), (60.5, 200.25)):
        assert count_discs(with_disc(empty, y=y, x=x, radius=radius)).tolist() == [count] * 8


def test_many_small_discs_and_an_oblong_canvas() -> None:
    canvas = torch.full((1, 3, 96, 160), 0.4)
    places = [(12 + 24 * i, 16 + 32 * j) for i in range(4) for j in range(5)]
    for y, x in places:
        canvas = with_disc(canvas, y=y, x=x, radius=4.5)
    assert count_discs(canvas).tolist() == [len(places)]


@pytest.mark.parametrize("density", [0.2, 0.41, 0.6])
def test_components_are_those_of_a_flood_fill(density: float) -> None:
    mask = torch.rand(3, 17, 29, generator=rng()) < density
    for labels, inside in zip(_components(mask), mask, strict=True):
        todo = {(y, x) for y, x in inside.nonzero().tolist()}
        regions = []
        while todo:
            region, front = set(), [todo.pop()]
            while front:
                y, x = front.pop()
                region.add((y, x))
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
                todo -= near
                front += near
            regions.append(region)
        found: dict[int, set[tuple[int, int]]] = {}
        for y, x in inside.nonzero().tolist():
            found.setdefault(int(labels[y, x]), set()).add((y, x))
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, regions))
        assert not labels[~inside].any()


def test_swd_is_zero_for_the_same_set_and_grows_with_blur(large: Tensor) -> None:
    images = large[:8]
    distances = [laplacian_swd(blurred(images, times), images, generator=rng()) for times in (0, 1, 3)]
    assert list(distances[0]) == [256, 128, 64, 32, 16]
    assert set(distances[0].values()) == {0.0}
    for level in (256, 128, 64):
        assert 1 < distances[1][level] < distances[2][level]
    assert distances[2][256] > distances[2][64]


def test_swd_sees_a_change_of_tone_on_the_coarsest_level_alone(small: Tensor) -> None:
    fine, middle, coarse = laplacian_swd(small + 0.1, small, generator=rng()).values()
    assert max(fine, middle) < 1
    assert coarse > 100


def test_spectrum_distance_is_zero_for_the_same_set_and_grows_with_blur(large: Tensor) -> None:
    images = large[:8]
    assert spectrum_distance(images, images) == 0
    assert 0.05 < spectrum_distance(blurred(images), images) < spectrum_distance(blurred(images, 3), images)


def test_spectrum_distance_of_half_the_contrast_is_a_factor_of_four(small: Tensor) -> None:
    assert spectrum_distance(small / 2, small) == pytest.approx(math.log10(4), abs=1e-4)


def test_high_frequency_ratio_of_white_noise_and_of_blur(large: Tensor) -> None:
    noise = torch.rand(8, 3, 96, 128, generator=rng())
    rings = (0.5**2 - 0.25**2) / (0.5**2 - 0.02**2)  # white noise has the power of a ring's area
    assert high_frequency_ratio(noise) == pytest.approx(rings, abs=0.01)
    assert high_frequency_ratio(blurred(large)) < 0.5 * high_frequency_ratio(large)


@pytest.mark.parametrize("axis", [2, 3])
def test_seam_score_flags_a_seam_at_its_period_and_not_at_controls(large: Tensor, axis: int) -> None:
    tile = torch.arange(256) // 32 % 2 * 0.04  # every other tile is a little brighter
    seamed = large[:16] + (tile[:, None] if axis == 2 else tile)
    z, *controls = seam_score(seamed, period=32).values()
    assert z > max(controls) + 3
    z_true, *controls_true = seam_score(large[:16], period=32).values()
    assert z_true < max(controls_true) + 3
    assert z > z_true + 3


def test_seam_score_names_its_periods_and_passes_over_a_seam_elsewhere(large: Tensor) -> None:
    assert list(seam_score(large[:1], period=32)) == [32, 24, 28, 30, 34, 36, 40]
    shifted = large[:16].clone()
    shifted[:, :, :, 16::32] += 0.04
    assert seam_score(shifted, period=32)[32] < 3


def test_what_is_refused() -> None:
    images = torch.rand(2, 3, 64, 64, generator=rng())
    with pytest.raises(ValueError, match=r"images must be \[N, 3, Y, X\], floating point and not empty, got \(3, 64, 64\)"):
        count_discs(images[0])
    with pytest.raises(ValueError, match=r"images must be .* got \(2, 3, 64, 64\) torch\.uint8"):
        high_frequency_ratio(images.to(torch.uint8))
    with pytest.raises(ValueError, match="a and b must be of one shape with sides of at least 16"):
        laplacian_swd(images, images[:1], generator=rng())
    with pytest.raises(ValueError, match="a and b must be of one size"):
        spectrum_distance(images, images[:, :, :32])
    with pytest.raises(ValueError, match="period must be at least 16 and the sides twice 10, got period=8"):
        seam_score(images, period=8)


def test_the_disc_is_found_where_the_scene_has_it(small: Tensor) -> None:
    true = torch.tensor([describe(SEED + i).disc_x for i in range(len(small))])
    assert (disc_columns(small) - true).abs().max() < 0.5 / 64
    assert disc_columns(0.5 * small).isnan().all()


def test_the_sky_tells_the_hour(small: Tensor) -> None:
    """Nearest mean colour of other scenes: no true picture is taken for another hour."""
    others, hours = render(0, 128, 64), [describe(i).time for i in range(128)]
    centres = torch.stack([sky_colors(others[[hour == time for hour in hours]]).mean(0) for time in TIMES])
    estimated = [TIMES[int(i)] for i in torch.cdist(sky_colors(small), centres).argmin(1)]
    assert estimated == [describe(SEED + i).time for i in range(len(small))]
