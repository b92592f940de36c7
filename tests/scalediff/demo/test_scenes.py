"""The renderer: one scene at every resolution, one disc in it, captions that tell the truth."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from scalediff.demo.scenes import PHRASES, VOCABULARY, caption, describe, luminance, render

# A matrix product may sum in another order for another batch; ridges turn a coordinate's rounding into R times that of a pixel.
ROUNDING = 1024 * 32 * torch.finfo(torch.float32).eps


def test_a_scene_is_a_function_of_its_seed_alone() -> None:
    batch = render(7, 5, 64)
    assert batch.shape == (5, 3, 64, 64)
    assert batch.min() >= 0
    assert batch.max() <= 1
    for i in (0, 3, 4):
        torch.testing.assert_close(render(7 + i, 1, 64)[0], batch[i], rtol=0, atol=ROUNDING)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_chunks_do_not_show() -> None:
    torch.testing.assert_close(render(0, 5, 1024)[4], render(4, 1, 1024)[0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("resolution", [128, 256])
def test_higher_resolution_is_the_same_scene_with_more_octaves(resolution: int) -> None:
    low, high = render(100, 8, 64), render(100, 8, resolution)
    shrunk = F.interpolate(high, size=64, mode="area")
    psnr = -10 * (shrunk - low).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.min() > 30
    blurred = F.interpolate(shrunk, size=resolution, mode="bicubic")
    detail = (high - blurred).square().mean()
    assert detail > 1e-5, "a larger render must hold what a smaller one cannot"


def test_the_disc_is_where_the_scene_says_and_brightest() -> None:
    images = luminance(render(200, 32, 128))
    axis = (torch.arange(128) + 0.5) / 128
    for i, image in enumerate(images):
        scene = describe(200 + i)
        inside = (axis[:, None] - scene.disc_y) ** 2 + (axis[None, :] - scene.disc_x) ** 2 < (scene.radius - 0.02) ** 2
        outside = (axis[:, None] - scene.disc_y) ** 2 + (axis[None, :] - scene.disc_x) ** 2 > (scene.radius + 0.02) ** 2
        assert image[inside].min() > image[outside].max() + 0.1


def test_captions_tell_the_truth() -> None:
    for seed in range(200):
        scene = describe(seed)
        text = f" {caption(scene, draw=seed % 5)} "
        for time in ("dawn", "day", "dusk", "night"):
            assert time == scene.time or not any(text.endswith(f" {p} ") for p in PHRASES[time])
        assert ("sun " in text) <= (scene.disc == "sun")
        assert ("moon " in text) <= (scene.disc == "moon")
        assert ("mountains" in text or "peaks" in text) <= (scene.terrain == "mountains")
        for place in ("left", "right"):
            assert (f" {place} " in text) <= (scene.place == place)


def test_every_word_of_every_phrase_is_in_the_vocabulary() -> None:
    assert {word for options in PHRASES.values() for p in options for word in p.split()} <= set(VOCABULARY)


def test_bad_input_is_named() -> None:
    for arguments in ((-1, 1, 64), (0, 0, 64), (0, 1, 8)):
        with pytest.raises(ValueError, match=r"seed >= 0, n >= 1 and resolution >= 16, got seed="):
            render(*arguments)
