"""Which program computes a separable map: tiles and steps, chosen from integers alone.

Legend: a map takes `columns` pixels of an axis to `rows`; `taps` is the most that one row reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

MIN_BLOCK = 16  # the smallest side of a matrix product in Triton
SECTOR = 32  # bytes that memory moves at least


@dataclass(frozen=True)
class Problem:
    """What decides a launch, (Y, X) per pair."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    taps: tuple[int, int]
    itemsize: int  # bytes of an element of the largest pictures
    channels: int = 1
    channels_last: bool = False  # channels, not columns, are neighbours in memory


class LaunchConfig(NamedTuple):
    """How one map is launched.

    tile: rows and columns of the result per program.
    channels: that one program computes.
    steps: pixels of the input per step of the two sums.
    precision: of a product of fp32 matrices, as Triton means it.
    num_warps, num_stages: as Triton means them.
    """

    tile: tuple[int, int]
    channels: int
    steps: tuple[int, int]
    precision: str
    num_warps: int
    num_stages: int


@cache
def launch_config(problem: Problem, device: str) -> LaunchConfig:
    """Choose the launch of `problem` on `device` (`"sm_90"`, `"gfx942"`, ...): a pure function, no GPU needed."""
    precision = "ieee" if device.startswith("gfx") else "tf32x3"
    dense = any(t > 2 * _ratio(c, r) + 2 for r, c, t in zip(problem.rows, problem.columns, problem.taps, strict=True))
    reduces = problem.rows[0] * problem.rows[1] <= problem.columns[0] * problem.columns[1]
    channels = min(SECTOR // problem.itemsize, _ceil_power_of_two(problem.channels)) if problem.channels_last else 1
    if channels > 1:
        return LaunchConfig((16, 16), channels, (16, 16), precision, 4, 2)
    if dense:
        return LaunchConfig((64, 64), 1, (16, 32), precision, 8, 2)
    if reduces:
        return LaunchConfig((16, 16), 1, (16, 64), precision, 4, 3)
    return LaunchConfig((32, 64), 1, (16, 16), precision, 4, 1)


def _ratio(columns: int, rows: int) -> int:
    return -(-columns // rows)


def _ceil_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
