"""Rank launch configurations for sm_90 without a GPU, by the disassembly of their main loops: `python -m bench.roofline --csv FILE`.

Candidates of the warp-specialised kernel go through one model: `bench/roofline/pipeline.py` simulates a multiprocessor,
`bench/roofline/call.py` predicts the call. What the model says about published kernels follows
(`bench/roofline/published.py`). docs/evidence/tuning.md shows the rows: `--doc` compiles nothing and writes its tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.attention import shapes
from bench.harness.facts import ROOT
from bench.harness.pages import fill, require_pandas, table
from bench.harness.rows import write_rows, write_text
from bench.roofline import published
from bench.roofline.call import case_of, costs, efficiency, predict
from bench.roofline.loops import to_text
from scalediff_kernels.neighborhood.config import LaunchConfig, Pipeline, key_box, shared_memory

if TYPE_CHECKING:
    from bench.compile.attention import Case
    from scalediff_kernels._launch import Launch

RESULT = ROOT / "bench" / "results" / "static-roofline-sm_90.csv"
SHAPES: dict[str, tuple[str, Literal["image", "text"], str]] = {
    published.FLUX: ("flux-image-4096", "image", ""),
    "FLUX 4096 px, text keys": ("flux-4096", "image", "window"),
    "FLUX 4096 px, text queries, window": ("flux-4096", "text", "window"),
    "FLUX 4096 px, text queries, global": ("flux-4096", "text", "global"),
    published.SDXL: ("sdxl-64-4096", "image", ""),
    "SDXL 4096 px, 128^2": ("sdxl-32-4096", "image", ""),
}
PIPELINES = {
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


def candidates(case: Case) -> Iterator[LaunchConfig]:
    """What could be launched, the shipped configuration among them."""
    shipped = case.launch("sm_90").config
    for p in PIPELINES[case.head_dim]:
        box = (1, p.queries) if case.queries == "text" else (p.queries // 16, 16)
        parts = shipped.part_blocks * prod(shipped.key_box) // p.keys
        changed = shipped._replace(query_box=box, key_box=key_box(case.window, p.keys), text_block=p.keys, part_blocks=parts)
        yield changed._replace(num_stages=p.stages, registers=p.registers, ping_pong=p.ping_pong)


def row(name: str, case: Case, config: LaunchConfig, useful: int) -> dict[str, Any]:
    """One candidate: cycles and the time of the call, or a note why it has none."""
    from bench.compile.binary import compile_launch, serialised, spills

    facts: dict[str, Any] = {
        "shape": name, "path": config.path, "queries": prod(config.query_box), "keys": prod(config.key_box),
        "num_stages": config.num_stages, "ping_pong": config.ping_pong,
    }  # fmt: skip
    launch: Launch = case.launch("sm_90", config)
    try:
        binary = compile_launch(launch, "sm_90")
    except Exception as error:
        return facts | {"note": f"does not compile: {str(error).splitlines()[0][:60]}"}
    inside, wanted = sum(map(spills, binary.loops)), case.launch("sm_90").config
    facts |= {"registers": config.registers, "loop_spills": inside, "spills": binary.spills - inside}
    facts |= {"shared": binary.shared, "note": "shipped" if config == wanted else ""}
    faults = {"does not fit": binary.shared > shared_memory("sm_90"), "serialised": any(map(serialised, binary.loops))}
    if any(faults.values()):
        return facts | {"note": ", ".join(fault for fault, found in faults.items() if found)}
    if inside:
        facts["note"] = "spills in the loop"
    schedule, ms = predict(launch, binary, case)
    return facts | costs(schedule, efficiency(case.head_dim)) | {
        "tflops": f"{useful / ms / 1e9:.0f}", "loop": to_text(schedule.loop),
    }  # fmt: skip


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
        found = []
        for config in candidates(case):
            found.append(dict.fromkeys(FIELDS, "") | row(name, case, config, useful))
            print(*(str(found[-1][field]) for field in FIELDS[:-1]), sep="\t", flush=True)
        rows += sorted(found, key=lambda r: (r["note"] not in ("", "shipped"), -float(r["tflops"] or 0)))
    for other in published.rows(rows):
        rows.append(dict.fromkeys(FIELDS, "") | other)
        print(*(str(rows[-1][field]) for field in FIELDS[:-1]), sep="\t", flush=True)
    if options.csv:
        write_rows(options.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
