"""What the shipped kernels should reach on an H100, written down before any of them has run there: `python -m bench.predictions --write`.

For every program: the cycles of a block of keys by `bench/roofline/cycles.py`, times blocks, times the programs that one multiprocessor
gets, at 1.83 GHz; divided by the share of that model which a published kernel of the same schedule reaches. No GPU is needed. The kernel
that averages the sums of text queries is left out. A measurement beside a prediction shows whether the model is right, and if not which
term of it is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch

from bench.attention import shapes
from bench.harness.facts import ROOT
from bench.harness.pages import fill, require_pandas, table
from bench.harness.rows import RESULTS, write_rows, write_text
from bench.roofline.cycles import case_of, cycles
from scalediff_kernels.neighborhood.config import MULTIPROCESSORS
from scalediff_kernels.neighborhood.geometry import attention_flops

RESULT = RESULTS / "predicted-sm_90.csv"
PAGE = ROOT / "docs" / "internals" / "kernels.md"
CLOCK = 1.83e9  # Hz
# Triton's fused attention (its tutorial 06, forward, no mask) on an H100: 458 to 477 TFLOP/s at D = 128 and about 400 at D = 64 by figures
# that others have published; nobody has measured it here. Its schedule is that of our 128 x 128 blocks with eight warps, one program on a
# multiprocessor, bound at 653, and of 128 x 64 with four, two programs, bound at 742 TFLOP/s.
REACHED = {1: 465 / 653, 2: 400 / 742}
SHAPES = ("flux-image-4096", "flux-4096", "flux-2048", "flux-8192", "sdxl-64-4096", "sdxl-32-4096", "lumina2-4096")
FIELDS = (
    "shape", "rule", "kernel", "blocks", "registers", "programs", "a_multiprocessor", "key_blocks", "cycles", "useful_tflop", "ms",
    "tflops",
)  # fmt: skip
SHOWN = {
    "shape": "shape", "rule": "text rule", "kernel": "kernel", "blocks": "queries x keys, warps, stages", "programs": "programs",
    "ms": "predicted ms", "tflops": "predicted TFLOP/s",
}  # fmt: skip


def rows(name: str) -> Iterator[dict[str, Any]]:
    """A row for the image kernel and one for the text kernel, by every rule; and the call, where there are two."""
    shape = shapes.SHAPES[name]
    heads: dict[str, int] = {"heads": shape.heads, "head_dim": shape.head_dim, "batch": shape.batch}
    image_flops = attention_flops(grid=shape.grid, window=shape.window, text=shape.text, **heads)
    for rule in shape.rules:
        task = shapes.Task(name, shape, shape.dtype, "cuda", rule)
        found = [_row(task, "image", image_flops)]
        if rule:
            found.append(_row(task, "text", task.flops("window") - image_flops))
            found.append({"kernel": "both", "useful_tflop": task.flops("window") / 1e12, "ms": sum(row["ms"] for row in found)})
        for row in found:
            yield row | {"shape": name, "rule": rule, "tflops": 1000 * row["useful_tflop"] / row["ms"]}


def _row(task: shapes.Task, queries: Literal["image", "text"], flops: int) -> dict[str, Any]:
    from bench.compile.binary import compile_launch

    shape = task.shape
    if queries == "text" and task.rule == "global":  # one window over the grid
        shape = replace(shape, window=shape.grid, patch=shape.grid)
    launch = case_of(shape, queries).launch("sm_90")
    config, binary, keys = launch.config, compile_launch(launch, "sm_90"), prod(launch.config.key_box)
    c = cycles(binary, config.num_warps, 2 * keys * shape.head_dim * shape.dtype.itemsize)
    windows = config.part_windows if queries == "text" else 1
    text = -(-shape.text // config.text_block) if shape.text else 0
    blocks = windows * (prod(-(-min(w, g) // k) for w, g, k in zip(shape.window, shape.grid, config.key_box, strict=True)) + text)
    turns = -(-launch.programs // MULTIPROCESSORS["sm_90"])  # programs of one multiprocessor, one after another or beside each other
    seconds = turns * blocks * c.total / CLOCK / REACHED[min(2, c.programs)]
    return {
        "kernel": queries, "blocks": f"{prod(config.query_box)} x {keys}, {config.num_warps}, {config.num_stages}",
        "registers": binary.registers, "programs": launch.programs, "a_multiprocessor": c.programs, "key_blocks": blocks,
        "cycles": round(c.total), "useful_tflop": flops / 1e12, "ms": 1000 * seconds,
    }  # fmt: skip


def page() -> str:
    """docs/internals/kernels.md with its table of predictions from the committed rows."""
    from pandas import read_csv

    found = read_csv(RESULT, dtype=str, keep_default_na=False)[list(SHOWN)].rename(columns=SHOWN)
    return fill(PAGE.read_text(), {"predictions": table(found, text=list(SHOWN.values())[:4])})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)} and the table in {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.write:
        require_pandas()
    with torch.no_grad():
        found = [row for name in SHAPES for row in rows(name)]
    shown = [dict.fromkeys(FIELDS, "") | {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in found]
    for row in shown:
        print(*(row[field] for field in FIELDS), sep="\t")
    if options.write:
        write_rows(RESULT, FIELDS, shown)
        write_text(PAGE, page())


if __name__ == "__main__":
    main()
