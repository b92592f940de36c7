"""What a launch should take on an H100, from its binary: the loop of its main loop, simulated, and how many tiles a multiprocessor gets.

One factor per schedule stands for all that the simulation leaves out: clocks under load, dependent instructions, banks of shared memory.
It slows the whole multiprocessor down, but not L2.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from bench.attention.shapes import Shape
from bench.roofline.loops import SCHEDULERS, cycles, steps
from bench.roofline.pipeline import Schedule
from scalediff_kernels.neighborhood.config import MULTIPROCESSORS, WARPGROUP_ROWS, LaunchConfig, shared_memory

if TYPE_CHECKING:  # both need Triton
    from bench.compile.attention import Case
    from bench.compile.binary import Binary
    from scalediff_kernels._launch import Launch

CLOCK, PEAK_TFLOPS, REGISTERS, THREADS = 1.83e9, 989.5, 65_536, 2048
FINISH, ROTATE = 3, 8  # instructions for each of a thread's elements: to divide and store the result, to rotate a query; assumed
# Published TFLOP/s of the same schedule over those of the simulation: docs/evidence/tuning.md. Head dims up to 64, and above.
EFFICIENCY = {("warp-specialised", 64): 0.570, ("warp-specialised", 128): 0.655, ("descriptor", 64): 0.562, ("descriptor", 128): 0.800}


class Prediction(NamedTuple):
    """Of a call: what a multiprocessor runs, blocks of keys of one tile, and the time."""

    schedule: Schedule
    key_blocks: int
    ms: float


def descriptor_config(case: Case) -> LaunchConfig:
    """What the table has for the kernels in plain Triton."""
    config: LaunchConfig = replace(case, path="descriptor").launch("sm_90").config
    return config


def efficiency(path: str, head_dim: int) -> float:
    return EFFICIENCY[path, 64 if head_dim <= 64 else 128]


def costs(s: Schedule, share: float) -> dict[str, int]:
    """For a block of keys of all actors: cycles by resource, and simulated with a factor."""
    found = {"matrix": cycles(s.loop, "product"), "exponentials": cycles(s.loop, "run", 2), "issue": cycles(s.loop, "run")}
    sizes = {"actors": s.actors, "num_stages": s.stages, "block_bytes": round(s.block_bytes)}
    return sizes | {name: round(s.actors * each) for name, each in found.items()} | {"block": round(slowed(s, share).block())}


def slowed(s: Schedule, share: float) -> Schedule:
    """With L2 faster in cycles of a multiprocessor that is slower by a factor."""
    return replace(s, l2=s.l2 / share)


def predict(launch: Launch, binary: Binary, case: Case) -> Prediction:
    """Simulate the main loop, and take the multiprocessor with the most tiles."""
    config, multiprocessors = launch.config, MULTIPROCESSORS["sm_90"]
    specialised = config.path == "warp-specialised"
    windows = config.part_windows if case.queries == "text" else 1
    text = -(-case.text // config.text_block) if case.text else 0
    blocks = prod(-(-min(w, g) // k) for w, g, k in zip(case.window, case.grid, config.key_box, strict=True)) + text
    tiles = launch.arguments["tiles"] if specialised else launch.programs
    turns = -(-tiles // multiprocessors)
    actors = prod(config.query_box) // WARPGROUP_ROWS if specialised else min(programs(binary, config), turns)
    warps = 1 if specialised else config.num_warps // SCHEDULERS
    rows, width = prod(config.query_box) // (actors if specialised else 1), case.head_dim * case.dtype.itemsize
    longest = binary.loops[-1 if specialised else 0]  # consumers' loops differ by a few instructions
    loop = steps(longest, warps=warps, specialised=specialised, ping_pong=config.ping_pong)
    each = (FINISH + ROTATE * (case.text > 0)) * rows * case.head_dim / (32 * SCHEDULERS)
    schedule = Schedule(loop, actors, specialised, config.num_stages, 2 * prod(config.key_box) * width, rows * width, each)
    share = efficiency(config.path, case.head_dim)
    blocks = min(blocks, config.part_blocks or blocks)
    turns = turns if specialised else -(-turns // actors)
    seconds = slowed(schedule, share).call(blocks, windows * turns) / CLOCK / share
    return Prediction(schedule, windows * blocks, 1000 * seconds)


def programs(binary: Binary, config: LaunchConfig) -> int:
    """Programs in plain Triton that share a multiprocessor."""
    return min(
        REGISTERS // (-(-binary.registers // 8) * 8 * 32 * config.num_warps),
        (shared_memory("sm_90") + 1024) // (binary.shared + 1024),
        THREADS // (32 * config.num_warps),
    )


def case_of(shape: Shape, queries: Literal["image", "text"] = "image", rule: str = "") -> Case:
    """A benchmark's shape as a kernel to compile. Under the rule "global" text queries have one window over the grid."""
    from bench.compile.attention import Case

    if queries == "text" and rule == "global":
        shape = replace(shape, window=shape.grid, patch=shape.grid)
    sizes = (shape.grid, shape.window, shape.patch, shape.heads, shape.batch)
    return Case(shape.head_dim, shape.dtype, shape.text, queries, *sizes)
