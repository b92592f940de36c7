"""The filters of pictures and latents that methods share: sharpening, blur, the wavelet db4, and a Butterworth filter by FFT.

Legend: B batch, C channels, Y x X picture or latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.generators import Generators

# The scaling filter of Daubechies' wavelet with four vanishing moments, in the order of synthesis; analysis has it reversed.
_DB4 = (
    0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854, -0.18703481171909309, 0.030841381835560764,
    0.0328830116668852, -0.010597401785069032,
)  # fmt: skip
_TAPS = len(_DB4)


def sharpened(x: Tensor, *, std: Sequence[float], amount: float = 1.0) -> Tensor:
    """Add the difference between `[B, C, Y, X]` and its blur: `x + amount (x - blur(x))`.

    The blur is a Gaussian of 3 x 3 taps with a reflected border, and a standard deviation in pixels for each of the B pictures, or one for
    all of them.
    """
    stds = torch.tensor(list(std), dtype=torch.float64)
    side = torch.exp(-0.5 / stds**2)
    taps = torch.stack([side, torch.ones_like(side), side], dim=1)
    taps = (taps / taps.sum(1, keepdim=True)).to(x).expand(len(x), 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    (y, width), weights = x.shape[-2:], taps.view(-1, 3, 1, 1, 1).unbind(1)
    rows = weights[0] * padded[:, :, :y] + weights[1] * padded[:, :, 1 : y + 1] + weights[2] * padded[:, :, 2:]
    blurred = weights[0] * rows[..., :width] + weights[1] * rows[..., 1 : width + 1] + weights[2] * rows[..., 2:]
    return x + amount * (x - blurred)


def drawn_stds(generator: Generators) -> list[float]:
    """The standard deviation of the blur of `sharpened` in pixels, uniform in (0.1, 2): one for each generator of a run."""
    generators = generator if isinstance(generator, list) else [generator]
    return [0.1 + 1.9 * float(torch.rand((), generator=one, device=one.device)) for one in generators]


def approximation(x: Tensor) -> Tensor:
    """The approximation band of a one-level 2-D wavelet transform of `[B, C, Y, X]`: db4, half-sample symmetric extension.

    Equal to pywt.dwt2(x, "db4", mode="symmetric"): `[B, C, (Y + 7) // 2, (X + 7) // 2]`.
    """
    return _analyse(_analyse(x, 2), 3)


def with_approximation(x: Tensor, band: Tensor) -> Tensor:
    """Replace the approximation band of `[B, C, Y, X]` by `band`, of the size that `approximation` gives, and transform back.

    The transform is linear and inverts itself, so this adds the synthesis of the difference of the two bands.
    """
    difference = band - approximation(x)
    return x + _synthesise(_synthesise(difference, 3, x.shape[3]), 2, x.shape[2])


def _analyse(x: Tensor, axis: int) -> Tensor:
    """Low-pass analysis along an axis: out[k] = sum over j of h[j] x[2 k + 1 - j], with h the reversed `_DB4`."""
    length = x.shape[axis]
    places = torch.arange(-(_TAPS - 2), length + _TAPS - 1, device=x.device) % (2 * length)
    extended = x.index_select(axis, torch.minimum(places, 2 * length - 1 - places)).movedim(axis, -1)
    kernel = x.new_tensor(_DB4).view(1, 1, -1)  # conv1d correlates, so the reversed filter is reversed again
    flat = F.conv1d(extended.reshape(-1, 1, extended.shape[-1]), kernel, stride=2)
    count = (length + _TAPS - 1) // 2
    return flat[..., :count].reshape(*extended.shape[:-1], count).movedim(-1, axis)


def _synthesise(band: Tensor, axis: int, length: int) -> Tensor:
    """Low-pass synthesis along an axis, cut to `length`: out[n] = sum over k of g[n + 6 - 2 k] band[k], with g = `_DB4`."""
    moved = band.movedim(axis, -1)
    kernel = band.new_tensor(_DB4).view(1, 1, -1)
    flat = F.conv_transpose1d(moved.reshape(-1, 1, moved.shape[-1]), kernel, stride=2)
    return flat[..., _TAPS - 2 : _TAPS - 2 + length].reshape(*moved.shape[:-1], length).movedim(-1, axis)


def butterworth(x: Tensor, *, cutoff: float, order: int = 4) -> Tensor:
    """Low-pass `[B, C, Y, X]` by FFT with 1 / (1 + (d / cutoff)^(2 order)), d the distance from zero in units of the Nyquist frequency."""
    y, x_ = (2 * torch.fft.fftfreq(n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    squared = (y[:, None] ** 2 + x_[None, :] ** 2) / cutoff**2
    found: Tensor = torch.fft.ifft2(torch.fft.fft2(x) / (1 + squared**order)).real
    return found


def blur(x: Tensor, *, taps: int, std: float) -> Tensor:
    """Gaussian blur of `[B, C, Y, X]` with an odd number of taps per axis and zero padding."""
    distance = torch.arange(taps, dtype=torch.float64) - taps // 2
    kernel = torch.softmax(-(distance**2) / (2 * std**2), dim=0).to(x)
    channels, half = x.shape[1], taps // 2
    along_y, along_x = kernel.view(1, 1, -1, 1), kernel.view(1, 1, 1, -1)
    x = F.conv2d(x, along_y.expand(channels, -1, -1, -1), padding=(half, 0), groups=channels)
    return F.conv2d(x, along_x.expand(channels, -1, -1, -1), padding=(0, half), groups=channels)


def standardised(x: Tensor, like: Tensor) -> Tensor:
    """Shift and scale `[B, C, Y, X]` to the mean and standard deviation per sample of `like`, which may have another grid."""
    mean, std = (getattr(x, name)(dim=(1, 2, 3), keepdim=True) for name in ("mean", "std"))
    target_mean, target_std = (getattr(like, name)(dim=(1, 2, 3), keepdim=True) for name in ("mean", "std"))
    found: Tensor = (x - mean) / std * target_std + target_mean
    return found
