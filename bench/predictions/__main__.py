"""What the shipped kernels should reach on an H100, written down before any of them has run there: `python -m bench.predictions --write`.

For every shape, what the table chooses, by the model of `bench/roofline/call.py`. No GPU is needed. The kernel that averages the sums of
text queries is left out. A measurement beside a prediction shows whether the model is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import prod
from typing import Any, Literal

import torch

from bench.attention import shapes
from bench.compile.binary import compile_launch
from bench.harness.facts import ROOT
from bench.harness.pages import fill, require_pandas, table
from bench.harness.rows import RESULTS, write_rows, write_text
from bench.roofline.call import case_of, predict

RESULT = RESULTS / "predicted-sm_90.csv"
PAGE = ROOT / "docs" / "internals" / "kernels.md"
SHAPES = ("flux-image-4096", "flux-4096", "flux-2048", "flux-8192", "sdxl-64-4096", "sdxl-32-4096", "lumina2-4096")
FIELDS = ("shape", "rule", "kernel", "blocks", "useful_tflop", "ms", "tflops")
SHOWN = {
    "shape": "shape", "rule": "text rule", "kernel": "kernel", "blocks": "queries x keys, stages", "ms": "predicted ms",
    "tflops": "predicted TFLOP/s",
}  # fmt: skip


def rows(name: str) -> Iterator[dict[str, Any]]:
    """A row for the image kernel and one for the text kernel, by every rule; and the call, where there are two."""
    shape = shapes.SHAPES[name]
    for rule in shape.rules:
        found = [_row(shape, "image", rule)]
        if rule:
            found.append(_row(shape, "text", rule))
            found.append({"kernel": "both"} | {key: sum(row[key] for row in found) for key in ("useful_tflop", "ms")})
        for row in found:
            yield row | {"shape": name, "rule": rule, "tflops": 1000 * row["useful_tflop"] / row["ms"]}


def _row(shape: shapes.Shape, queries: Literal["image", "text"], rule: str) -> dict[str, Any]:
    case = case_of(shape, queries, rule)
    launch = case.launch("sm_90")
    _, ms = predict(launch, compile_launch(launch, "sm_90"), case)
    blocks = f"{prod(launch.config.query_box)} x {prod(launch.config.key_box)}, {launch.config.num_stages}"
    return {"kernel": queries, "blocks": blocks, "useful_tflop": shape.flops(queries, rule) / 1e12, "ms": ms}


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
