"""Launch configuration of a separable map: tiles and steps, chosen from integers only.

Legend: a map takes `columns` pixels of an axis to `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

SECTOR = 32  # smallest memory transaction in bytes


@dataclass(frozen=True)
class Problem:
    """The properties that determine a launch; pairs are (Y, X)."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    itemsize: int  # bytes of an element of the pictures
    planes: int = 1  # batch times channels
    channels: int = 1
    channels_last: bool = False  # channels, not columns, are adjacent in memory
    scattered: bool = False  # packed, or rows that do not start at an aligned address
    dense: bool = False  # every row of the factors has weights for every pixel


class LaunchConfig(NamedTuple):
    """How one map is launched.

    Attributes:
        tile: Rows and columns of the result per program.
        channels: Channels per program.
        steps: Pixels of the input per step of the two sums.
        precision: Triton's `input_precision` of fp32 matrix products.
        num_warps, num_stages: Triton's launch options.
    """

    tile: tuple[int, int]
    channels: int
    steps: tuple[int, int]
    precision: str
    num_warps: int
    num_stages: int


@cache
def launch_config(problem: Problem, device: str) -> LaunchConfig:
    """Choose the launch configuration of a problem on a device (`"sm_90"`, `"gfx942"`, ...). A pure function that needs no GPU."""
    amd = device.startswith("gfx")
    precision = "ieee" if amd else "tf32x3"  # AMD has exact fp32 matrix instructions
    channels = min(SECTOR // problem.itemsize, _ceil_power_of_two(problem.channels)) if problem.channels_last else 1
    tile, steps, warps, stages = _BLOCKS[_kind(problem, channels)]
    if channels > 8:
        warps *= 2
    if amd:  # a warp has 64 threads, and shared memory is small
        warps, stages = min(warps, 4), 1
    return LaunchConfig(tile, channels, steps, precision, warps, stages)


# Tile, steps, warps, stages. Small: few programs, so long steps. Large: wide tiles, so that few pixels are read twice.
_BLOCKS = {
    "reduce small": ((16, 16), (16, 64), 4, 2),
    "reduce large": ((16, 64), (16, 64), 8, 3),
    "expand": ((32, 64), (16, 16), 8, 1),
    "dense reduce": ((32, 32), (16, 64), 8, 2),
    "dense expand": ((32, 64), (16, 32), 8, 1),
    "scattered reduce": ((16, 16), (16, 32), 8, 2),
    "scattered expand": ((16, 32), (16, 16), 4, 1),
    "channels reduce": ((16, 16), (16, 16), 8, 2),
    "channels expand": ((16, 16), (16, 16), 4, 1),
}
ENOUGH_PROGRAMS = 1024  # several for each multiprocessor of the largest devices


def _kind(problem: Problem, channels: int) -> str:
    direction = "expand" if prod(problem.rows) >= prod(problem.columns) else "reduce"
    if channels > 1:
        return f"channels {direction}"
    if problem.dense:
        return f"dense {direction}"
    if problem.scattered:
        return f"scattered {direction}"
    if direction == "expand":
        return "expand"
    tile = _BLOCKS["reduce large"][0]
    programs = problem.planes * prod(-(-r // t) for r, t in zip(problem.rows, tile, strict=True))
    return "reduce large" if programs >= ENOUGH_PROGRAMS else "reduce small"


def _ceil_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
