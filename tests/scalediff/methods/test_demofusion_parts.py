"""The parts of DemoFusion: cosine factors, phases, views, dilated samples, the blur."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.methods import DemoFusion
from scalediff.methods.demofusion import Canvas, blur, factors, phase_sizes, standardised
from tests.conftest import seeded


def test_cosine_factors() -> None:
    start, middle, end = (factors(t, of=1000, cosine_scale=(3.0, 1.0, 2.0)) for t in (1000, 500, 0))
    assert start == (1, 1, 1)
    assert middle == pytest.approx((0.125, 0.5, 0.2575))
    assert end == pytest.approx((0, 0, 0.01))


def test_phases_are_whole_multiples_up_to_the_target(demo: Any) -> None:
    assert phase_sizes(demo, 256, 256) == [(64, 64), (128, 128), (192, 192), (256, 256)]
    assert phase_sizes(demo, 64, 64) == [(64, 64)]
    sizes = phase_sizes(demo, 256, 192)
    assert sizes == [(72, 56), (144, 112), (216, 168), (256, 192)]


def canvas(size: tuple[int, int], phase: int, *, stride: int = 64, seed: int | None = 0, window: int = 128) -> Canvas:
    jitter = None if seed is None else seeded(seed)
    side = min(size[0], window), min(size[1], window)
    return Canvas(size, side, (stride, stride), phase, 8, 1000, DemoFusion(), jitter)


def test_views_of_sdxl_at_4096_pixels() -> None:
    """49 of them on a margin of 16 latents, moved by at most 16 and at the border outward alone."""
    drawn = canvas((512, 512), 4)
    assert drawn.margin == (16, 16)
    seen = []
    for _ in range(20):
        where = drawn.jittered()
        assert len(where) == 49
        for n, corner in enumerate(where):
            seen += [(place, start - 16 - 64 * place) for place, start in zip(divmod(n, 7), corner, strict=True)]
    for place in range(7):
        moves = {move for where, move in seen if where == place}
        low, high = (0 if place == 6 else -16), (0 if place == 0 else 16)
        assert (min(moves), max(moves)) == (low, high)
    assert canvas((512, 512), 4, seed=None).jittered()[8] == (80, 80)
    assert set(canvas((128, 256), 2).jittered()) <= {(16, x) for x in range(257)}


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (64, 18)])
@pytest.mark.parametrize("stride", [4, 8, 15])
def test_every_place_is_covered_wherever_the_views_move(size: tuple[int, int], stride: int) -> None:
    drawn = canvas(size, 2, stride=stride, window=16)
    (y, x), ones = drawn.margin, torch.zeros(size[0] + 2 * drawn.margin[0], size[1] + 2 * drawn.margin[1])
    for _ in range(10):
        count = torch.zeros_like(ones)
        for i, j in drawn.jittered():
            assert i >= 0
            assert j >= 0
            assert count[i : i + 16, j : j + 16].shape == (16, 16)
            count[i : i + 16, j : j + 16] += 1
        assert count[y : y + size[0], x : x + size[1]].min() >= 1


@pytest.mark.parametrize(("size", "phase"), [((32, 32), 2), ((48, 32), 3), ((33, 47), 3)])
def test_dilated_samples_cover_the_picture_once(size: tuple[int, int], phase: int) -> None:
    """s x s of them, of a size; put together again they are what they were taken from."""
    x, seen = torch.randn(2, 4, *size, generator=seeded()), []

    class Echo:
        latents = x

        def __call__(self, views: list[Tensor], crops: Any = None) -> list[Tensor]:
            seen.extend(views)
            return views

    found = canvas(size, phase, window=16).dilated(Echo(), std=1e-3)  # type: ignore[arg-type]
    assert len(seen) == phase**2
    assert {tuple(view.shape[-2:]) for view in seen} == {(math.ceil(size[0] / phase), math.ceil(size[1] / phase))}
    torch.testing.assert_close(found, x)


def test_blur_is_a_gaussian_and_keeps_a_plane() -> None:
    x = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    x[0, 1, 4, 4] = 1
    found = blur(x, taps=5, std=0.7)
    assert found[0, 0].abs().max() == 0
    assert found.sum() == pytest.approx(1)
    assert found[0, 1, 4, 5] / found[0, 1, 4, 4] == pytest.approx(math.exp(-1 / (2 * 0.49)))
    assert found[0, 1, 3, 5] / found[0, 1, 4, 4] == pytest.approx(math.exp(-1 / 0.49))
    assert found[0, 1, 4, 7] == 0
    assert torch.equal(blur(x, taps=7, std=0.01), x)


def test_standardised_takes_mean_and_deviation_of_every_sample() -> None:
    x, like = (
        torch.randn(2, 4, 6, 6, generator=seeded()),
        torch.randn(2, 4, 3, 5, generator=seeded(1)) * torch.tensor([2.0, 5.0]).view(2, 1, 1, 1) + 3,
    )
    found = standardised(x, like)
    for i in range(2):
        torch.testing.assert_close(found[i].mean(), like[i].mean())
        torch.testing.assert_close(found[i].std(), like[i].std())
