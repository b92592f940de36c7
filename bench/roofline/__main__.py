"""Rank launch configurations for sm_90 without a GPU, by the disassembly of the main loop: `python -m bench.roofline`.

The model is in `bench/roofline/cycles.py`. The bound is of the useful products alone. A loop whose products wait for each other has no
bound; it ranks behind every one that has. The ranking predicts no times (`bench/predictions/__main__.py` does); measurements replace it
where there are any.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.attention import shapes
from bench.harness.rows import write_rows
from bench.roofline.cycles import MATRIX_FLOPS, case_of, cycles
from scalediff_kernels.neighborhood import config

if TYPE_CHECKING:
    from bench.compile.attention import Case

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
CYCLES = ("matrix", "exponentials", "issue", "compute", "l2", "total")
FIELDS = ("shape", *config.Blocks._fields, "registers", "spills", "shared", "programs", *CYCLES, "bound", "note")


def row(name: str, case: Case, blocks: config.Blocks) -> dict[str, Any]:
    """One candidate: cycles and bound, or a note why it has none."""
    from bench.compile.binary import compile_launch, serialised

    query_box = config.query_box(case.patch, blocks.queries) if case.queries == "image" else (1, blocks.queries)
    boxes = {"query_box": query_box, "key_box": config.key_box(case.window, blocks.keys), "text_block": blocks.keys}
    warps = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    chosen = case.launch("sm_90").config._replace(**boxes, **warps)
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
    useful = 4 * blocks.queries * blocks.keys * config.ceil_power_of_two(case.head_dim) / MATRIX_FLOPS
    return facts | {name: f"{getattr(c, name):.0f}" for name in CYCLES} | {"bound": f"{PEAK_TFLOPS * useful / c.total:.0f}"}


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    """Highest bound first; of those that L2 makes equal, the one that computes fastest."""
    return -float(row.get("bound", 0)), float(row.get("compute", 0)) / float(row.get("matrix", 1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    rows = []
    for name, (shape, queries) in SHAPES.items():
        case = case_of(shapes.SHAPES[shape], queries)
        shipped = case.launch("sm_90").config
        used = (prod(shipped.query_box), prod(shipped.key_box), shipped.num_warps, shipped.num_stages)
        ranked = sorted((row(name, case, blocks) for blocks in CANDIDATES), key=_rank)
        print(name, *FIELDS[1:], sep="\t")
        for r in ranked:
            mark = "shipped" if tuple(r[field] for field in config.Blocks._fields) == used else ""
            print(mark, *(str(r.get(field, "")) for field in FIELDS[1:]), sep="\t", flush=True)
        rows += [dict.fromkeys(FIELDS, "") | r for r in ranked]
    if options.csv:
        write_rows(options.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
