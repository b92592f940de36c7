"""The settings of a cascade, checked, and the picture sizes that its stages go through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Attention = Literal["npa", "full"]


@dataclass(frozen=True)
class Settings:
    """One setting of the method; `dataclasses.replace` makes another.

    Attributes:
        steps: Steps of the whole noise schedule, all of them run by the base stage.
        restart: Share of the steps that a high-resolution stage runs, its last ones, in (0, 1].
        guidance_scale: Classifier-free guidance.
        attention: `"npa"` for neighborhood patch attention, `"full"` for the model's own attention over the whole grid.
        lfm: Latent frequency mixing; without it a stage starts from the picture upsampled in RGB alone.
        sg: Structure guidance at every step of a high-resolution stage.
        lfm_cutoff, sg_cutoff: Kept fraction of the Nyquist frequency, in (0, 1]. The paper takes one value for both.

    Raises:
        ValueError: a value is outside its range.
    """

    steps: int = 50
    restart: float = 0.4
    guidance_scale: float = 7.5
    attention: Attention = "npa"
    lfm: bool = True
    sg: bool = True
    lfm_cutoff: float = 0.125
    sg_cutoff: float = 0.125

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got steps={self.steps}")
        if not 0 < self.restart <= 1:
            raise ValueError(f"restart must lie in (0, 1], got restart={self.restart}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got guidance_scale={self.guidance_scale}")
        if self.attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got attention={self.attention!r}")
        for name in ("lfm_cutoff", "sg_cutoff"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {name}={getattr(self, name)}")

    @property
    def stage_steps(self) -> int:
        """Steps of a high-resolution stage, at least one."""
        return max(1, round(self.steps * self.restart))


def plan_sizes(target: tuple[int, int], *, native: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """The (height, width) of every stage in pixels: a base of native area and the target's shape, then x2 to the target.

    The last factor is whatever is left, in (1, 2].

    Raises:
        ValueError: a target side is not a multiple of `multiple`, or the target is smaller than native.
    """
    height, width = target
    if height % multiple or width % multiple:
        raise ValueError(f"height and width must be multiples of {multiple}, got {height=}, {width=}")
    factor = math.sqrt(height * width / (native[0] * native[1]))
    if factor < 1 or min(height, width) < multiple:
        raise ValueError(f"height x width must be at least the model's native {native[0]} x {native[1]}, got {height=}, {width=}")
    hops = math.ceil(math.log2(factor))

    def base(side: int) -> int:
        """Near side / factor, but large enough for `hops` doublings to reach the side."""
        return max(round(side / factor / multiple), math.ceil(side / (1 << hops) / multiple)) * multiple

    stages = [(min(height, base(height) << k), min(width, base(width) << k)) for k in range(hops)]
    return [*(stage for stage in stages if stage != target), target]
