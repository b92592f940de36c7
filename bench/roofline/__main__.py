"""Two rooflines: the ceilings of a machine, measured; and a ranking of launch configurations without a GPU, `python -m bench.roofline`.

The ranking comes from the disassembly of the main loop.

Per block of keys a program needs the tensor cores, the exponential unit, issue slots, and the block itself out of L2. Inside one
program products and softmax follow each other (the softmax waits for its scores, the second product for the softmax); programs
that share a multiprocessor overlap, and so do loads. A block takes, in cycles of a multiprocessor,

    max(matrix, other, l2, (matrix + other) / programs)      other = max(exponentials, issue)

Instructions are counted as they are executed: what warps repeat costs its cycles, and the bound is of the useful products alone. A loop
whose products wait for each other has no bound; it ranks behind every one that has. It ranks; it does not predict: latencies and clocks
are not in it (`bench/predictions/__main__.py` has them). Measurements replace it where there are any.
"""

from __future__ import annotations

import argparse
import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from bench.attention import shapes
from bench.harness.rows import write_rows
from bench.harness.timing import measure_in_turn
from scalediff_kernels.neighborhood import config

if TYPE_CHECKING:  # both need Triton, the ceilings do not
    from bench.compile.attention import Case
    from bench.compile.binary import Binary

# Per multiprocessor and clock, of sm_90 (NVIDIA, "Hopper Tuning Guide" and the H100 data sheet: 989.5 TFLOP/s dense at 132 x 1.83 GHz).
MATRIX_FLOPS, EXPONENTIALS, SCHEDULERS, REGISTERS, THREADS = 4096, 16, 4, 65_536, 2048
L2_BYTES = 24  # assumed: 5.6 TB/s over 132 multiprocessors at 1.75 GHz; not measured yet
PEAK_TFLOPS = 989.5

SHAPES: dict[str, tuple[str, Literal["image", "text"]]] = {
    "FLUX 4096 px": ("flux-image-4096", "image"),
    "FLUX 4096 px, text keys": ("flux-4096", "image"),
    "FLUX 4096 px, text queries": ("flux-4096", "text"),
    "SDXL 4096 px, 256^2": ("sdxl-64-4096", "image"),
    "SDXL 4096 px, 128^2": ("sdxl-32-4096", "image"),
}
CANDIDATES = [
    config.Blocks(queries, keys, warps, stages)
    for queries, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
    for keys in (32, 64, 128)
    for stages in (2, 3)
]


class Ceilings(NamedTuple):
    """What a machine reaches in this run.

    Attributes:
        copy_gbs: GB/s of a copy far larger than its caches, bytes read and written.
        matrix_tflops: TFLOP/s of a large matrix product of random numbers in one dtype.
    """

    copy_gbs: float
    matrix_tflops: float


def ceilings(device: str, dtype: torch.dtype, *, seconds: float = 0.5) -> Ceilings:
    """Measure both; 2 GB and 8192 x 8192 x 8192 on a GPU, 256 MB and 2048 x 2048 x 2048 on a CPU."""
    size, side = (2**31, 8192) if device == "cuda" else (2**28, 2048)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure_in_turn([lambda: target.copy_(source)], device, seconds=seconds).p50
    rng = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=rng, dtype=dtype, device=device) for _ in range(2))
    product = measure_in_turn([lambda: a @ b], device, seconds=seconds).p50
    return Ceilings(2 * size / copy / 1e6, 2 * side**3 / product / 1e9)


class Cycles(NamedTuple):
    """Of one multiprocessor, for one block of keys of one program."""

    matrix: float
    exponentials: float
    issue: float
    l2: float
    programs: int

    @property
    def compute(self) -> float:
        other = max(self.exponentials, self.issue)
        return max(self.matrix, other, (self.matrix + other) / self.programs)

    @property
    def total(self) -> float:
        return max(self.compute, self.l2)


def cycles(binary: Binary, num_warps: int, block_bytes: int) -> Cycles:
    """The model above, from the main loop's instructions. One pass of the loop is one block of keys, `block_bytes` of K and V."""
    flops = 0
    for instruction in binary.loops[0]:
        if shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):  # issued by four warps together
            flops += 2 * prod(map(int, shape.groups())) * num_warps // 4
    exponentials = sum("MUFU.EX2" in i for i in binary.loops[0]) * num_warps * 32
    programs = min(
        REGISTERS // (-(-binary.registers // 8) * 8 * 32 * num_warps),
        (config.shared_memory("sm_90") + 1024) // (binary.shared + 1024),
        THREADS // (32 * num_warps),
    )
    issue = len(binary.loops[0]) * num_warps / SCHEDULERS
    return Cycles(flops / MATRIX_FLOPS, exponentials / EXPONENTIALS, issue, block_bytes / L2_BYTES, programs)


def row(name: str, case: Case, blocks: config.Blocks) -> dict[str, Any]:
    chosen = case.launch("sm_90").config._replace(
        query_box=config.query_box(case.patch, blocks.queries) if case.queries == "image" else (1, blocks.queries),
        key_box=config.key_box(case.window, blocks.keys),
        text_block=blocks.keys,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    from bench.compile.binary import compile_launch, serialised

    facts: dict[str, Any] = {"shape": name} | blocks._asdict()
    try:
        binary = compile_launch(case.launch("sm_90", chosen), "sm_90")
    except Exception as error:
        return facts | {"note": f"does not compile: {str(error).splitlines()[0][:60]}"}
    c = cycles(binary, blocks.num_warps, 2 * blocks.keys * case.head_dim * case.dtype.itemsize)
    facts |= {"registers": binary.registers, "spills": binary.spills, "shared": binary.shared, "programs": c.programs}
    if binary.spills or c.programs == 0 or c.matrix == 0:
        return facts | {"note": "spills" if binary.spills else "does not fit" if c.programs == 0 else "no HGMMA"}
    if any(map(serialised, binary.loops)):
        return facts | {"note": "serialised"}
    shown = {"matrix": c.matrix, "exponentials": c.exponentials, "issue": c.issue, "compute": c.compute, "l2": c.l2, "total": c.total}
    useful = 4 * blocks.queries * blocks.keys * config.ceil_power_of_two(case.head_dim) / MATRIX_FLOPS
    bound = PEAK_TFLOPS * useful / c.total
    return facts | {key: f"{value:.0f}" for key, value in shown.items()} | {"bound": f"{bound:.0f}"}


def case_of(shape: shapes.Shape, queries: Literal["image", "text"] = "image") -> Case:
    """A benchmark's shape as a kernel to compile."""
    from bench.compile.attention import Case

    return Case(
        shape.head_dim, shape.dtype, shape.text, queries, grid=shape.grid, window=shape.window, patch=shape.patch, heads=shape.heads,
        batch=shape.batch,
    )  # fmt: skip


FIELDS = (
    "shape", "queries", "keys", "num_warps", "num_stages", "registers", "spills", "shared", "programs", "matrix", "exponentials",
    "issue", "compute", "l2", "total", "bound", "note",
)  # fmt: skip


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    """Highest bound first; of those that L2 makes equal, the one that computes fastest."""
    return -float(row.get("bound", 0)), float(row.get("compute", 0)) / float(row.get("matrix", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    rows = []
    for name in options.shape:
        shape, queries = SHAPES[name]
        case = case_of(shapes.SHAPES[shape], queries)
        shipped = case.launch("sm_90").config
        ranked = sorted((row(name, case, blocks) for blocks in CANDIDATES), key=_rank)
        print(name, *(f"{f}" for f in FIELDS[1:]), sep="\t")
        for r in ranked:
            used = prod(shipped.query_box), prod(shipped.key_box), shipped.num_warps, shipped.num_stages
            mark = "shipped" if (r["queries"], r["keys"], r["num_warps"], r["num_stages"]) == used else ""
            print(mark, *(str(r.get(f, "")) for f in FIELDS[1:]), sep="\t", flush=True)
        rows += [dict.fromkeys(FIELDS, "") | r for r in ranked]
    if options.csv:
        write_rows(options.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
