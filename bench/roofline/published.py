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
from scalediff_kernels.neighborhood.config import WARPGROUP_ROWS

FLUX, SDXL = "FLUX 4096 px", "SDXL 4096 px, 256^2"


class Published(NamedTuple):
    """A kernel of others."""

    name: str
    head_dim: int
    shape: str  # of the shipped candidate whose loop it is
    keys: int  # of a block there
    tflops: int  # at 16,384 keys
    at_4096: int  # TFLOP/s at 4096 keys
    changes: Mapping[str, Any]  # what differs


# It shares loads between two multiprocessors at head dims from 128 on.
PUBLISHED = (
    Published("FlashAttention 3", 128, FLUX, 176, 648, 638, {"stages": 2, "block_bytes": 45_056.0}),
    Published("FlashAttention 3", 64, SDXL, 192, 497, 476, {"stages": 2, "block_bytes": 49_152.0, "consumers": 3}),
)


def schedule(row: Mapping[str, Any]) -> Schedule:
    """That of a row of the CSV."""
    return Schedule(from_text(row["loop"]), int(row["consumers"]), int(row["num_stages"]), float(row["block_bytes"]))


def rows(candidates: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """`tflops` is that of the steady state, without the factor."""
    for one in PUBLISHED:
        row = next(row for row in candidates if (row["shape"], row["note"]) == (one.shape, "shipped"))
        more, share, s = one.keys / int(row["keys"]), efficiency(one.head_dim), schedule(row)
        loop = tuple(
            step._replace(amounts=tuple(more * x for x in step.amounts)) if step.action in ("run", "product") else step for step in s.loop
        )
        elements = WARPGROUP_ROWS * one.head_dim
        s = replace(s, loop=loop, query_bytes=2 * elements, finish=FINISH * elements / 128, **one.changes)
        found, blocks = costs(s, share), 4096 // one.keys
        short = share * PEAK_TFLOPS * found["matrix"] * blocks * 16 / slowed(s, share).call(blocks, 16)
        note = f"{one.tflops}, so the factor is {share}; at 4096 keys {short:.0f} by the model, {one.at_4096} published"
        sizes = {"shape": f"{one.name}, D = {one.head_dim}", "path": "published", "queries": WARPGROUP_ROWS * s.consumers, "keys": one.keys}
        yield sizes | found | {"tflops": f"{PEAK_TFLOPS * found['matrix'] / found['block']:.0f}", "note": note}
