"""What a set of pictures says without any trained network: discs counted, patches, spectra and seams compared.

All pictures are `[N, 3, Y, X]` in [0, 1]; spectra and seams look at their Rec. 601 luma. The definitions are those usual
in the literature, taken weight-free so that a machine without downloads gives the same numbers.

Legend: N pictures, Y x X pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.demo.scenes import luminance

# Between the brightest pixel outside a disc of a true render, 0.72, and the dimmest one in a disc, 0.88 (both at any resolution).
_DISC_EDGE, _DISC_RISE = 0.76, 0.04
# The same for one hour, above the brightest pixel outside: 0.70, 0.72, 0.55, 0.38.
FAINT_EDGES: Mapping[str, float] = {"dawn": 0.73, "day": 0.75, "dusk": 0.58, "night": 0.42}
_SMALLEST_RADIUS = 0.125  # of a true disc, in picture sides
_BINOMIAL3 = (0.25, 0.5, 0.25)
_BINOMIAL5 = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)

_BAND = (0.02, 0.5)  # cycles per pixel: below it the window's own spectrum, above it the corners of the plane
_CONTROLS = (0.75, 0.875, 0.9375, 1.0625, 1.125, 1.25)  # control periods over the period

Statistic = Callable[[Tensor], float]  # of numbers of pictures, which may be in it more than once


def mean_of(values: Tensor) -> Statistic:
    """The mean of `[N]` values."""
    return lambda chosen: float(values[chosen].double().mean())


def resamples(pictures: int, count: int) -> list[Tensor]:
    """`count` draws of `pictures` numbers of pictures with replacement. The same call gives the same draws: they pair sets."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(pictures, (pictures,), generator=generator) for _ in range(count)]


def replicated(statistic: Statistic, draws: Sequence[Tensor]) -> Tensor:
    """`[R]` fp64 values of a statistic for the draws of a bootstrap."""
    return torch.tensor([statistic(draw) for draw in draws], dtype=torch.float64)


def count_discs(images: Tensor, *, native: int = 64, edges: float | Tensor = _DISC_EDGE) -> Tensor:
    """Number of suns or moons in each picture of a scene of `scalediff.demo.scenes`.

    A disc is an 8-connected region of the slightly blurred luma (binomial, 3 x 3) that is above `edges`, a number or one for each picture,
    reaches 0.04 more, and has at least a quarter of the area of a disc of half the smallest native radius, at `native` pixels per side.
    So a disc drawn at its native size in pixels counts as one drawn at its true size does, and a speck does not. With `FAINT_EDGES` of the
    hours of the scenes, discs that are dimmer than any true one count too. `[N]` int64.
    """
    luma = _blur(luminance(images)[:, None], _BINOMIAL3)[:, 0]
    edge = torch.as_tensor(edges, dtype=luma.dtype).expand(len(luma))[:, None]
    labels = _components(luma > edge[:, :, None]).flatten(1)
    area = torch.zeros(labels.shape[0], labels.shape[1] + 1)  # the first cell: outside every region
    area.scatter_add_(1, labels, torch.ones_like(labels, dtype=area.dtype))
    peak = torch.zeros_like(area).scatter_reduce_(1, labels, luma.flatten(1).to(area.dtype), "amax")
    smallest = 0.25 * math.pi * (0.5 * _SMALLEST_RADIUS * native) ** 2
    return ((area >= smallest) & (peak > edge + _DISC_RISE))[:, 1:].sum(1)


def disc_columns(images: Tensor) -> Tensor:
    """`[N]` horizontal centre of what is bright as a disc, in picture sides; NaN where nothing is."""
    bright = (_blur(luminance(images)[:, None], _BINOMIAL3)[:, 0] > _DISC_EDGE).to(images.dtype).sum(1)
    x = (torch.arange(images.shape[3], dtype=images.dtype) + 0.5) / images.shape[3]
    return (bright * x).sum(1) / bright.sum(1)


def sky_colors(images: Tensor) -> Tensor:
    """`[N, 3]` median colour of the upper half: where the hour of a scene shows."""
    return images[:, :, : images.shape[2] // 2].flatten(2).median(2).values


def sliced_distances(a: Tensor, b: Tensor, *, generator: torch.Generator, directions: int) -> dict[int, Statistic]:
    """Sliced Wasserstein distance between the patches of two sets of pictures, per level of their Laplacian pyramids.

    From every level of every picture 128 patches of 7 x 7 x 3 at random places (the same in both sets), compared by `sliced_distance`; by
    the shorter side of the level in pixels, from the finest level to 16. Fine levels show texture, coarse ones layout; the coarsest is
    the low-pass residual. `generator` draws places and directions; the same state makes two calls comparable.

    Karras et al., arXiv:1710.10196, section 5; there each set is standardised by itself.
    """
    found = {}
    for level_a, level_b in zip(laplacian_pyramid(a), laplacian_pyramid(b), strict=True):
        y, x = (torch.randint(0, n - 6, (len(level_a), 128), generator=generator) for n in level_a.shape[2:])
        patches = (patches_at(level, y, x).unflatten(0, y.shape) for level in (level_a, level_b))
        found[min(level_a.shape[2:])] = sliced_distance(*patches, generator=generator, directions=directions)
    return found


def sliced_distance(a: Tensor, b: Tensor, *, generator: torch.Generator, directions: int) -> Statistic:
    """Sliced Wasserstein distance between the patches `[N, P, 3, 7, 7]` of two sets, as a function of numbers of pictures of a.

    Every colour channel is standardised over b, the reference (with statistics of its own, a set would hide lost contrast); projected on
    random unit directions; the mean absolute difference of the sorted projections, times 1000. Sets with different numbers of patches
    are compared at the same quantiles.
    """
    std, mean = torch.std_mean(b, dim=(0, 1, 3, 4), keepdim=True)
    units = F.normalize(torch.randn(directions, b[0, 0].numel(), generator=generator)).to(b)
    ours, theirs = (units @ ((x - mean) / std.clamp(min=1e-8)).flatten(2).flatten(0, 1).T for x in (a, b))
    theirs = theirs.sort().values
    ours, order = ours.sort()
    owner = order // a.shape[1]  # the picture that a value is of
    count = min(ours.shape[1], theirs.shape[1])
    at_a, at_b = (((torch.arange(count) + 0.5) / count * x.shape[1]).long() for x in (ours, theirs))

    def distance(chosen: Tensor) -> float:
        times = chosen.bincount(minlength=len(a))[owner]
        drawn = ours.flatten().repeat_interleave(times.flatten()).view(len(ours), -1)  # sorted, as `ours` is
        return 1e3 * float((drawn[:, at_a] - theirs[:, at_b]).abs().mean())

    return distance


def spectrum_distance(ours: Tensor, theirs: Tensor) -> Statistic:
    """Distance of two radial power spectra, `[N, R]` and `[M, R]` of `radial_power`: the mean of `|log10 P - log10 P'|` over the rings.

    P is averaged over the pictures. 0.3 is a factor of 2 in power.
    """
    target = theirs.mean(0).clamp(min=1e-30).log10()
    return lambda chosen: float((ours[chosen].mean(0).clamp(min=1e-30).log10() - target).abs().mean())


def radial_power(images: Tensor) -> Tensor:
    """`[N, R]` fp64 mean power of each picture on the rings of integer radius from 0.02 to 0.5 cycles per pixel.

    It is that of the luma, its mean removed and a Hann window applied on both axes.
    """
    side = min(images.shape[2:])
    rings = (_frequency(*images.shape[2:]) * side).round().long().flatten()  # integer radius, in cycles per shorter side
    kept = slice(math.ceil(_BAND[0] * side), math.floor(_BAND[1] * side) + 1)
    sums = torch.zeros(len(images), int(rings.max()) + 1, dtype=torch.float64)
    return (sums.index_add_(1, rings, _power(images).flatten(1)) / rings.bincount())[:, kept]


def power_above(images: Tensor, *, frequency: float) -> Tensor:
    """`[N]` fp64 power of each picture from `frequency` to 0.5 cycles per pixel, as in `radial_power`."""
    return _power_above(images, frequency)[0]


def base_distance(images: Tensor, bases: Tensor) -> Tensor:
    """`[N]` PSNR in dB of pictures, shrunk to the size of the base pictures `[N, 3, y, x]` by the mean of each area, against them."""
    error = (F.interpolate(images, size=bases.shape[2:], mode="area") - bases).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def high_frequency_ratio(images: Tensor) -> float:
    """Share of the power between 0.02 and 0.5 cycles per pixel that lies above 0.25, averaged over the pictures.

    Power as in `radial_power`. Smoothed pictures have a low ratio, noisy ones a high one; the truth lies between.
    """
    high, whole = _power_above(images, 0.25, _BAND[0])
    return (high / whole.clamp(min=1e-30)).mean().item()


def sharpness(images: Tensor) -> float:
    """Variance of the Laplacian (four neighbours less four times the pixel) of the luma in each picture, averaged over the pictures.

    It is of the pixels as they are: the same scene in more pixels has a smaller variance. Noise is sharp too.
    """
    luma = luminance(images.double())
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * luma[:, 1:-1, 1:-1]
    return laplacian.var((1, 2), correction=0).mean().item()


def seam_score(images: Tensor, *, period: int) -> dict[int, float]:
    """How much steeper pictures are at multiples of a period than elsewhere, in robust standard deviations.

    Along an axis, g(x) is the mean over the other axis of `|Y(x + 1) - Y(x)|`, less its moving median over three periods,
    averaged over x modulo the period. The score is the value at the border (between pixels kP - 1 and kP), less the median of
    all phases, over 1.4826 times their median absolute deviation; it is averaged over the pictures and both axes. A seam
    stands out of the same score at control periods, 0.75 to 1.25 of the period, by 3 or more. Returns scores by period: the
    period itself first, then the controls. ValueError where the period is below 16, or a side below two of the longest control period.
    """
    controls = [round(period * factor) for factor in _CONTROLS]
    if period < 16 or min(images.shape[2:]) < 2 * max(controls):
        raise ValueError(f"the period must be at least 16 and the sides twice {max(controls)}, got {period=}, {tuple(images.shape)=}")
    luma = luminance(images.double())
    steps = luma.diff(dim=1).abs().mean(2), luma.diff(dim=2).abs().mean(1)
    return {p: sum(_border_z(g, p) for g in steps) / 2 for p in (period, *controls)}


def _border_z(g: Tensor, period: int) -> float:
    """Mean over the pictures of `[N, L]` steps of the robust z of phase `period - 1`."""
    reach = 3 * period // 2
    around = F.pad(g[:, None], (reach, reach), mode="replicate")[:, 0].unfold(1, 2 * reach + 1, 1)
    rest = g - around.median(2).values
    phases = torch.arange(g.shape[1]) % period
    folded = torch.zeros(g.shape[0], period, dtype=g.dtype).index_add_(1, phases, rest) / phases.bincount()
    centred = folded - folded.median(1, keepdim=True).values
    spread = 1.4826 * centred.abs().median(1).values
    return (centred[:, -1] / spread.clamp(min=1e-12)).mean().item()


def _components(mask: Tensor) -> Tensor:
    """`[N, Y, X]` int64: 0 outside the mask, else a number from 1 to Y * X that an 8-connected region shares.

    A pixel takes the largest number around it, then the number of the pixel it now points at: regions of any shape settle in
    some log2 of their length instead of their length.
    """
    _, height, width = mask.shape
    labels = torch.arange(1, height * width + 1, dtype=torch.int32).view(1, height, width) * mask
    inside = mask.flatten().nonzero()[:, 0]
    before = inside - inside % (height * width) - 1  # the place of the number 0 of each pixel's picture
    while True:
        spread = F.pad(labels, (1, 1, 1, 1))
        for dim, size in ((1, height), (2, width)):
            spread = torch.maximum(torch.maximum(spread.narrow(dim, 0, size), spread.narrow(dim, 2, size)), spread.narrow(dim, 1, size))
        flat = spread.flatten()
        jumped = torch.zeros_like(flat)
        jumped[inside] = flat[before + flat[inside]]
        if torch.equal(jumped, labels.flatten()):
            return labels.long()
        labels = jumped.view_as(labels)


def _blur(images: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Separable filter of every channel, mirrored at the borders. Sums of shifted pictures: on a CPU faster than convolutions by far."""
    blurred = F.pad(images, (len(taps) // 2,) * 4, mode="reflect")
    for dim in (2, 3):
        first, *others = (blurred.narrow(dim, i, images.shape[dim]) for i in range(len(taps)))
        blurred = taps[0] * first
        for tap, shifted in zip(taps[1:], others, strict=True):
            blurred.add_(shifted, alpha=tap)
    return blurred


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Band-pass levels from the finest on, and the low-pass residual, whose shorter side is the last one not below 16."""
    levels = []
    while min(images.shape[2:]) >= 32:
        coarse = _blur(images, _BINOMIAL5)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = 4 * coarse
        levels.append(images - _blur(spread, _BINOMIAL5))
        images = coarse
    return [*levels, images]


def patches_at(level: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`[N * P, 3, 7, 7]` from the `[N, P]` top rows and left columns of patches inside the level."""
    reach, picture = torch.arange(7), torch.arange(level.shape[0])[:, None, None, None]
    return level.permute(0, 2, 3, 1)[picture, y[:, :, None, None] + reach[:, None], x[:, :, None, None] + reach].flatten(0, 1).movedim(3, 1)


def _power_above(images: Tensor, *frequencies: float) -> list[Tensor]:
    power, radius = _power(images), _frequency(*images.shape[2:])
    return [power[:, (radius >= frequency) & (radius <= _BAND[1])].sum(1) for frequency in frequencies]


def _power(images: Tensor) -> Tensor:
    """`[N, Y, X]` fp64 power of the windowed luma: smooth pictures fall to 1e-10 of their peak, below what fp32 resolves."""
    luma = luminance(images.double())
    window_y, window_x = (torch.hann_window(n, periodic=False, dtype=luma.dtype) for n in luma.shape[1:])
    windowed = (luma - luma.mean((1, 2), keepdim=True)) * window_y[:, None] * window_x
    power: Tensor = torch.fft.fft2(windowed).abs().square()
    return power


def _frequency(height: int, width: int) -> Tensor:
    """`[Y, X]` distance from zero frequency, in cycles per pixel."""
    y, x = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
    return torch.hypot(*torch.meshgrid(y, x, indexing="ij"))
