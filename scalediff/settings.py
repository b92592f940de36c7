"""The settings of a cascade, checked, the presets that name them, and the picture sizes that its stages go through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from scalediff_kernels.lowpass.geometry import Kind

Attention = Literal["npa", "full"]
Jitter = Literal["none", "alternate", "random"]
Anchor = Literal["picture", "trajectory"]
SizeConditioning = Literal["target", "native"]
PerStage = float | tuple[float, ...]

_PER_STAGE = ("restart", "lfm_cutoff", "sg_cutoff", "sg_cutoff_start", "guidance_until")
_CHOICES = {"attention": Attention, "filter": Kind, "anchor": Anchor, "size_conditioning": SizeConditioning, "jitter": Jitter}


@dataclass(frozen=True)
class Settings:
    """One setting of the method; `dataclasses.replace` makes another.

    `restart`, `guidance_until` and the cutoffs are one number for all stages above the native size, or a tuple with one for each.

    Attributes:
        steps: Steps of the whole noise schedule, all of them run by the base stage.
        restart: Share of the steps that a high-resolution stage runs, its last ones, in (0, 1].
        guidance_scale: Classifier-free guidance.
        guidance_until: Share of a high-resolution stage's steps with classifier-free guidance, in [0, 1]; the steps after them run the
            prompt's pass alone. 1 guides them all.
        attention: `"npa"` for neighborhood patch attention, `"full"` for the model's own attention over the whole grid.
        jitter: How the patch grid moves from step to step, as in `patch_model`; None leaves a patched pipeline's as it is, and is
            `"none"` for another.
        lfm: Latent frequency mixing; without it a stage starts from the picture upsampled in RGB alone.
        sg: Structure guidance at every step of a high-resolution stage.
        lfm_cutoff, sg_cutoff: Kept fraction of the Nyquist frequency, in (0, 1]. The paper takes one value for both.
        sg_cutoff_start: The cutoff of structure guidance at a stage's first step, from where it goes to `sg_cutoff` at the last, by the
            same amount at every step; None: `sg_cutoff` throughout.
        filter: Low-pass filter of both, as in `scalediff_kernels.low_pass`.
        anchor: What structure guidance draws to: `"picture"`, the reference that the stage starts from, or `"trajectory"`, what the
            base stage took for the clean picture at the same noise.
        size_conditioning: The size that Stable Diffusion XL is told a high-resolution stage's picture has: `"target"`, the stage's own,
            as the pipeline does by itself, or `"native"`, the size that the model has seen most.

    Raises:
        ValueError: a value is outside its range.
        TypeError: steps is no whole number.
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

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int):
            raise TypeError(f"steps must be a whole number, got steps={self.steps!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got steps={self.steps}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got guidance_scale={self.guidance_scale}")
        for name in _PER_STAGE:
            value = getattr(self, name)
            if isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(value))  # of a list, as JSON has it
                if not value:
                    raise ValueError(f"{name} must be a number, or one for each stage, got {name}=()")
            for one in value if isinstance(value, Sequence) else () if value is None else (value,):
                if not (0 < one <= 1 or (one == 0 and name == "guidance_until")):
                    raise ValueError(f"{name} must lie in {'[' if name == 'guidance_until' else '('}0, 1], got {name}={one}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(allowed) and not (name == "jitter" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {name}={value!r}")

    @property
    def stage_steps(self) -> int:
        """Steps of a high-resolution stage, at least one; all of them must run as many, or `of_stage` says which is meant."""
        assert isinstance(self.restart, float | int)
        return max(1, round(self.steps * self.restart))

    def of_stage(self, number: int, count: int) -> Settings:
        """Those of one high-resolution stage: the first is number 1 of `count`.

        Raises:
            ValueError: a tuple that has not one value for each of them.
        """
        chosen: dict[str, Any] = {}
        for name in _PER_STAGE:
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != count:
                    raise ValueError(f"{name} must have one value for each stage above the native size, here {count}, got {name}={value}")
                chosen[name] = value[number - 1]
        return replace(self, **chosen)


@dataclass(frozen=True)
class Preset:
    """Settings with a name, and what else belongs to them.

    Attributes:
        settings: The settings.
        source: Where they come from, for people.
        suffix: Text put after every prompt.
        call: Arguments of the pipeline's call, where the caller does not name them.
        spacing: The `timestep_spacing` that the scheduler must have; empty where any will do.
    """

    settings: Settings
    source: str
    suffix: str = ""
    call: Mapping[str, Any] = field(default_factory=dict)
    spacing: str = ""


def derived_presets(*, steps: int, guidance_scale: float) -> Mapping[str, Preset]:
    """Those of a model that the paper has none for: FLUX's restart and cutoffs, the steps and guidance that its pipeline defaults to."""
    settings = Settings(steps=steps, restart=0.6, guidance_scale=guidance_scale, lfm_cutoff=0.25, sg_cutoff=0.25)
    return {"default": Preset(settings, "the pipeline's own steps and guidance, restart and cutoffs of the paper's FLUX.1-dev")}


def plan_sizes(target: tuple[int, int], *, native: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """The (height, width) of every stage in pixels: a base of native area and the target's shape, then x2 to the target.

    The last factor is whatever is left, in (1, 2].

    Raises:
        ValueError: a target side is not a multiple of `multiple`, or the target is smaller than native.
    """
    height, width = target
    _check_target(target, native=native, multiple=multiple)
    factor = math.sqrt(height * width / (native[0] * native[1]))
    hops = math.ceil(math.log2(factor))

    def base(side: int) -> int:
        """Near side / factor, but large enough for `hops` doublings to reach the side."""
        return max(round(side / factor / multiple), math.ceil(side / (1 << hops) / multiple)) * multiple

    stages = [(min(height, base(height) << k), min(width, base(width) << k)) for k in range(hops)]
    return [*(stage for stage in stages if stage != target), target]


def check_sizes(
    sizes: Sequence[tuple[int, int]],
    target: tuple[int, int],
    *,
    native: tuple[int, int],
    multiple: int,
    picture: tuple[int, int] | None = None,
) -> None:
    """Refuse a caller's own list of stages that no cascade could go through; with a picture's size, stages above that picture.

    Raises:
        ValueError: as `plan_sizes`; the last is not the target, a base above the native area, a stage that is no larger than the one
            before or more than twice as large along an axis, or of another shape.
    """
    _check_target(target, native=picture or native, multiple=multiple)
    if not sizes or tuple(sizes[-1]) != tuple(target):
        raise ValueError(f"the last of sizes must be the target {target[0]} x {target[1]}, got {sizes=}")
    if picture is None and sizes[0][0] * sizes[0][1] > native[0] * native[1] * 1.1:
        raise ValueError(f"the first of sizes is drawn with full attention, at most the native {native[0]} x {native[1]}, got {sizes[0]}")
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise ValueError(f"sizes must be multiples of {multiple}, got {(height, width)}")
    for (h0, w0), (h1, w1) in itertools.pairwise([*([] if picture is None else [picture]), *sizes]):
        if not (h0 <= h1 <= 2 * h0 and w0 <= w1 <= 2 * w0 and h0 * w0 < h1 * w1):
            raise ValueError(f"a stage must be larger than the one before, at most twice along an axis, got {(h0, w0)} and {(h1, w1)}")
        if abs(h1 * w0 - h0 * w1) > multiple * max(h1, w1):
            raise ValueError(f"stages must be of one shape, got {(h0, w0)} and {(h1, w1)}")


def _check_target(target: tuple[int, int], *, native: tuple[int, int], multiple: int) -> None:
    height, width = target
    if height % multiple or width % multiple:
        raise ValueError(f"height and width must be multiples of {multiple}, got {height=}, {width=}")
    if height * width < native[0] * native[1] or min(height, width) < multiple:
        raise ValueError(f"height x width must be at least the model's native {native[0]} x {native[1]}, got {height=}, {width=}")
