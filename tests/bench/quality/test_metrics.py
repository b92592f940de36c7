"""The picture statistics: zero where they must be, exact where theory says so, and moved by the fault they are there to find."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.quality.metrics import (
    FAINT_EDGES,
    _components,
    base_distance,
    count_discs,
    disc_columns,
    high_frequency_ratio,
    laplacian_pyramid,
    patches_at,
    power_above,
    radial_power,
    seam_score,
    sharpness,
    sky_colors,
    sliced_distances,
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


def swd(a: Tensor, b: Tensor) -> dict[int, float]:
    return {level: distance(torch.arange(len(a))) for level, distance in sliced_distances(a, b, generator=rng(), directions=128).items()}


def spectrum(a: Tensor, b: Tensor) -> float:
    return spectrum_distance(radial_power(a), radial_power(b))(torch.arange(len(a)))


def with_disc(images: Tensor, *, y: float, x: float, radius: float, luma: float | Tensor = 0.95) -> Tensor:
    rows, columns = torch.arange(images.shape[2]) + 0.5, torch.arange(images.shape[3]) + 0.5
    distance = torch.hypot(rows[:, None] - y, columns[None] - x)
    alpha = (radius - distance + 0.5).clamp(0, 1)
    return images + alpha * (torch.as_tensor(luma).view(-1, 1, 1, 1) - images)


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
    none = images.clamp(max=0.74)
    two = with_disc(images, y=0.62 * side, x=0.5 * side, radius=0.1 * side)
    three = with_disc(two, y=0.85 * side, x=0.2 * side, radius=0.1 * side)
    assert count_discs(torch.cat([none, two, three])).tolist() == [0] * 8 + [2] * 8 + [3] * 8


@pytest.mark.parametrize(("radius", "count"), [(12.8, 1), (8.0, 1), (4.0, 1), (1.0, 0)])
def test_a_disc_of_native_pixel_size_counts_on_a_large_canvas(large: Tensor, radius: float, count: int) -> None:
    empty = large[:8].clamp(max=0.74)
    for y, x in ((60.0, 200.0), (60.5, 200.25)):
        assert count_discs(with_disc(empty, y=y, x=x, radius=radius)).tolist() == [count] * 8


@pytest.mark.parametrize("size", ["small", "large"])
def test_faint_discs_count_by_the_hour_and_true_renders_have_none(size: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(size)
    edges = torch.tensor([FAINT_EDGES[describe(SEED + i).time] for i in range(len(images))])
    side = images.shape[-1]
    assert count_discs(images, edges=edges).tolist() == [1] * len(images)
    faint = with_disc(images[:8], y=0.85 * side, x=0.2 * side, radius=0.1 * side, luma=edges[:8] + 0.05)
    assert count_discs(faint, edges=edges[:8]).tolist() == [2] * 8
    dark = [i for i in range(8) if edges[i] < 0.7]
    assert dark
    assert count_discs(faint[dark]).tolist() == [1] * len(dark)


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
    distances = [swd(blurred(images, times), images) for times in (0, 1, 3)]
    assert list(distances[0]) == [256, 128, 64, 32, 16]
    assert set(distances[0].values()) == {0.0}
    for level in (256, 128, 64):
        assert 1 < distances[1][level] < distances[2][level]
    assert distances[2][256] > distances[2][64]


def test_swd_sees_a_change_of_tone_on_the_coarsest_level_alone(small: Tensor) -> None:
    fine, middle, coarse = swd(small + 0.1, small).values()
    assert max(fine, middle) < 1
    assert coarse > 100


def test_spectrum_distance_is_zero_for_the_same_set_and_grows_with_blur(large: Tensor) -> None:
    images = large[:8]
    assert spectrum(images, images) == 0
    assert 0.05 < spectrum(blurred(images), images) < spectrum(blurred(images, 3), images)


def test_spectrum_distance_of_half_the_contrast_is_a_factor_of_four(small: Tensor) -> None:
    assert spectrum(small / 2, small) == pytest.approx(math.log10(4), abs=1e-4)


def test_high_frequency_ratio_of_white_noise_and_of_blur(large: Tensor) -> None:
    noise = torch.rand(8, 3, 96, 128, generator=rng())
    rings = (0.5**2 - 0.25**2) / (0.5**2 - 0.02**2)  # white noise has the power of a ring's area
    assert high_frequency_ratio(noise) == pytest.approx(rings, abs=0.01)
    assert high_frequency_ratio(blurred(large)) < 0.5 * high_frequency_ratio(large)


def test_sharpness_is_the_variance_of_the_laplacian(large: Tensor) -> None:
    grey = torch.rand(2, 1, 40, 50, generator=rng()).expand(2, 3, 40, 50)
    assert sharpness(grey) == pytest.approx(20 / 12, rel=0.1)  # white noise: (4 + 4^2) times its variance
    x = torch.linspace(0, 1, 40).expand(1, 3, 30, 40)
    assert sharpness(x) == pytest.approx(0, abs=1e-12)
    wave = torch.sin(torch.arange(42) * torch.pi / 2)[None] * torch.ones(41, 1)  # period 4, amplitude 1: its Laplacian is -2 times it
    assert sharpness(wave.expand(1, 3, 41, 42)) == pytest.approx(4 * 0.5, rel=1e-5)
    assert sharpness(blurred(large)) < 0.5 * sharpness(large)


def test_swd_is_that_of_sorted_projections_and_a_draw_is_that_set(small: Tensor) -> None:
    """Written out for one level; a draw with picture 0 twice is the distance of a set that holds it twice."""
    a, b = blurred(small[:4]), small[:4]
    generator = rng(3)
    found = sliced_distances(a, b, generator=generator, directions=16)
    replay = rng(3)
    level_a, level_b = laplacian_pyramid(a)[0], laplacian_pyramid(b)[0]
    y, x = torch.randint(0, 58, (4, 128), generator=replay), torch.randint(0, 58, (4, 128), generator=replay)
    patches_a, patches_b = patches_at(level_a, y, x).double(), patches_at(level_b, y, x).double()
    units = F.normalize(torch.randn(16, 147, generator=replay)).double()
    mean, std = patches_b.mean((0, 2, 3), keepdim=True), patches_b.std((0, 2, 3), keepdim=True)

    def by_hand(pictures: list[int]) -> float:
        rows = torch.tensor([128 * i + j for i in pictures for j in range(128)])
        projected = [(((p - mean) / std).flatten(1) @ units.T).sort(0).values for p in (patches_a[rows], patches_b)]
        return 1e3 * (projected[0] - projected[1]).abs().mean().item()

    assert list(found) == [64, 32, 16]
    for pictures in ([0, 1, 2, 3], [0, 0, 2, 3]):
        assert found[64](torch.tensor(pictures)) == pytest.approx(by_hand(pictures), rel=1e-4)


def test_power_above_the_native_nyquist_is_that_of_the_added_detail(small: Tensor) -> None:
    """White noise has it in proportion to the area of the ring; a picture enlarged from native size has next to none."""
    noise = torch.rand(16, 3, 128, 128, generator=rng())
    whole, upper = power_above(noise, frequency=0.02).mean(), power_above(noise, frequency=0.25).mean()
    assert float(upper / whole) == pytest.approx((0.5**2 - 0.25**2) / (0.5**2 - 0.02**2), abs=0.01)
    true = render(SEED, 8, 256)
    enlarged = F.interpolate(small[:8], size=256, mode="bicubic").clamp(0, 1)
    assert (power_above(enlarged, frequency=0.125) < 0.1 * power_above(true, frequency=0.125)).all()


def test_the_distance_to_the_base_is_the_psnr_of_means_of_areas(small: Tensor) -> None:
    bases = small[:3]
    large = bases.repeat_interleave(4, 2).repeat_interleave(4, 3)
    detail = torch.tensor([1.0, -1.0]).repeat(128).view(1, 1, 256, 1)  # falls out of the means
    assert (base_distance(large + 0.1 * detail, bases) > 99).all()
    torch.testing.assert_close(base_distance(large + 0.1, bases), torch.full((3,), 20.0))


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


def test_a_period_too_short_for_a_seam_score_is_refused() -> None:
    with pytest.raises(ValueError, match="period must be at least 16 and the sides twice 10, got period=8"):
        seam_score(torch.rand(2, 3, 64, 64, generator=rng()), period=8)


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
