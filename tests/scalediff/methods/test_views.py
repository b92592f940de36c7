"""Views of a picture: where they lie, and how they are averaged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scalediff.methods.views import average, corners, starts
from tests.conftest import seeded


def test_views_are_those_of_the_paper() -> None:
    assert len(corners((512, 512), window=(128, 128), stride=(64, 64))) == 49  # four times the native side, half a window apart
    assert len(starts(256, window=64, stride=8)) == (256 - 64) / 8 + 1
    assert starts(64, window=64, stride=8) == [0]
    assert starts(27, window=8, stride=5) == [0, 5, 10, 15, 19]  # the last ends at the border
    assert starts(6, window=8, stride=4) == [0]


@pytest.mark.parametrize("size", [(16, 16), (23, 41), (17, 16), (100, 19)])
@pytest.mark.parametrize("stride", [(1, 1), (8, 8), (16, 16), (5, 7)])
def test_every_place_is_counted_by_the_views_that_cover_it(size: tuple[int, int], stride: tuple[int, int]) -> None:
    """Views of a picture average to the picture; a view of ones among zeros counts one in as many as cover a place."""
    x, where = torch.randn(2, 3, *size, generator=seeded()), corners(size, window=(16, 16), stride=stride)
    views = [x[..., y : y + 16, z : z + 16] for y, z in where]
    torch.testing.assert_close(average(views, where, size), x)
    cover = sum(torch.nn.functional.pad(torch.ones(16, 16), (z, size[1] - z - 16, y, size[0] - y - 16)) for y, z in where)
    assert isinstance(cover, Tensor)
    assert cover.min() >= 1
    marked = [torch.full((1, 1, 16, 16), float(i == 0)) for i in range(len(where))]
    expected = torch.nn.functional.pad(torch.ones(16, 16), (0, size[1] - 16, 0, size[0] - 16)) / cover
    torch.testing.assert_close(average(marked, where, size)[0, 0], expected)


def test_averages_are_summed_in_fp32_and_of_the_views_type() -> None:
    views = [torch.full((1, 1, 2, 2), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    mean = average(views, [(0, 0)] * 4, (2, 2))  # in bf16 the ones would be lost beside 256
    assert mean.dtype == torch.bfloat16
    assert torch.equal(mean, torch.full((1, 1, 2, 2), 259 / 4).bfloat16())
    assert average([torch.ones(1, 1, 2, 2, dtype=torch.float64)], [(0, 0)], (2, 2)).dtype == torch.float64
