"""What the filters' benchmark runs: pictures of some shapes, the operations on them, and the implementations of these.

Legend: B batch, C channels, Y x X pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness.timing import Call
from scalediff_kernels import GuidedStep, NoiseLevel, low_pass, mix_frequencies
from scalediff_kernels.lowpass.reference import low_pass_reference
from scalediff_kernels.steps.reference import guided_step_reference

CUTOFF, GAMMA, LEVEL = 0.125, 0.7, NoiseLevel.of_alpha_bar(0.4)
STD = math.sqrt(2 * math.log(2)) / (math.pi * CUTOFF)  # of a Gaussian with half of the amplitude at the cutoff
TAPS = 2 * math.ceil(4 * STD) + 1

Pictures = tuple[Tensor, ...]
Prepare = Callable[[Sequence[Pictures]], list[Call]]


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def identity(self) -> dict[str, str]:
        layout = "channels last" if self.channels_last else "planes"
        return {"case": self.name, "dtype": str(self.dtype).removeprefix("torch."), "layout": layout}

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pictures(self, device: str, sets: int) -> list[Pictures]:
        """Sets of x, model output and reference: the same numbers in separate memory."""
        rng = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        first = [torch.randn(self.shape, generator=rng).to(device, self.dtype).contiguous(memory_format=layout) for _ in range(3)]
        return [tuple(first), *(tuple(x.clone() for x in first) for _ in range(sets - 1))]


LATENTS = [
    Case(f"latent {b} x {c} x 512 x 512", (b, c, 512, 512), dtype)
    for dtype in (torch.float32, torch.float16)
    for b, c in ((1, 4), (4, 4), (1, 16), (4, 16))
]
FEATURES = [
    Case(f"features 1 x {c} x 512 x 512", (1, c, 512, 512), dtype, last)
    for dtype, c in ((torch.float32, 256), (torch.bfloat16, 512))
    for last in (False, True)
]


def eager_low_pass(x: Tensor) -> Tensor:
    """As it is written by hand: antialiased bilinear down, bilinear up."""
    size = [int(n * CUTOFF) for n in x.shape[-2:]]
    down = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(down, size=x.shape[-2:], mode="bilinear", align_corners=False)


def eager_mix(high: Tensor, low: Tensor) -> Tensor:
    return high + eager_low_pass(low - high)


def eager_step(x: Tensor, output: Tensor, reference: Tensor) -> Tensor:
    """One filter a step, its result moved into epsilon: the best that can be written by hand."""
    x0 = (x - LEVEL.noise * output) / LEVEL.signal
    return output - (GAMMA * LEVEL.signal / LEVEL.noise) * eager_low_pass(reference - x0)


def published_step(x: Tensor, output: Tensor, reference: Tensor) -> Tensor:
    """The definition line by line, with two filters a step, then back to epsilon."""
    x0 = (x - LEVEL.noise * output) / LEVEL.signal
    x0 = x0 + GAMMA * (eager_low_pass(reference) - eager_low_pass(x0))
    return (x - LEVEL.signal * x0) / LEVEL.noise


exact_low_pass = partial(low_pass_reference, cutoff=CUTOFF, kind="resize")
exact_step = partial(guided_step_reference, level=LEVEL, prediction="epsilon", gamma=GAMMA, cutoff=CUTOFF, kind="resize")


def our_steps(sets: Sequence[Pictures]) -> list[Call]:
    """Steps of one stage, which has made the coarse grid of its reference."""
    made = [(GuidedStep(reference, cutoff=CUTOFF, prediction="epsilon"), x, output) for x, output, reference in sets]
    return [partial(step, x, output, level=LEVEL, gamma=GAMMA) for step, x, output in made]


def fft_low_pass(x: Tensor) -> Tensor:
    """A radial Butterworth filter of order 4 through the Fourier transform."""
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(x.float()) * _butterworth(*x.shape[-2:], x.device), s=x.shape[-2:])
    return filtered.to(x.dtype)


@cache
def _butterworth(height: int, width: int, device: torch.device) -> Tensor:
    """The mask, made once as users do."""
    squared: Tensor = torch.fft.fftfreq(height, 0.5, device=device)[:, None] ** 2 + torch.fft.rfftfreq(width, 0.5, device=device) ** 2
    return 1 / (1 + (squared / CUTOFF**2) ** 4)


def torchvision_blur(x: Tensor) -> Any:
    return import_module("torchvision.transforms.functional").gaussian_blur(x, [TAPS, TAPS], [STD, STD])


def kornia_blur(x: Tensor) -> Any:
    return import_module("kornia.filters").gaussian_blur2d(x, (TAPS, TAPS), (STD, STD))


def each(function: Callable[..., Tensor]) -> Prepare:
    return lambda sets: [partial(function, *tensors) for tensors in sets]


def compiled(function: Callable[..., Tensor]) -> Prepare:
    def prepare(sets: Sequence[Pictures]) -> list[Call]:
        torch._dynamo.reset()  # or later shapes get one graph for all
        return each(torch.compile(function, fullgraph=True, dynamic=False))(sets)

    return prepare


class Operation(NamedTuple):
    name: str
    takes: tuple[int, ...]  # of x, model output and reference
    passes: int  # pictures read or written
    eager: Callable[..., Tensor]  # as it is written by hand
    exact: Callable[..., Tensor]  # as it is defined

    def tensors(self, pictures: Pictures) -> Pictures:
        return tuple(pictures[n] for n in self.takes)


@dataclass(frozen=True)
class Implementation:
    operation: Operation
    name: str
    prepare: Prepare  # makes the calls for some sets of tensors; what it does itself is not timed
    gate: Literal["budget", "shown", "other"] = "budget"  # of eager torch; or the error is shown; or another filter, that must be finite
    package: str = ""  # that it needs


STEP = Operation("guided step", (0, 1, 2), 4, eager_step, exact_step)
MIX = Operation("mix frequencies", (0, 2), 4, eager_mix, lambda high, low: high + exact_low_pass(low - high))
LOW_PASS = Operation("low pass", (0,), 2, eager_low_pass, exact_low_pass)
IMPLEMENTATIONS = (
    Implementation(STEP, "eager", each(eager_step)),
    Implementation(STEP, "scalediff", our_steps),
    Implementation(STEP, "eager, line by line", each(published_step), "shown"),
    Implementation(STEP, "torch.compile", compiled(eager_step)),
    Implementation(MIX, "eager", each(eager_mix)),
    Implementation(MIX, "scalediff", each(lambda high, low: mix_frequencies(high, low, cutoff=CUTOFF))),
    Implementation(MIX, "torch.compile", compiled(eager_mix)),
    Implementation(LOW_PASS, "eager", each(eager_low_pass)),
    Implementation(LOW_PASS, "scalediff", each(lambda x: low_pass(x, cutoff=CUTOFF))),
    Implementation(LOW_PASS, "torch.compile", compiled(eager_low_pass)),
    Implementation(LOW_PASS, "FFT, Butterworth", each(fft_low_pass), "other"),
    Implementation(LOW_PASS, "torchvision gaussian_blur", each(torchvision_blur), "other", "torchvision"),
    Implementation(LOW_PASS, "kornia gaussian_blur2d", each(kornia_blur), "other", "kornia"),
)
