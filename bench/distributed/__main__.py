"""Bytes that ranks exchange for one picture, and a prediction of the time that this costs: `python -m bench.distributed --write`.

FLUX.1-dev in bf16, its rows split over 2 to 64 GPUs. Bytes are exact: `scalediff_kernels/distributed/geometry.py` counts them, and tests
compare its counts with the messages of real processes. Times are a model on paper: nothing here has run on several GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from bench.harness.facts import ROOT
from bench.harness.pages import fill, page_parser, require_pandas, table, write_or_check
from bench.harness.rows import RESULTS, read_records
from scalediff_kernels.distributed import geometry
from scalediff_kernels.neighborhood.geometry import attention_flops, text_attention_flops

PAGE = ROOT / "docs" / "guide" / "several-gpus.md"
PIXELS = 16  # of a token
LAYERS, HEADS, HEAD_DIM, TEXT, WINDOW, PATCH, ITEMSIZE = 57, 24, 128, 512, 64, 32, 2
SIZES, RANKS = (4096, 8192, 16384), (2, 4, 8, 16, 32, 64)
LINKS = {"NVLink, 450 GB/s": 450e9, "PCIe 5, 64 GB/s": 64e9, "100 GbE, 12.5 GB/s": 12.5e9}  # nominal, in one direction
LINEAR_RATE = 600e12  # FLOP/s of linear layers; an assumption
LATENCY, ROUNDS = 30e-6, 6  # seconds of a message or collective, an assumption; of a layer: rows, text q, k, v, merged text twice


class Exchanged(NamedTuple):
    """Bytes that the busiest rank receives for one layer."""

    halo: int
    gathered: int
    heads: int
    text: int


def exchanged(size: int, ranks: int) -> Exchanged:
    """Of a square picture of `size` pixels, by halos, by gathering all keys and values, and by exchanging heads; and of the text."""
    rows, sides = geometry.split_rows(size // PIXELS, ranks), {"columns": size // PIXELS, "head_dim": HEAD_DIM, "itemsize": ITEMSIZE}
    gathered_text = 3 * (TEXT - TEXT // ranks) * HEADS * HEAD_DIM * ITEMSIZE
    merged = geometry.text_bytes(ranks=ranks, text=TEXT, heads=HEADS, head_dim=HEAD_DIM, itemsize=ITEMSIZE, rule="window")
    halos = geometry.halo_bytes(rows=rows, window=WINDOW, patch=PATCH, groups=HEADS, **sides)
    heads = 0 if HEADS % ranks else max(geometry.head_exchange_bytes(rows=rows, heads=HEADS, **sides))
    return Exchanged(max(halos), max(geometry.gathered_bytes(rows=rows, groups=HEADS, **sides)), heads, gathered_text + merged)


@cache
def attention_work(size: int) -> int:
    """FLOPs of the attention of a layer of one pass."""
    grid: Any = {"grid": (size // PIXELS, size // PIXELS), "window": (WINDOW, WINDOW), "heads": HEADS, "head_dim": HEAD_DIM, "text": TEXT}
    return attention_flops(**grid) + text_attention_flops(**grid, patch=(PATCH, PATCH), rule="window")


@cache
def linear_work(size: int) -> float:
    """FLOPs of the linear layers of a layer of one pass: by the counts of `bench.flops`, which grow with the tokens by a constant each."""
    rows = [row for row in read_records(RESULTS / "flops.csv") if (row["model"], row["method"]) == ("flux", "npa")]
    counted = {int(row["size"]): 1e12 * float(row["forward_linear"]) for row in rows}
    small, large = 4096, 8192
    a_pixel = (counted[large] - counted[small]) / (large**2 - small**2)
    return (counted[small] + a_pixel * (size**2 - small**2)) / LAYERS


@cache
def attention_rate() -> float:
    """FLOP/s of the attention: what `bench.predictions` predicts for this layer on an H100."""
    wanted = {"shape": "flux-4096", "rule": "window", "kernel": "both"}
    return next(1e12 * float(row["tflops"]) for row in read_records(RESULTS / "predicted-sm_90.csv") if wanted.items() <= row.items())


def seconds(size: int, ranks: int, bandwidth: float) -> float:
    """Of a layer. Windows that need no halo are computed while rows are on their way; nothing else overlaps."""
    attention, linear = attention_work(size) / attention_rate() / ranks, linear_work(size) / LINEAR_RATE / ranks
    if ranks == 1:
        return attention + linear
    rows, found = geometry.split_rows(size // PIXELS, ranks), exchanged(size, ranks)
    hidden = min(
        sum(section.queries.size for section in geometry.sections(rows, rank, WINDOW, PATCH, 0)[0]) / own.size
        for rank, own in enumerate(geometry.owned_rows(rows))
    )
    waits = max(0.0, found.halo / bandwidth - hidden * attention) + found.text / bandwidth + ROUNDS * LATENCY
    return attention + linear + waits


def efficiency(size: int, ranks: int, bandwidth: float) -> float:
    """Speed-up over one GPU, divided by the number of GPUs."""
    return seconds(size, 1, bandwidth) / seconds(size, ranks, bandwidth) / ranks


def tables() -> dict[str, list[str]]:
    """The generated blocks of docs/guide/several-gpus.md."""
    from pandas import DataFrame

    def mb(count: int) -> str:
        return f"{count / 1e6:,.0f}" if count else "-"

    moved: list[dict[str, Any]] = []
    for size, ranks in product(SIZES[:2], RANKS):
        found = exchanged(size, ranks)
        moved.append({
            "size": f"{size} px", "GPUs": ranks, "rows of a GPU": size // PIXELS // ranks, "halo, MB": mb(found.halo),
            "all keys and values, MB": mb(found.gathered), "heads, MB": mb(found.heads), "text, MB": mb(found.text),
            "halo / all": f"{found.halo / found.gathered:.2f}",
        })  # fmt: skip
    predicted = [
        {"size": f"{size} px", "GPUs": ranks} | {name: f"{efficiency(size, ranks, bandwidth):.0%}" for name, bandwidth in LINKS.items()}
        for size, ranks in product(SIZES, RANKS)
    ]
    return {name: table(DataFrame(rows), text=["size"]) for name, rows in (("bytes", moved), ("prediction", predicted))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = page_parser("distributed", __doc__.split("\n")[0], "the tables of docs/guide/several-gpus.md")
    options = parser.parse_args(arguments)
    require_pandas()
    blocks = tables()
    if options.write or options.check:
        write_or_check({PAGE: fill(PAGE.read_text(), blocks)}, check=options.check, command="python -m bench.distributed --write")
    for lines in blocks.values():
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
