"""Launch configuration of the attention kernels: block shapes, warps and pipeline depth, chosen from integers only.

The choice is a pure function instead of an autotuner, so that it can be tested and compiled ahead of time without a GPU.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim. A box is `(rows, columns)` of tokens of one head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal, NamedTuple

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program may use
SMALL_SHARED_MEMORY = 101_376  # sm_86, sm_89, sm_120 and all other devices

# Of one card per architecture, not of the device in use: all cards of an architecture then split the work alike and give the same bits.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}
FEW_MULTIPROCESSORS = 84  # other devices
MOST_PARTS = 64  # maximum number of parts into which the windows of text queries are split
PROGRAM_KEYS = 512  # fixed cost of a program, in keys; an estimate, not measured yet

Path = Literal["warp-specialised", "descriptor", "pointer"]

MIN_BLOCK = 16  # the smallest side of a matrix product in Triton
WARP_ROWS = 16  # of a product that one warp computes on NVIDIA's GPUs
FEWEST_KEYS = 32  # of a block of the warp-specialised kernel; an estimate, not measured yet
WARPGROUP_ROWS = 64  # rows of a product that one warpgroup computes


@dataclass(frozen=True)
class Problem:
    """The properties that determine a launch. `descriptors`: whether all strides and addresses allow tensor descriptors."""

    grid: tuple[int, int]
    window: tuple[int, int]  # cut to the grid
    patch: tuple[int, int]
    head_dim: int
    itemsize: int  # bytes of an element
    text: int = 0
    queries: Literal["image", "text"] = "image"
    descriptors: bool = True
    rope: bool = False  # whether text is rotated
    heads: int = 1  # of all batches together; read for text queries alone, as is the next
    windows: int = 1
    wrap: bool = False  # whether windows may continue on the other side, which boxes of tokens do not


class LaunchConfig(NamedTuple):
    """How one kernel is launched.

    Attributes:
        path: `"descriptor"` reads boxes with tensor descriptors (TMA), `"pointer"` with addresses and masks. `"warp-specialised"` is the
            Gluon kernel of sm_90, which reads boxes, too.
        query_box: Tokens of a query tile, powers of two; `(1, tokens)` for text queries.
        key_box: Tokens of a block of keys, powers of two.
        text_block: Text tokens of a block of text keys.
        num_warps, num_stages: Triton's launch options.
        part_windows: Windows per tile of text queries and program. A second kernel averages over all parts.
        part_blocks: Blocks of keys per tile of text queries, if there is one window; all of them where this is 0. Warp-specialised only, as
            the next two.
        registers: Registers of a thread that computes.
        ping_pong: Whether two warpgroups take turns at the tensor cores.
    """

    path: Path
    query_box: tuple[int, int]
    key_box: tuple[int, int]
    text_block: int
    num_warps: int
    num_stages: int
    part_windows: int = 1
    part_blocks: int = 0
    registers: int = 0
    ping_pong: bool = False


@cache
def launch_config(problem: Problem, device: str, path: Path | None = None) -> LaunchConfig:
    """Choose the launch configuration of a problem on a device (`"sm_90"`, `"gfx942"`, ...). A pure function that needs no GPU.

    Args:
        path: The path to take. When None, the first that supports the problem: warp-specialised, descriptor, pointer.

    Raises:
        NotImplementedError: The head dim is not a multiple of 8 in [8, 256], or the path does not support the problem on this device.
    """
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= 256:
        raise NotImplementedError(f"the Triton kernel supports head dims that are multiples of 8 from 8 to 256, got {problem.head_dim=}")
    if path in (None, "warp-specialised") and (pipelined := _pipelined(problem, device)):
        return pipelined
    config = block_config(problem, device, descriptors=path != "pointer")
    if path not in (None, config.path):
        raise NotImplementedError(f"{path=} does not support this problem on {device}, got {problem}")
    return config


class Pipeline(NamedTuple):
    """Queries of a tile and keys of a block; stages of the rings of buffers; registers of a consumer; whether consumers take turns."""

    queries: int
    keys: int
    stages: int
    registers: int
    ping_pong: bool


# Of the warp-specialised kernel, by kind and for head dims up to 64, 128 and 256. Rope: a second buffer of queries, rotated. Ragged: boxes
# that do not tile the window; with a mask on every block, 128 keys would spill. `python -m bench.compile` checks them as `_BLOCKS` below.
_PIPELINES = {
    "plain": (Pipeline(128, 128, 3, 240, True), Pipeline(128, 128, 3, 240, True), Pipeline(128, 64, 2, 240, True)),
    "rope": (Pipeline(128, 128, 3, 240, True), Pipeline(128, 128, 2, 240, True), Pipeline(128, 32, 2, 240, True)),
    "ragged": (Pipeline(128, 64, 3, 240, True), Pipeline(128, 64, 3, 240, True), Pipeline(128, 32, 2, 240, True)),
}


def _pipelined(problem: Problem, device: str) -> LaunchConfig | None:
    """The configuration of the warp-specialised kernel; None where it does not support the problem: then tiles or boxes do not fit."""
    if device != "sm_90" or problem.itemsize != 2 or not problem.descriptors or problem.wrap:
        return None
    column = _column(problem)
    pipeline = _PIPELINES["rope" if problem.rope else "plain"][column]
    if any(w % b for w, b in zip(problem.window, key_box(problem.window, pipeline.keys), strict=True)):
        pipeline = _PIPELINES["ragged"][column]
    keys, text_queries = key_box(problem.window, pipeline.keys), problem.queries == "text"
    queries = (1, pipeline.queries) if text_queries else query_box(_cut(problem.patch, problem.grid), pipeline.queries)
    few = prod(keys) < min(FEWEST_KEYS, pipeline.keys // 2)  # a block is not worth its barriers
    if prod(queries) < pipeline.queries or few or not fits_inside(keys, problem.window):
        return None
    part_windows, part_blocks = 1, 0
    if text_queries:
        at_once = MULTIPROCESSORS[device]
        tiles = problem.heads * -(-problem.text // pipeline.queries)
        if problem.windows > 1:
            part_windows = _part(problem.windows, tiles, at_once, keys=prod(problem.window) + problem.text)
        else:
            blocks = -(-problem.text // prod(keys)) + prod(-(-w // b) for w, b in zip(problem.window, keys, strict=True))
            part_blocks = _part(blocks, tiles, at_once, keys=prod(keys))
    return LaunchConfig(
        path="warp-specialised",
        query_box=queries,
        key_box=keys,
        text_block=prod(keys),
        num_warps=4,
        num_stages=pipeline.stages,
        part_windows=part_windows,
        part_blocks=part_blocks,
        registers=pipeline.registers,
        ping_pong=pipeline.ping_pong,
    )


def block_config(problem: Problem, device: str, *, descriptors: bool = True) -> LaunchConfig:
    """The configuration of the kernels in plain Triton, with descriptors if these are wanted and support the problem."""
    descriptors = descriptors and problem.descriptors and problem.itemsize == 2  # fp32 products need operands in registers
    descriptors = descriptors and has_descriptors(device) and not problem.wrap
    blocks = _blocks(problem, device, descriptors=descriptors)
    inside = fits_inside(key_box(problem.window, blocks.keys), problem.window)
    descriptors = descriptors and inside
    queries = _query_box(problem, blocks)
    if not inside:  # boxes of keys reach outside the window: addresses and masks
        blocks = _blocks(problem, device, descriptors=False, special="masked")
    elif problem.queries == "image" and prod(queries) < WARPGROUP_ROWS:
        blocks = _blocks(problem, device, descriptors=descriptors, special="small")
    queries = _query_box(problem, blocks)
    num_warps = blocks.num_warps
    if problem.queries == "image" and problem.itemsize == 2 and problem.head_dim <= 128 and device.startswith("sm_"):
        num_warps = min(num_warps, prod(queries) // WARP_ROWS)  # more would compute the same rows again
    part_windows = 1
    if problem.queries == "text":  # eight warps are assumed to fill a multiprocessor's registers
        at_once = MULTIPROCESSORS.get(device, FEW_MULTIPROCESSORS) * max(1, 8 // num_warps)
        keys = prod(_cut(problem.window, problem.grid)) + problem.text
        part_windows = _part(problem.windows, problem.heads * -(-problem.text // prod(queries)), at_once, keys=keys)
    return LaunchConfig(
        path="descriptor" if descriptors else "pointer",
        query_box=queries,
        key_box=key_box(problem.window, blocks.keys),
        text_block=min(blocks.keys, _text_rows(problem)),
        num_warps=num_warps,
        num_stages=blocks.num_stages,
        part_windows=part_windows,
    )


def _query_box(problem: Problem, blocks: Blocks) -> tuple[int, int]:
    if problem.queries == "text":
        return 1, min(blocks.queries, _text_rows(problem))
    return query_box(_cut(problem.patch, problem.grid), blocks.queries)


def _text_rows(problem: Problem) -> int:
    return ceil_power_of_two(max(problem.text, MIN_BLOCK))


def _part(count: int, tiles: int, at_once: int, *, keys: int) -> int:
    """How many of `count` windows, or blocks, of `keys` keys each a program of text queries attends to.

    The fewest parts whose estimated time is within 2 % of the best, since every part needs memory for its sums. `at_once`: programs that
    run at the same time.
    """

    def cost(size: int) -> int:
        waves = -(-tiles * -(-count // size) // at_once)
        return waves * (size * keys + PROGRAM_KEYS)

    parts = range(1, min(count, MOST_PARTS) + 1)
    choices = list(dict.fromkeys(-(-count // n) for n in parts))  # fewest parts first
    best = min(map(cost, choices))
    return next(size for size in choices if 100 * cost(size) <= 102 * best)


def has_descriptors(device: str) -> bool:
    """Whether matrix instructions can read operands that TMA wrote: on sm_90 and sm_100.

    sm_120 also has TMA, but the matrix instructions of sm_80, and Triton 3.6 spills registers there on the descriptor path.
    """
    return device.startswith("sm_") and device[3:-1] in ("9", "10")


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By kind of program and of queries, for head dims up to 64, 128 and 256. Joint: with text keys. Ragged: the boxes do not divide the
# window, which needs a second loop. Small: patches with tiles of fewer than 64 queries. Masked: windows too small for a box of keys, a mask
# on every load. `python -m bench.compile` compiles every entry and fails on register spills, serialised matrix products and softmaxes that
# several warps repeat, except for those that docs/evidence/compiled.md names.
_BLOCKS = {
    ("wgmma", "image"): (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 2), Blocks(64, 32, 4, 2)),
    ("wgmma joint", "image"): (Blocks(128, 128, 8, 2), Blocks(128, 128, 8, 2), Blocks(64, 32, 8, 2)),
    ("wgmma ragged", "image"): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 32, 8, 2)),
    ("wgmma", "text"): (Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 3), Blocks(16, 32, 8, 2)),
    ("tcgen05", "image"): (Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    ("tcgen05", "text"): (Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 3), Blocks(16, 32, 8, 2)),
    ("cp.async", "image"): (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2)),
    ("cp.async", "text"): (Blocks(128, 32, 8, 3), Blocks(128, 16, 8, 2), Blocks(16, 32, 8, 2)),
    ("cp.async tcgen05", "text"): (Blocks(128, 32, 8, 3), Blocks(64, 16, 8, 2), Blocks(16, 32, 8, 2)),
    ("cp.async, 99 KB", "image"): (Blocks(128, 64, 8, 3), Blocks(128, 16, 8, 3), Blocks(64, 16, 8, 2)),
    ("cp.async, 99 KB", "text"): (Blocks(128, 32, 8, 3), Blocks(128, 16, 8, 2), Blocks(16, 32, 8, 2)),
    ("small", "image"): (Blocks(32, 32, 2, 3), Blocks(32, 16, 2, 2), Blocks(32, 16, 4, 2)),
    ("masked", "image"): (Blocks(32, 16, 2, 1), Blocks(32, 16, 2, 1), Blocks(32, 16, 4, 2)),
    ("masked", "text"): (Blocks(64, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
    ("mfma", "image"): (Blocks(128, 32, 4, 1), Blocks(128, 32, 4, 1), Blocks(64, 32, 4, 1)),
    ("mfma", "text"): (Blocks(64, 32, 4, 1), Blocks(64, 32, 8, 1), Blocks(32, 16, 4, 1)),
    ("mfma masked", "image"): (Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1)),
    ("mfma masked", "text"): (Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    ("fp32", "image"): (Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 32, 16, 1)),
    ("fp32", "text"): (Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 32, 8, 1)),
    ("fp32 masked", "image"): (Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 32, 8, 1)),
    ("mfma fp32", "image"): (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    ("mfma fp32", "text"): (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def _blocks(problem: Problem, device: str, *, descriptors: bool, special: Literal["", "small", "masked"] = "") -> Blocks:
    """The entry of `_BLOCKS` for a problem."""
    column = _column(problem)
    if device.startswith("gfx"):
        kind = "mfma fp32" if problem.itemsize == 4 else "mfma masked" if special == "masked" else "mfma"
    elif problem.itemsize == 4:  # exact fp32 products do not use the tensor cores
        kind = "fp32 masked" if problem.queries == "image" and (special == "masked" or device[3:-1] == "10") else "fp32"  # sm_100 spills
    elif special:
        kind = special
    elif descriptors:
        kind = "wgmma" if device[3:-1] == "9" else "tcgen05"
        box = key_box(problem.window, _BLOCKS[kind, problem.queries][column].keys)
        if (f"{kind} ragged", problem.queries) in _BLOCKS and any(w % b for w, b in zip(problem.window, box, strict=True)):
            kind += " ragged"
        elif problem.text and (f"{kind} joint", problem.queries) in _BLOCKS:
            kind += " joint"
    else:
        kind = "cp.async" if device in SHARED_MEMORY else "cp.async, 99 KB"
    if device[3:-1] == "10" and (f"{kind} tcgen05", problem.queries) in _BLOCKS:
        kind += " tcgen05"
    return _BLOCKS[kind, problem.queries][column]


def _column(problem: Problem) -> int:
    """The column of a table, by head dim."""
    return 0 if problem.head_dim <= 64 else 1 if problem.head_dim <= 128 else 2


def query_box(patch: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The box of at most `tokens` tokens whose tiles exceed a patch the least; among equals the largest, then the squarest.

    A square box is also best for patches that an offset cuts at the border, because more whole tiles are outside the grid.
    """

    def cost(box: tuple[int, int]) -> tuple[int, int, int]:
        return _covered(patch, box), -prod(box), max(box)

    smallest = min(tokens, max(MIN_BLOCK, ceil_power_of_two(patch[0]) * ceil_power_of_two(patch[1])))
    return min(_boxes(smallest, tokens), key=cost)


def key_box(window: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The box of at most `tokens` tokens that reads the least beyond the window, and fits inside it if any box does.

    Among equals the largest, then the widest, whose rows are longest in memory.
    """

    def cost(box: tuple[int, int]) -> tuple[bool, int, int, int]:
        steps = _covered(window, box) // prod(box)
        return not fits_inside(box, window), steps * (prod(box) + tokens // 8), -prod(box), -box[1]  # tokens // 8: cost of a step

    return min(_boxes(MIN_BLOCK, tokens), key=cost)


def _cut(patch: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    return min(patch[0], grid[0]), min(patch[1], grid[1])


def fits_inside(box: tuple[int, int], window: tuple[int, int]) -> bool:
    return all(b <= w for b, w in zip(box, window, strict=True))


def shared_memory(device: str) -> int:
    """Bytes of shared memory that one program may use on a device."""
    return SHARED_MEMORY.get(device, SMALL_SHARED_MEMORY)


def ceil_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _covered(area: tuple[int, int], box: tuple[int, int]) -> int:
    """Number of tokens of the boxes that tile an area."""
    return prod(-(-a // b) * b for a, b in zip(area, box, strict=True))


def _boxes(at_least: int, at_most: int) -> list[tuple[int, int]]:
    powers = [1 << i for i in range(at_most.bit_length())]
    return [(r, c) for r in powers for c in powers if at_least <= r * c <= at_most and c <= 256 and r <= 256]
