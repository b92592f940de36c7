"""The filters that methods share: the wavelet is pywt's, the blur is the Gaussian that it says, the filter is what an FFT keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from scalediff.methods.frequencies import approximation, butterworth, sharpened, with_approximation
from tests.conftest import seeded


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 30), (5, 7)])
def test_the_wavelet_is_that_of_pywt(size: tuple[int, int]) -> None:
    """Odd sizes and signals shorter than the filter too."""
    pywt = pytest.importorskip("pywt")
    x = torch.randn(2, 3, *size, generator=seeded(), dtype=torch.float64)
    low, details = pywt.dwt2(x.numpy(), "db4", mode="symmetric")
    torch.testing.assert_close(approximation(x), torch.from_numpy(low), rtol=0, atol=1e-12)
    other = torch.randn(*low.shape, generator=seeded(1), dtype=torch.float64)
    expected = pywt.idwt2((other.numpy(), details), "db4", mode="symmetric")[..., : size[0], : size[1]]
    torch.testing.assert_close(with_approximation(x, other), torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_the_own_band_changes_nothing_and_that_of_a_plane_is_the_plane() -> None:
    x = torch.randn(1, 1, 12, 20, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(with_approximation(x, approximation(x)), x, rtol=0, atol=1e-12)
    plane = torch.full_like(x, 0.7)
    torch.testing.assert_close(approximation(plane), torch.full((1, 1, 9, 13), 1.4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(with_approximation(x - x.mean(), approximation(plane)).mean(), torch.tensor(0.7).double(), rtol=0.2, atol=0)


def test_sharpening_is_away_from_a_gaussian_blur_of_each_picture() -> None:
    x = torch.randn(2, 3, 7, 9, generator=seeded(), dtype=torch.float64)
    for amount, stds in ((1.0, (0.3, 1.7)), (0.5, (1.0,))):
        found = sharpened(x, std=stds, amount=amount)
        for i, std in enumerate(stds * 2 if len(stds) == 1 else stds):
            g = math.exp(-1 / (2 * std**2))
            kernel = torch.tensor([[g * g, g, g * g], [g, 1, g], [g * g, g, g * g]], dtype=torch.float64)
            padded = F.pad(x[i : i + 1], (1, 1, 1, 1), mode="reflect")
            blurred = F.conv2d(padded, (kernel / kernel.sum()).expand(3, 1, 3, 3), groups=3)
            torch.testing.assert_close(found[i : i + 1], x[i : i + 1] + amount * (x[i : i + 1] - blurred), rtol=0, atol=1e-12)
    assert torch.equal(sharpened(x, std=(1.0,), amount=0), x)


def test_butterworth_halves_a_wave_at_its_cutoff() -> None:
    """A cosine of f cycles over n pixels lies at 2 f / n of the Nyquist frequency; the distance is radial."""
    n, cutoff = 40, 0.2
    place = torch.arange(n, dtype=torch.float64)
    for fy, fx in ((4, 0), (0, 2), (3, 4), (10, 0), (0, 0)):
        wave = torch.cos(2 * math.pi * (fy * place[:, None] + fx * place[None, :]) / n).expand(1, 2, n, n)
        gain = 1 / (1 + (2 * math.hypot(fy, fx) / n / cutoff) ** 8)
        torch.testing.assert_close(butterworth(wave, cutoff=cutoff), gain * wave, rtol=0, atol=1e-12)
    assert 1 / (1 + (2 * 4 / n / cutoff) ** 8) == pytest.approx(0.5)
