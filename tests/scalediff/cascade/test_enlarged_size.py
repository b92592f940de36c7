"""The size to which a picture is enlarged where nobody names one."""

from __future__ import annotations

from typing import Any

import pytest

from scalediff.cascade.pipeline import enlarged_size

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (128, 128)), ((50, 37), (96, 72)), ((16, 16), (64, 64)), ((100, 200), (200, 400)), ((50, 30), (120, 72))],
)
def test_the_size_to_enlarge_to_has_the_shape_of_the_picture(demo: Any, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert enlarged_size(demo, Image.new("RGB", size[::-1])) == expected


def test_the_size_of_a_picture_that_wraps_has_whole_tokens_at_every_level(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo.unet.config
    levels = {"block_out_channels": (32, 32, 32, 32)}  # of which the last has tokens of 8 latents, 32 pixels
    monkeypatch.setattr(demo.unet, "_internal_dict", type(config)({**config, **levels}))
    picture = Image.new("RGB", (90, 64))
    assert [enlarged_size(demo, picture, wrap)[1] % 32 for wrap in ((False, False), (False, True))] == [8, 0]


@pytest.mark.parametrize("size", [(8, 900), (1, 1), (900, 8), (333, 7)])
def test_any_picture_has_a_size_to_enlarge_to(demo: Any, size: tuple[int, int]) -> None:
    height, width = enlarged_size(demo, Image.new("RGB", size[::-1]))
    assert height % 8 == width % 8 == 0
    assert height * width >= 64 * 64
