"""Made up for tests: small shapes, rows of benchmarks, and a repository of nothing but results, docs and a README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from bench.attention.shapes import Shape
from bench.harness.rows import write_rows
from bench.report.rows import Results, read

EVEN = Shape((16, 24), (8, 8), (4, 4), 2, 16, batch=2, dtype=torch.float32)
ODD = Shape((13, 18), (8, 6), (4, 3), 4, 16, text=9, groups=2, dtype=torch.float32)

H200 = {
    "machine": "NVIDIA H200",
    "threads": "8",
    "commit": "abc1234",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
}
CPU = H200 | {"machine": "AMD EPYC", "threads": "2", "cuda": "", "triton": "absent"}
Table = Mapping[str, Mapping[str, str]]


def run(
    model: str, method: str, composed: float, measured: float | None = None, *, how: str = "eager", size: int = 4096, **more: str
) -> Table:
    """One run at 800 TFLOP/s of a matrix product and 8000 useful TFLOPs: a floor of 10 s."""
    name = f"{model}/{size}/{method}/{how}/run"
    return {name: {
        "row": name, "status": "ok", "part": "run", "model": model, "size": str(size), "method": method, "compile": how,
        "composed_s": f"{composed}", "measured_s": "" if measured is None else f"{measured}", "useful_tflop": "8000",
        "matrix_tflops": "800", "matrix_percent": "50", "note": "", "command": f"python -m bench.cascade --model {model}", **H200, **more,
    }}  # fmt: skip


def part(model: str, method: str, name: str, seconds: float, *, size: int = 4096, stage: int = 1) -> Table:
    """Of one stage, its seconds in a run."""
    row = f"{model}/{size}/{method}/eager/{stage}-{size}/{name}"
    return {row: {"row": row, "status": "ok", "part": name, "model": model, "size": str(size), "method": method, "compile": "eager",
                  "stage": f"{stage}-{size}", "in_run_s": f"{seconds}", "command": "python -m bench.cascade", **H200}}  # fmt: skip


def call(task: str, provider: str, ms: float, *, status: str = "ok", note: str = "", facts: Mapping[str, str] = H200) -> Table:
    name = f"{task}/{provider}"
    return {name: {
        "row": name, "status": status, "shape": task.split("/")[0], "dtype": task.split("/")[1], "provider": provider, "function": "window",
        "p20_ms": f"{ms}", "p50_ms": f"{ms}", "p80_ms": f"{ms}", "tflops": f"{2000 / (ms or 1)}", "matrix_percent": "70",
        "useful_gflop": "2000", "megabytes": "10000", "copy_gbs": "4000", "matrix_tflops": "800", "window_tflops": "150",
        "error": "1e-3", "note": note, "command": "python -m bench.attention --quick", **facts,
    }}  # fmt: skip


def written(place: Path, name: str, *tables: Table) -> Results:
    rows = [row for table in tables for row in table.values()]
    fields = list(dict.fromkeys(field for row in rows for field in row))
    write_rows(place / "results" / name, fields, [dict.fromkeys(fields, "") | row for row in rows])
    return read(place / "results")
