"""Settings of the cascade, presets, and the picture sizes of its stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, get_args

from scalediff.arguments import (
    check_boolean,
    check_integer,
    check_mapping,
    check_number,
    check_text,
    check_wrap,
    choice,
    instance,
    wrong_type,
)
from scalediff_kernels.lowpass.geometry import Kind

Attention = Literal["npa", "full"]
Jitter = Literal["none", "alternate", "random"]
Anchor = Literal["picture", "trajectory"]
SizeConditioning = Literal["target", "native"]
PerStage = float | tuple[float, ...]
Multiple = int | tuple[int, int]  # of pixels, for both sides of a picture or for (height, width)
TILES: Mapping[str, tuple[bool, bool]] = {"x": (False, True), "y": (True, False), "xy": (True, True)}  # names of `Settings.wrap`

_PER_STAGE = ("restart", "lfm_cutoff", "sg_cutoff", "sg_cutoff_start", "guidance_until")
_CHOICES = {"attention": Attention, "filter": Kind, "anchor": Anchor, "size_conditioning": SizeConditioning, "jitter": Jitter}


@dataclass(frozen=True)
class Settings:
    """Settings of one run; change a copy with `dataclasses.replace`.

    `restart`, `guidance_until` and the cutoffs take one number for all stages above the native size, or a tuple with one number for
    each of them.

    Attributes:
        steps: Steps of the whole noise schedule. The base stage runs all of them.
        restart: Share of the steps that a high-resolution stage runs, in (0, 1]. It runs the last ones, rounded up to whole steps.
        guidance_scale: Scale of classifier-free guidance.
        guidance_until: Share of a high-resolution stage's steps that use classifier-free guidance, in [0, 1]. The remaining steps run
            only the conditional pass.
        attention: `"npa"` for neighborhood patch attention, `"full"` for the model's attention over the whole grid.
        jitter: How the patch grid moves from step to step, as in `patch_model`. None means the jitter of an already patched pipeline,
            and `"none"` otherwise.
        lfm: Latent frequency mixing. Without it, a stage starts only from the picture upsampled in RGB.
        sg: Structure guidance at every step of a high-resolution stage.
        lfm_cutoff, sg_cutoff: Kept fraction of the Nyquist frequency, in (0, 1]. The paper uses one value for both.
        sg_cutoff_start: Cutoff of structure guidance at a stage's first step. It changes linearly to `sg_cutoff` at the last step. None
            means `sg_cutoff` throughout.
        filter: Low-pass filter of latent frequency mixing and structure guidance, as in `scalediff_kernels.low_pass`.
        anchor: Target of structure guidance: `"picture"`, the reference that the stage starts from, or `"trajectory"`, the base stage's
            prediction of the clean picture at the same noise level.
        size_conditioning: The picture size in Stable Diffusion XL's size conditioning in high-resolution stages: `"target"`, the size of
            the stage, which is the pipeline's default, or `"native"`, the size that the model was mostly trained on. Which of them the
            authors' stages have is not known.
        wrap: Whether the picture continues on the other side, per axis `(Y, X)`, as in `patch_model`: attention, convolutions, upsampling
            and filters cross the border. None means that of an already patched pipeline, and `(False, False)` otherwise.

    Raises:
        ValueError: A value is outside its range.
        TypeError: A value is of the wrong type, such as `steps` that is not an integer.
    """

    steps: int = 50
    restart: PerStage = 0.4
    guidance_scale: float = 7.5
    attention: Attention = "npa"
    lfm: bool = True
    sg: bool = True
    lfm_cutoff: PerStage = 0.125
    sg_cutoff: PerStage = 0.125
    sg_cutoff_start: PerStage | None = None
    filter: Kind = "resize"
    anchor: Anchor = "picture"
    guidance_until: PerStage = 1.0
    jitter: Jitter | None = None
    size_conditioning: SizeConditioning = "target"
    wrap: tuple[bool, bool] | None = None

    def __post_init__(self) -> None:
        check_integer("steps", self.steps)
        check_number("guidance_scale", self.guidance_scale)
        for name in ("lfm", "sg"):
            check_boolean(name, getattr(self, name))
        if self.wrap is not None:
            check_wrap("wrap", self.wrap)
            object.__setattr__(self, "wrap", tuple(self.wrap))  # JSON gives lists
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got steps={self.steps}")
        for name in _PER_STAGE:
            value = getattr(self, name)
            if value is None and name == "sg_cutoff_start":
                continue
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # JSON gives lists
                if not value:
                    raise ValueError(f"{name} must be a number, or one number for each stage, got {name}=()")
            for one in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
                if not isinstance(one, Real) or isinstance(one, bool):
                    raise wrong_type(name, "a number, or one number for each stage", value)
                if not (0 < float(one) <= 1 or (one == 0 and name == "guidance_until")):
                    raise ValueError(f"{name} must lie in {'[' if name == 'guidance_until' else '('}0, 1], got {name}={one}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not (name == "jitter" and value is None):
                choice(get_args(allowed))(name, value)

    @property
    def stage_steps(self) -> int:
        """Steps of a high-resolution stage, at least one. `restart` must be a single number; `of_stage` selects one from a tuple.

        The authors' rule, which drops the whole steps in `steps * (1 - restart)`, in floating point as their code computes it.
        """
        assert isinstance(self.restart, float | int)
        return max(1, self.steps - int(self.steps * (1 - self.restart)))

    def of_stage(self, number: int, count: int) -> Settings:
        """The settings of one high-resolution stage, with a single number in place of each tuple.

        Args:
            number: The stage's number; the first high-resolution stage is 1.
            count: Number of high-resolution stages.

        Raises:
            ValueError: A tuple does not have `count` values.
        """
        chosen: dict[str, Any] = {}
        for name in _PER_STAGE:
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != count:
                    raise ValueError(f"{name} must have one value for each of the {count} stages above the native size, got {name}={value}")
                chosen[name] = value[number - 1]
        return replace(self, **chosen)


@dataclass(frozen=True)
class Preset:
    """Settings with their source, and further defaults of the pipeline's call.

    Attributes:
        settings: The settings.
        source: Where the values come from, as text for the user.
        suffix: Text appended to every prompt.
        call: Default arguments of the pipeline's call.
        spacing: The `timestep_spacing` that the scheduler must have; empty if any works.

    Raises:
        TypeError: A value is of the wrong type.
    """

    settings: Settings
    source: str
    suffix: str = ""
    call: Mapping[str, Any] = field(default_factory=dict)
    spacing: str = ""

    def __post_init__(self) -> None:
        instance(Settings, "a Settings object")("settings", self.settings)
        for name in ("source", "suffix", "spacing"):
            check_text(name, getattr(self, name))
        check_mapping("call", self.call)


def derived_presets(*, steps: int, guidance_scale: float) -> Mapping[str, Preset]:
    """Presets of a model that the paper does not cover: the restart and cutoffs of FLUX, and the pipeline's default steps and guidance."""
    settings = Settings(steps=steps, restart=0.6, guidance_scale=guidance_scale, lfm_cutoff=0.25, sg_cutoff=0.25)
    return {"default": Preset(settings, "the pipeline's own steps and guidance, restart and cutoffs of the paper's FLUX.1-dev")}


def plan_sizes(target: tuple[int, int], *, native: tuple[int, int], multiple: Multiple) -> list[tuple[int, int]]:
    """Choose the size of every stage: a base with the native area and the target's aspect ratio, then x2 per stage up to the target.

    The last factor is the remainder, in (1, 2].

    Args:
        target: (height, width) in pixels.
        native: Native (height, width) of the model in pixels.
        multiple: Sides must be multiples of this number of pixels, or height and width of these two.

    Returns:
        (height, width) of every stage in pixels, base first.

    Raises:
        ValueError: A target side is not a multiple of `multiple`, or the target is smaller than native.
    """
    height, width = target
    _check_target(target, native=native, multiple=multiple)
    factor = math.sqrt(height * width / (native[0] * native[1]))
    hops = math.ceil(math.log2(factor))

    def base(side: int, multiple: int) -> int:
        """A multiple near side / factor that is large enough to reach the side in `hops` doublings."""
        return max(round(side / factor / multiple), math.ceil(side / (1 << hops) / multiple)) * multiple

    lowest = [base(side, one) for side, one in zip(target, _both(multiple), strict=True)]
    stages = [(min(height, lowest[0] << k), min(width, lowest[1] << k)) for k in range(hops)]
    return [*(stage for stage in stages if stage != target), target]


def check_sizes(
    sizes: Sequence[tuple[int, int]],
    target: tuple[int, int],
    *,
    native: tuple[int, int],
    multiple: Multiple,
    picture: tuple[int, int] | None = None,
) -> None:
    """Check the caller's list of stage sizes.

    Args:
        sizes: (height, width) of every stage in pixels.
        target: The size that the last stage must have.
        native: Native (height, width) of the model in pixels.
        multiple: Sides must be multiples of this number of pixels, or height and width of these two.
        picture: Size of the picture that replaces the base stage; then every stage must be larger than it.

    Raises:
        ValueError: As `plan_sizes`; also if the last size is not the target, the base exceeds the native area, or a stage is not larger
            than the one before, more than twice as large along an axis, or of another aspect ratio.
    """
    _check_target(target, native=picture or native, multiple=multiple)
    if not sizes or tuple(sizes[-1]) != tuple(target):
        raise ValueError(f"the last stage in sizes must be the target {target[0]} x {target[1]}, got {sizes=}")
    if picture is None and sizes[0][0] * sizes[0][1] > native[0] * native[1] * 1.1:
        raise ValueError(f"the first stage in sizes must have at most the native area, {native[0]} x {native[1]}, got {sizes[0]}")
    for height, width in sizes:
        if _remainders((height, width), multiple):
            raise ValueError(f"sizes must be multiples of {_named(multiple)}, got {(height, width)}")
    for (h0, w0), (h1, w1) in itertools.pairwise([*([] if picture is None else [picture]), *sizes]):
        if not (h0 <= h1 <= 2 * h0 and w0 <= w1 <= 2 * w0 and h0 * w0 < h1 * w1):
            raise ValueError(f"a stage must be larger than the one before, by at most 2x along an axis, got {(h0, w0)} and {(h1, w1)}")
        if abs(h1 * w0 - h0 * w1) > max(_both(multiple)) * max(h1, w1):
            raise ValueError(f"all stages must have the same aspect ratio, got {(h0, w0)} and {(h1, w1)}")


def _both(multiple: Multiple) -> tuple[int, int]:
    return (multiple, multiple) if isinstance(multiple, int) else multiple


def _named(multiple: Multiple) -> str:
    return " and ".join(dict.fromkeys(map(str, _both(multiple))))


def _remainders(size: tuple[int, int], multiple: Multiple) -> bool:
    """Whether a side of (height, width) is not a multiple of what it must be."""
    return any(side % one for side, one in zip(size, _both(multiple), strict=True))


def _check_target(target: tuple[int, int], *, native: tuple[int, int], multiple: Multiple) -> None:
    height, width = target
    if _remainders(target, multiple):
        raise ValueError(f"height and width must be multiples of {_named(multiple)}, got {height=}, {width=}")
    if height * width < native[0] * native[1] or any(side < one for side, one in zip(target, _both(multiple), strict=True)):
        raise ValueError(f"height x width must be at least the model's native {native[0]} x {native[1]}, got {height=}, {width=}")
