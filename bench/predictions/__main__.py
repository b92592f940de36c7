"""What the shipped kernels should reach on an H100, written down before any of them has run there: `python -m bench.predictions --write`.

For every program: the cycles of a block of keys by `bench.roofline`'s model of the compiled code, times blocks, times the programs that one
multiprocessor gets, at 1.83 GHz; divided by the share of that model which a published kernel of the same schedule reaches. No GPU is
needed. The kernel that averages the sums of text queries is left out. A measurement beside a prediction says whether the model may be
believed, and which term of it is wrong.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch

from bench.attention import shapes
from bench.harness.rows import ROOT, write_rows
from bench.roofline.__main__ import case_of, cycles
from scalediff_kernels.neighborhood.config import MULTIPROCESSORS
from scalediff_kernels.neighborhood.geometry import attention_flops

RESULT = ROOT / "bench" / "results" / "predicted-sm_90.csv"
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


def rows(name: str) -> Iterator[dict[str, Any]]:
    """A row for the image kernel and one for the text kernel, by every rule; and the call, where there are two."""
    shape = shapes.SHAPES[name]
    for rule in shape.rules:
        task = shapes.Task(name, shape, shape.dtype, "cuda", rule)
        image_flops = attention_flops(
            grid=shape.grid, window=shape.window, heads=shape.heads, head_dim=shape.head_dim, batch=shape.batch, text=shape.text
        )  # fmt: skip
        found = [_row(task, "image", image_flops)]
        if rule:
            found.append(_row(task, "text", task.flops("window") - image_flops))
            found.append({"kernel": "both", "useful_tflop": task.flops("window") / 1e12, "ms": sum(row["ms"] for row in found)})
        for row in found:
            facts = {"shape": name, "rule": rule, "tflops": 1000 * row["useful_tflop"] / row["ms"]}
            yield row | facts


def _row(task: shapes.Task, queries: Literal["image", "text"], flops: int) -> dict[str, Any]:
    from bench.compile.binary import compile_launch

    shape = task.shape
    if queries == "text" and task.rule == "global":  # one window over the grid
        shape = replace(shape, window=shape.grid, patch=shape.grid)
    case = case_of(shape, queries)
    launch = case.launch("sm_90")
    config = launch.config
    binary = compile_launch(launch, "sm_90")
    keys = prod(config.key_box)
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


def table() -> list[str]:
    """Lines of docs/internals/kernels.md, from the committed rows."""
    with RESULT.open(newline="") as file:
        found = list(csv.DictReader(file))
    lines = ["| shape | text rule | kernel | queries x keys, warps, stages | programs | predicted ms | predicted TFLOP/s |"]
    lines += ["|---|---|---|---|--:|--:|--:|"]
    return lines + [
        f"| {r['shape']} | {r['rule']} | {r['kernel']} | {r['blocks']} | {r['programs']} | {r['ms']} | {r['tflops']} |" for r in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    with torch.no_grad():
        found = [row for name in SHAPES for row in rows(name)]
    shown = [dict.fromkeys(FIELDS, "") | {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in found]
    for row in shown:
        print(*(row[field] for field in FIELDS), sep="\t")
    if options.write:
        write_rows(RESULT, FIELDS, shown)
        print("\n".join(table()))


if __name__ == "__main__":
    main()
