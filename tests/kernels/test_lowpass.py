"""Low-pass filters, latent frequency mixing and structure guidance, against matrices written from the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scalediff_kernels import guide_structure, low_pass, mix_frequencies
from scalediff_kernels.lowpass.geometry import coarse_length

SHAPES = [(16, 16), (12, 20), (17, 23), (64, 33)]


def resize_matrix(n_in: int, n_out: int, *, antialias: bool) -> Tensor:
    """Triangle filter sampled at pixel centres, rows normalised: bilinear, widened by the scale when it reduces."""
    scale = n_in / n_out
    support = max(scale, 1.0) if antialias else 1.0
    rows = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        center = (i + 0.5) * scale - 0.5
        if antialias:
            weights = [max(0.0, 1 - abs(j - center) / support) for j in range(n_in)]
        else:
            center = min(max(center, 0.0), n_in - 1.0)
            weights = [max(0.0, 1 - abs(j - center)) for j in range(n_in)]
        rows[i] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return rows


def picture(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [0.125, 0.25, 0.5, 0.7, 1.0])
def test_resize_is_two_matrices_per_axis(shape: tuple[int, int], cutoff: float) -> None:
    x = picture(shape)
    axes = []
    for n in shape:
        m = int(n * cutoff)
        axes.append(resize_matrix(m, n, antialias=False) @ resize_matrix(n, m, antialias=True))
    torch.testing.assert_close(low_pass(x, cutoff=cutoff), axes[0] @ x @ axes[1].T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [0.1, 0.125, 0.25, 0.5, 0.9])
def test_dc_gain_is_one(shape: tuple[int, int], cutoff: float) -> None:
    x = torch.full((1, 2, *shape), -3.7, dtype=torch.float64)
    torch.testing.assert_close(low_pass(x, cutoff=cutoff), x, rtol=1e-13, atol=0)


def test_cutoff_one_keeps_everything() -> None:
    x = picture((16, 12))
    torch.testing.assert_close(low_pass(x, cutoff=1.0), x, rtol=1e-13, atol=1e-13)


def test_low_frequencies_pass_and_high_ones_do_not() -> None:
    n = 64
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for cycles, low, high in ((1, 0.95, 1.0), (24, 0.0, 0.05)):
        wave = torch.cos(2 * math.pi * cycles * t).expand(1, 1, n, n)
        gain = (low_pass(wave, cutoff=0.25).std() / wave.std()).item()
        assert low <= gain <= high + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_filtered_in_fp32(dtype: torch.dtype) -> None:
    x = picture((17, 23)).to(dtype)
    out = low_pass(x, cutoff=0.25)
    exact = low_pass(x.double(), cutoff=0.25)
    assert out.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 32 * torch.finfo(torch.float32).eps  # one rounding, and fp32 sums of <= 32 taps
    assert ((out.double() - exact).abs() <= bound).all()


def test_mixing_takes_the_low_band_of_one_and_the_high_band_of_the_other() -> None:
    high, low = picture((16, 20), 1), picture((16, 20), 2)
    mixed = mix_frequencies(high, low, cutoff=0.25)
    torch.testing.assert_close(mixed, high - low_pass(high, cutoff=0.25) + low_pass(low, cutoff=0.25))
    torch.testing.assert_close(mix_frequencies(high, high, cutoff=0.25), high)
    torch.testing.assert_close(mix_frequencies(high, low, cutoff=1.0), low)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_guidance_is_its_definition(gamma: float) -> None:
    x0, reference = picture((16, 20), 3), picture((16, 20), 4)
    out = guide_structure(x0, reference, gamma=gamma, cutoff=0.25)
    expected = x0 + gamma * (low_pass(reference, cutoff=0.25) - low_pass(x0, cutoff=0.25))
    torch.testing.assert_close(out, expected)
    assert torch.equal(guide_structure(x0, reference, gamma=0.0, cutoff=0.25), x0)


@pytest.mark.parametrize("cutoff", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_cutoff_outside_its_range(cutoff: float) -> None:
    with pytest.raises(ValueError, match=r"cutoff must lie in \(0, 1\], got cutoff="):
        low_pass(torch.zeros(1, 1, 8, 8), cutoff=cutoff)


def test_cutoff_that_leaves_no_pixel() -> None:
    with pytest.raises(ValueError, match=r"at least one coarse pixel, got cutoff=0.1 for length=8"):
        low_pass(torch.zeros(1, 1, 16, 8), cutoff=0.1)
    assert coarse_length(8, 0.125) == 1


def test_bad_input_is_named() -> None:
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"floating point, got x.dtype=torch.int64"):
        low_pass(x.long(), cutoff=0.5)
    with pytest.raises(ValueError, match=r"x must be \[B, C, Y, X\].*\(8, 8\)"):
        low_pass(x[0, 0], cutoff=0.5)
    with pytest.raises(ValueError, match=r"kind must be one of resize, gaussian, butterworth, got kind='box'"):
        low_pass(x, cutoff=0.5, kind="box")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"got kind='gaussian'"):
        low_pass(x, cutoff=0.5, kind="gaussian")
    with pytest.raises(ValueError, match=r"high and low must agree.*\(1, 1, 8, 8\).*\(1, 1, 8, 9\)"):
        mix_frequencies(x, torch.zeros(1, 1, 8, 9), cutoff=0.5)
    with pytest.raises(ValueError, match=r"x0 and reference must agree.*float64"):
        guide_structure(x, x.double(), gamma=1.0, cutoff=0.5)
    with pytest.raises(ValueError, match=r"gamma must be finite, got gamma=nan"):
        guide_structure(x, x, gamma=float("nan"), cutoff=0.5)
