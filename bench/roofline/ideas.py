"""Schedules that nobody has to compile: those of published kernels, on which the model is calibrated, and ideas that were not built.

Both change what a compiled candidate's loop does (`bench/roofline/__main__.py`), and simulate it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.roofline.call import FINISH, PEAK_TFLOPS, costs, efficiency, slowed
from bench.roofline.loops import MATRIX_FLOPS, Step, from_text
from bench.roofline.pipeline import Schedule

FLUX, TEXT, SDXL = "FLUX 4096 px", "FLUX 4096 px, text keys", "SDXL 4096 px, 256^2"
FLASH, TUTORIAL = "FlashAttention 3", "Triton's tutorial"
# Name, head dim, the candidate whose loop it is: shape, path, queries, keys, stages, turns; keys of a block there; what differs; published
# TFLOP/s at 16,384 and at 4096 keys. FlashAttention 3 shares loads between two multiprocessors at head dims from 128 on.
PUBLISHED: tuple[tuple[str, int, tuple[Any, ...], int, dict[str, Any], int, int], ...] = (
    (FLASH, 128, (FLUX, "warp-specialised", 128, 128, 3, True), 176, {"stages": 2, "block_bytes": 45_056.0}, 648, 638),
    (FLASH, 64, (SDXL, "warp-specialised", 128, 128, 3, True), 192, {"stages": 2, "block_bytes": 49_152.0, "actors": 3}, 497, 476),
    (TUTORIAL, 128, (FLUX, "descriptor", 128, 128, 3, False), 128, {}, 477, 458),
    (TUTORIAL, 64, (SDXL, "descriptor", 128, 64, 3, False), 64, {}, 403, 400),
)
# Idea, factors of both products' cycles and of the bytes of a block, and what differs.
IDEAS: tuple[tuple[str, float, float, float, dict[str, Any]], ...] = (
    ("as shipped", 1, 1, 1, {}),
    ("L2 delivers 20 bytes a clock instead of 24", 1, 1, 1, {"l2": 20}),
    ("L2 delivers 32 bytes a clock", 1, 1, 1, {"l2": 32}),
    ("a load takes 400 cycles instead of 600", 1, 1, 1, {"latency": 400}),
    ("a load takes 1000 cycles", 1, 1, 1, {"latency": 1000}),
    ("two tiles of a patch share K and V by TMA multicast", 1, 1, 0.5, {}),
    ("the producer loads the values of a block before the next keys", 1, 1, 1, {"ahead": False}),
    ("two stages", 1, 1, 1, {"stages": 2}),
    ("three stages", 1, 1, 1, {"stages": 3}),
    ("192 query rows, if the registers sufficed", 1, 1, 1, {"actors": 3}),
    ("P V in fp8", 1, 0.5, 0.75, {}),
    ("Q K in int8 and P V in fp8", 0.5, 0.5, 0.5, {}),
)


def schedule(row: Mapping[str, Any]) -> Schedule:
    """That of a row of the CSV."""
    actors, stages = int(row["actors"]), int(row["num_stages"])
    return Schedule(from_text(row["loop"]), actors, row["path"] == "warp-specialised", stages, float(row["block_bytes"]))


def scaled(loop: Sequence[Step], runs: float, *products: float) -> tuple[Step, ...]:
    """The loop with other amounts of work: of its instructions, and of both its products."""
    factors = iter(products)
    return tuple(
        step._replace(amounts=tuple(next(factors) * x for x in step.amounts)) if step.action == "product"
        else step._replace(amounts=tuple(runs * x for x in step.amounts)) if step.action == "run" else step
        for step in loop
    )  # fmt: skip


def rows(candidates: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the published schedules, then of the ideas. `tflops` is that of the steady state, and without the factor if published."""
    keys = ("shape", "path", "queries", "keys", "num_stages", "ping_pong")
    by_key = {tuple(str(row[key]) for key in keys): row for row in reversed(candidates) if row.get("loop")}
    for name, head_dim, key, block_keys, changes, most, at_4096 in PUBLISHED:
        row = by_key[tuple(map(str, key))]
        more, share = block_keys / int(row["keys"]), efficiency(row["path"], head_dim)
        s = schedule(row)
        rows_of_actor = int(row["queries"]) // (s.actors if s.specialised else 1)
        elements = rows_of_actor * head_dim
        s = replace(s, loop=scaled(s.loop, more, more, more), query_bytes=2 * elements, finish=FINISH * elements / 128, **changes)
        found, blocks = costs(s, share), 4096 // block_keys
        short = share * PEAK_TFLOPS * found["matrix"] * blocks * 16 / slowed(s, share).call(blocks, 16)
        sizes = {"shape": f"{name}, D = {head_dim}", "path": "published", "queries": rows_of_actor * s.actors, "keys": block_keys}
        note = f"{most}, so the factor is {share}; at 4096 keys {short:.0f} by the model, {at_4096} published"
        yield sizes | found | {"tflops": f"{PEAK_TFLOPS * found['matrix'] / found['block']:.0f}", "note": note}
    for shape in (FLUX, TEXT, SDXL):
        row = next(row for row in candidates if row["shape"] == shape and row["note"] == "shipped")
        head_dim = 64 if shape == SDXL else 128
        s, share = schedule(row), efficiency(row["path"], head_dim)
        for idea, scores, values, size, changes in IDEAS:
            other = replace(s, loop=scaled(s.loop, 1, scores, values), block_bytes=size * s.block_bytes, **changes)
            found = costs(other, share)
            queries = int(row["queries"]) * other.actors // s.actors
            tflops = share * PEAK_TFLOPS * 4 * queries * int(row["keys"]) * head_dim / MATRIX_FLOPS / found["block"]
            named = {"shape": shape, "path": "idea", "queries": queries, "keys": row["keys"], "note": idea}
            if idea == "as shipped" or other != s:
                yield named | found | {"tflops": f"{tflops:.0f}"}
