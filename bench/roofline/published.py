"""The schedules of published kernels, on which the model is calibrated: a candidate's loop with other amounts of work, simulated.

Nobody has to compile them (`bench/roofline/__main__.py` compiles the candidates).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bench.roofline.call import FINISH, PEAK_TFLOPS, costs, efficiency, slowed
from bench.roofline.loops import from_text
from bench.roofline.pipeline import Schedule

FLUX, SDXL = "FLUX 4096 px", "SDXL 4096 px, 256^2"
FLASH, TUTORIAL = "FlashAttention 3", "Triton's tutorial"


class Published(NamedTuple):
    """A kernel of others."""

    name: str
    head_dim: int
    like: tuple[str, ...]  # the candidate whose loop it is: shape, path, queries, keys, stages, turns
    keys: int  # of a block there
    tflops: int  # at 16,384 keys
    at_4096: int  # TFLOP/s at 4096 keys
    changes: Mapping[str, Any]  # what differs


# FlashAttention 3 shares loads between two multiprocessors at head dims from 128 on.
PUBLISHED = (
    Published(FLASH, 128, (FLUX, "warp-specialised", "128", "128", "3", "True"), 176, 648, 638, {"stages": 2, "block_bytes": 45_056.0}),
    Published(
        FLASH, 64, (SDXL, "warp-specialised", "128", "128", "3", "True"), 192, 497, 476,
        {"stages": 2, "block_bytes": 49_152.0, "actors": 3},
    ),
    Published(TUTORIAL, 128, (FLUX, "descriptor", "128", "128", "3", "False"), 128, 477, 458, {}),
    Published(TUTORIAL, 64, (SDXL, "descriptor", "128", "64", "3", "False"), 64, 403, 400, {}),
)  # fmt: skip


def schedule(row: Mapping[str, Any]) -> Schedule:
    """That of a row of the CSV."""
    actors, stages = int(row["actors"]), int(row["num_stages"])
    return Schedule(from_text(row["loop"]), actors, row["path"] == "warp-specialised", stages, float(row["block_bytes"]))


def rows(candidates: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """`tflops` is that of the steady state, without the factor."""
    keys = ("shape", "path", "queries", "keys", "num_stages", "ping_pong")
    by_key = {tuple(str(row[key]) for key in keys): row for row in reversed(candidates) if row.get("loop")}
    for one in PUBLISHED:
        row = by_key[one.like]
        more, share, s = one.keys / int(row["keys"]), efficiency(row["path"], one.head_dim), schedule(row)
        queries = int(row["queries"]) // (s.actors if s.specialised else 1)
        loop = tuple(
            step._replace(amounts=tuple(more * x for x in step.amounts)) if step.action in ("run", "product") else step for step in s.loop
        )
        elements = queries * one.head_dim
        s = replace(s, loop=loop, query_bytes=2 * elements, finish=FINISH * elements / 128, **one.changes)
        found, blocks = costs(s, share), 4096 // one.keys
        short = share * PEAK_TFLOPS * found["matrix"] * blocks * 16 / slowed(s, share).call(blocks, 16)
        note = f"{one.tflops}, so the factor is {share}; at 4096 keys {short:.0f} by the model, {one.at_4096} published"
        sizes = {"shape": f"{one.name}, D = {one.head_dim}", "path": "published", "queries": queries * s.actors, "keys": one.keys}
        yield sizes | found | {"tflops": f"{PEAK_TFLOPS * found['matrix'] / found['block']:.0f}", "note": note}
