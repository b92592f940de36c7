"""Rank launch configurations for sm_90 without a GPU, by the disassembly of their main loops: `python -m bench.roofline --csv FILE`.

Candidates of the warp-specialised kernel go through one model: `bench/roofline/pipeline.py` simulates a multiprocessor,
`bench/roofline/call.py` predicts the call. Rows of published kernels follow, on which the model is calibrated: a candidate's loop with
other amounts of work, which nobody has to compile. docs/evidence/tuning.md shows the rows: `--doc` compiles nothing and writes its tables.
Triton must be installed for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.attention import shapes
from bench.compile.attention import Case
from bench.compile.binary import compile_launch, serialised, spills
from bench.harness.pages import fill, require_pandas, table
from bench.harness.rows import RESULTS, write_rows, write_text
from bench.roofline.call import FINISH, PEAK_TFLOPS, case_of, costs, efficiency, predict, reconfigured, slowed
from bench.roofline.loops import from_text, to_text
from bench.roofline.pipeline import Schedule
from scalediff_kernels.neighborhood.config import WARPGROUP_ROWS, LaunchConfig, Pipeline, shared_memory

RESULT = RESULTS / "static-roofline-sm_90.csv"
FLUX, SDXL = "FLUX 4096 px", "SDXL 4096 px, 256^2"
SHAPES: dict[str, tuple[str, Literal["image", "text"], str]] = {
    FLUX: ("flux-image-4096", "image", ""),
    "FLUX 4096 px, text keys": ("flux-4096", "image", "window"),
    "FLUX 4096 px, text queries, window": ("flux-4096", "text", "window"),
    "FLUX 4096 px, text queries, global": ("flux-4096", "text", "global"),
    SDXL: ("sdxl-64-4096", "image", ""),
    "SDXL 4096 px, 128^2": ("sdxl-32-4096", "image", ""),
}
PIPELINES = {  # candidates by head dim, what is shipped among them
    64: [
        *(Pipeline(128, 128, 3, 240, turns) for turns in (True, False)),
        *(Pipeline(256, 64, stages, 112, False) for stages in (2, 4)),
        Pipeline(192, 128, 3, 160, False),
    ],
    128: [
        *(Pipeline(128, 128, stages, 240, turns) for stages in (2, 3) for turns in (True, False)),
        Pipeline(128, 64, 3, 240, True),
        Pipeline(192, 64, 3, 160, False),
    ],
}
FIELDS = (
    "shape", "path", "queries", "keys", "num_stages", "ping_pong", "registers", "loop_spills", "spills", "shared", "consumers",
    "block_bytes", "matrix", "exponentials", "issue", "block", "tflops", "note", "loop",
)  # fmt: skip
COSTS = {
    "block_bytes": "L2 bytes", "matrix": "matrix", "exponentials": "exponentials", "issue": "issue", "block": "cycles a block",
}  # fmt: skip
SHOWN = {
    "candidates": {
        "shape": "shape", "form": "queries x keys, stages", "turns": "in turns", "registers": "registers", "spilled": "spills", "KB": "KB",
        **COSTS, "tflops": "predicted TFLOP/s", "note": "note",
    },
    "published": {
        "shape": "kernel", "form": "queries x keys, stages", **COSTS, "tflops": "TFLOP/s without the factor", "note": "published TFLOP/s",
    },
}  # fmt: skip


class Published(NamedTuple):
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


def row(name: str, case: Case, config: LaunchConfig, useful: int) -> dict[str, Any]:
    """One candidate: cycles and the time of the call, or a note why it has none."""
    launch, shipped = case.launch("sm_90", config), case.launch("sm_90").config
    facts: dict[str, Any] = {
        "shape": name, "path": config.path, "queries": prod(config.query_box), "keys": prod(config.key_box),
        "num_stages": config.num_stages, "ping_pong": config.ping_pong, "registers": config.registers,
    }  # fmt: skip
    try:
        binary = compile_launch(launch, "sm_90")
    except Exception as error:
        return facts | {"note": f"does not compile: {str(error).splitlines()[0][:60]}"}
    inside = sum(map(spills, binary.loops))
    facts |= {"loop_spills": inside, "spills": binary.spills - inside, "shared": binary.shared}
    faults = {"does not fit": binary.shared > shared_memory("sm_90"), "serialised": any(map(serialised, binary.loops))}
    if any(faults.values()):
        return facts | {"note": ", ".join(fault for fault, found in faults.items() if found)}
    schedule, ms = predict(launch, binary, case)
    note = "spills in the loop" if inside else "shipped" if config == shipped else ""
    found = {"tflops": f"{useful / ms / 1e9:.0f}", "note": note, "loop": to_text(schedule.loop)}
    return facts | costs(schedule, efficiency(case.head_dim)) | found


def schedule_of(row: Mapping[str, Any]) -> Schedule:
    """The schedule of a row of the CSV."""
    return Schedule(from_text(row["loop"]), int(row["consumers"]), int(row["num_stages"]), float(row["block_bytes"]))


def published(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of published kernels from those of the candidates; `tflops` is that of the steady state, without the factor."""
    for one in PUBLISHED:
        row = next(row for row in rows if (row["shape"], row["note"]) == (one.shape, "shipped"))
        more, share, s = one.keys / int(row["keys"]), efficiency(one.head_dim), schedule_of(row)
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


def page(text: str) -> str:
    """docs/evidence/tuning.md with its tables from the committed rows."""
    from pandas import read_csv

    rows = read_csv(RESULT, dtype=str, keep_default_na=False)
    rows["form"] = rows["queries"] + " x " + rows["keys"] + ", " + rows["num_stages"]
    rows["turns"] = rows["ping_pong"].map({"True": "yes", "False": "no"})
    rows["spilled"] = rows["loop_spills"] + " + " + rows["spills"]
    rows["KB"] = [str(-(-int(shared or 0) // 1024)) for shared in rows["shared"]]
    kinds = rows["path"].where(rows["path"] == "published", "candidates")
    text_columns = ("shape", "kernel", "in turns", "queries x keys, stages", "note", "published TFLOP/s")
    return fill(text, {
        name: table(rows[kinds == name][list(shown)].rename(columns=shown), text=text_columns) for name, shown in SHOWN.items()
    })  # fmt: skip


def printed(found: dict[str, Any]) -> dict[str, Any]:
    """A row with all columns, printed but for its loop."""
    row = dict.fromkeys(FIELDS, "") | found
    print(*(str(row[field]) for field in FIELDS[:-1]), sep="\t", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    parser.add_argument("--doc", type=Path, help="compile nothing, write the tables of this page from the committed rows")
    options = parser.parse_args()
    if options.doc:
        require_pandas()
        write_text(options.doc, page(options.doc.read_text()))
        return
    rows: list[dict[str, Any]] = []
    for name, (shape, queries, rule) in SHAPES.items():
        case, useful = case_of(shapes.SHAPES[shape], queries, rule), shapes.SHAPES[shape].flops(queries, rule)
        found = [printed(row(name, case, reconfigured(case, entry), useful)) for entry in PIPELINES[case.head_dim]]
        rows += sorted(found, key=lambda r: (r["note"] not in ("", "shipped"), -float(r["tflops"] or 0)))
    rows += [printed(row) for row in published(rows)]
    if options.csv:
        write_rows(options.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
