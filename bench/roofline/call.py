"""What a launch should take on an H100, from its binary: the loop of its main loop, simulated, and how many tiles a multiprocessor gets.

One factor per head dim stands for all that the simulation leaves out: clocks under load, dependent instructions, banks of shared memory.
It slows the whole multiprocessor down, but not L2.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Literal

from bench.attention.shapes import Shape
from bench.compile.attention import Case
from bench.compile.binary import Binary
from bench.roofline.loops import SCHEDULERS, cycles, steps
from bench.roofline.pipeline import Schedule
from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.config import MULTIPROCESSORS, WARPGROUP_ROWS, LaunchConfig, Pipeline, key_box

CLOCK, PEAK_TFLOPS = 1.83e9, 989.5
FINISH, ROTATE = 3, 8  # instructions for each of a thread's elements: to divide and store the result, to rotate a query; assumed
EFFICIENCY = {64: 0.570, 128: 0.655}  # published TFLOP/s of the same schedule over those of the simulation: docs/evidence/tuning.md


def efficiency(head_dim: int) -> float:
    """The factor of head dims up to 64, and above."""
    return EFFICIENCY[64 if head_dim <= 64 else 128]


def costs(s: Schedule, share: float) -> dict[str, int]:
    """For a block of keys of all consumers: cycles by resource, and simulated with a factor."""
    found = {"matrix": cycles(s.loop, "product"), "exponentials": cycles(s.loop, "run", 2), "issue": cycles(s.loop, "run")}
    sizes = {"consumers": s.consumers, "num_stages": s.stages, "block_bytes": round(s.block_bytes)}
    return sizes | {name: round(s.consumers * each) for name, each in found.items()} | {"block": round(slowed(s, share).block())}


def slowed(s: Schedule, share: float) -> Schedule:
    """With L2 faster in cycles of a multiprocessor that is slower by a factor."""
    return replace(s, l2=s.l2 / share)


def predict(launch: Launch, binary: Binary, case: Case) -> tuple[Schedule, float]:
    """What a multiprocessor runs, and the milliseconds of a call: the main loop, simulated on the multiprocessor with the most tiles."""
    config = launch.config
    windows = config.part_windows if case.queries == "text" else 1
    text = -(-case.text // config.text_block) if case.text else 0
    blocks = prod(-(-min(w, g) // k) for w, g, k in zip(case.window, case.grid, config.key_box, strict=True)) + text
    tiles = windows * -(-launch.arguments["tiles"] // MULTIPROCESSORS["sm_90"])
    consumers = prod(config.query_box) // WARPGROUP_ROWS
    width = case.head_dim * case.dtype.itemsize
    loop = steps(binary.loops[-1], ping_pong=config.ping_pong)  # consumers' loops differ by a few instructions; this is the longest
    finish = (FINISH + ROTATE * (case.text > 0)) * WARPGROUP_ROWS * case.head_dim / (32 * SCHEDULERS)
    schedule = Schedule(loop, consumers, config.num_stages, 2 * prod(config.key_box) * width, WARPGROUP_ROWS * width, finish)
    share = efficiency(case.head_dim)
    return schedule, 1000 * slowed(schedule, share).call(min(blocks, config.part_blocks or blocks), tiles) / CLOCK / share


def case_of(shape: Shape, queries: Literal["image", "text"], rule: str) -> Case:
    """A benchmark's shape as a kernel to compile. Under the rule "global" text queries have one window over the grid."""
    if queries == "text" and rule == "global":
        shape = replace(shape, window=shape.grid, patch=shape.grid)
    sizes = (shape.grid, shape.window, shape.patch, shape.heads, shape.batch)
    return Case(shape.head_dim, shape.dtype, shape.text, queries, *sizes)


def reconfigured(case: Case, entry: Pipeline) -> LaunchConfig:
    """The shipped configuration of a case with another entry of the table."""
    shipped: LaunchConfig = case.launch("sm_90").config
    box = (1, entry.queries) if case.queries == "text" else (entry.queries // 16, 16)
    parts = shipped.part_blocks * prod(shipped.key_box) // entry.keys
    changed = shipped._replace(query_box=box, key_box=key_box(case.window, entry.keys), text_block=entry.keys, part_blocks=parts)
    return changed._replace(num_stages=entry.stages, registers=entry.registers, ping_pong=entry.ping_pong)
