"""Repetition is the count of its definition by brute force, grows with copies of a subject, and nothing else moves it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.repetition import repetition

# Where copies of a subject go, in eighths of the side: no two in one row of patches at the same distance.
PLACES = ((1.0, 1.1), (1.3, 4.9), (4.1, 2.7), (5.7, 5.6), (6.2, 0.9))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subject(side: int, seed: int) -> tuple[Tensor, Tensor]:
    """A texture, and its opacity, which fades towards the border."""
    texture = F.interpolate(torch.rand(1, 3, 10, 10, generator=rng(seed)), (side, side), mode="bicubic")
    fade = torch.hann_window(side, periodic=False)
    return texture, fade[:, None] * fade


def with_subjects(copies: int, *, side: int = 256, subjects: tuple[int, ...] = (0,), background: float = 0.02) -> Tensor:
    """A noisy plain picture with a subject of three sixteenths of its side, pasted at some places; of several subjects in turn."""
    noise = F.interpolate(torch.rand(1, 3, 64, 64, generator=rng(9)), (side, side), mode="bilinear")
    image = 0.5 + background * (noise - 0.5)
    width = 3 * side // 16
    for i, place in enumerate(PLACES[:copies]):
        y, x = (round(side * eighths / 8) for eighths in place)
        texture, opacity = subject(width, subjects[i % len(subjects)])
        below = image[:, :, y : y + width, x : x + width]
        below += opacity * (texture - below)
    return image.clamp(0, 1)


def value(image: Tensor) -> float:
    return float(repetition(image))


def by_brute_force(image: Tensor) -> float:
    """Of a picture whose shorter side is the working size: every patch against every window, the counts pixel by pixel."""
    luma = np.tensordot([0.299, 0.587, 0.114], image[0].double().numpy(), 1)
    gradient = np.stack(np.gradient(luma), 2)
    raw = np.lib.stride_tricks.sliding_window_view(gradient - gradient.mean((0, 1)), (16, 16), (0, 1))
    windows = (raw - raw.mean((3, 4), keepdims=True)).reshape(*raw.shape[:2], -1)
    norm = np.sqrt(np.square(windows).sum(2))
    products = windows @ windows[::8, ::8].reshape(-1, windows.shape[2]).T
    counts = []
    for number, (y, x) in enumerate((y, x) for y in range(0, norm.shape[0], 8) for x in range(0, norm.shape[1], 8)):
        energy = np.einsum("aij,bij->ab", raw[y, x], raw[y, x])
        if norm[y, x] < 16 * 0.01 or np.linalg.eigvalsh(energy)[0] < 0.2 * np.trace(energy):
            continue
        ncc = np.where(norm >= 16 * 0.01, products[:, :, number] / np.maximum(norm, 1e-9) / norm[y, x], 0)
        places = np.argwhere(ncc > 0.7)
        maxima = [(i, j) for i, j in places if ncc[i, j] == ncc[max(i - 12, 0) : i + 13, max(j - 12, 0) : j + 13].max()]
        assert (y, x) in maxima
        counts.append(len(maxima) - 1)
    return float(np.mean(counts))


def test_it_is_the_count_of_a_computation_by_brute_force() -> None:
    image = with_subjects(4, side=128, background=0.3)
    image = torch.cat([image, image[..., :24].flip(2)], 3)
    expected = by_brute_force(image)
    assert expected > 0.1
    assert value(image) == pytest.approx(expected, abs=1e-12)


def test_it_grows_with_the_copies_of_a_subject() -> None:
    found = [value(with_subjects(copies)) for copies in (1, 2, 3, 4, 5)]
    for k, one in enumerate(found):
        assert one == pytest.approx(k, rel=0.25, abs=0.05)


def test_different_subjects_are_no_repetition() -> None:
    assert value(with_subjects(5, subjects=(0, 1, 2, 3, 4))) < 0.5
    assert 0.5 < value(with_subjects(4, subjects=(0, 1))) < 1.5


def test_copies_before_a_detailed_background_raise_it_by_their_share_of_the_patches() -> None:
    found = [value(with_subjects(copies, background=0.3)) for copies in (1, 2, 4)]
    assert found[0] == 0
    for fewer, more in pairwise(found):
        assert fewer + 0.02 < more < 1


@pytest.mark.parametrize("side", [128, 384, 1024])
def test_pixels_per_side_hardly_change_it(side: int) -> None:
    for copies in (1, 3):
        image = with_subjects(copies, side=512)
        resized = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        assert value(resized) == pytest.approx(value(image), abs=0.1)


def test_noise_shades_edges_and_one_colour_are_no_repetition() -> None:
    ramp = torch.linspace(0, 1, 200)
    hill = torch.exp(-((ramp[:, None] - 0.4) ** 2 + (ramp - 0.6) ** 2) / 0.1)
    edge = (ramp[:, None] + 0.3 * ramp > 0.6).float()
    plain = {"noise": torch.rand(200, 200, generator=rng(1)), "colour": torch.full((200, 200), 0.3), "black": torch.zeros(200, 200),
             "ramp": ramp.expand(200, 200), "hill": hill, "edge": edge}  # fmt: skip
    for name, luma in plain.items():
        found = value(luma.expand(1, 3, 200, 200))
        assert np.isfinite(found), name
        assert found < 0.05, name


def test_pictures_of_a_batch_and_of_any_shape_are_counted_one_by_one() -> None:
    batch = torch.cat([with_subjects(1), with_subjects(3)])
    assert repetition(batch).tolist() == [value(batch[:1]), value(batch[1:])]
    oblong = torch.cat([with_subjects(3), torch.full((1, 3, 256, 300), 0.5)], 3)
    assert value(oblong) == pytest.approx(2, rel=0.25)
    assert value(oblong.mT) == pytest.approx(2, rel=0.25)


def test_pictures_below_the_working_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides of at least 128 for their repetition, got .*\(1, 3, 127, 300\)"):
        repetition(torch.zeros(1, 3, 127, 300))
