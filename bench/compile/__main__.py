"""Compile the kernels for GPUs that are not there, and read the binaries: `python -m bench.compile --write`.

What is compiled and what is demanded: `bench/compile/attention.py`, `bench/compile/lowpass.py`. Every launch is built by the library's
own code on meta tensors.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from bench.compile import attention as compile_attention
from bench.compile import lowpass as compile_lowpass
from bench.compile.binary import TARGETS, compile_launch
from bench.harness.rows import ROOT, write_rows, write_text

KERNELS: dict[str, Any] = {"attention": compile_attention, "lowpass": compile_lowpass}
TITLES = {"attention": "Neighborhood patch attention", "lowpass": "Low-pass filters"}
RESULTS = ROOT / "bench" / "results"

LEGEND = """Faults are what the gates find. Made on a CPU by `python -m bench.compile --write`, once by each Triton
(`pip install --target DIR --no-deps "triton==3.6.*"` and `PYTHONPATH=DIR` for the oldest), and then
`python -m bench.compile --doc docs/evidence/compiled.md`."""


def row(case: Any, target: str) -> dict[str, Any]:
    launch = case.launch(target)
    facts: dict[str, Any] = {"triton": triton.__version__, "target": target} | case.facts(launch)
    try:
        binary = compile_launch(launch, target)
    except Exception as error:  # a compiler that gives up is a result: it belongs into the table
        return facts | {"registers": "", "spills": "", "shared": "", "faults": f"does not compile: {str(error).splitlines()[0][:80]}"}
    faults = case.faults(target, launch, binary)
    if launch.then is not None and (after := compile_launch(launch.then, target)).spills:
        faults.append(f"{after.spills} spills in the kernel after it")
    return facts | {
        "registers": binary.registers,
        "spills": binary.spills,
        "shared": binary.shared,
        "faults": "; ".join(faults),
    }


def markdown(tables: Mapping[tuple[str, str], Sequence[Mapping[str, str]]]) -> str:
    """docs/evidence/compiled.md from the rows of every kernel and Triton version."""
    lines = ["# What the compiler makes of the kernels", "", LEGEND]
    for kernels in KERNELS:
        lines += ["", f"## {TITLES[kernels]}", "", KERNELS[kernels].LEGEND]
        for (name, version), rows in tables.items():
            if name == kernels:
                broken = sum(bool(r["faults"]) for r in rows)
                targets = list(dict.fromkeys(r["target"] for r in rows))
                lines += ["", f"Triton {version}: {len(rows)} kernels, {broken} with faults", "", *KERNELS[kernels].table(rows, targets)]
    return "\n".join(lines) + "\n"


def committed() -> dict[tuple[str, str], list[dict[str, str]]]:
    """Rows by kernels and Triton version, oldest first."""
    tables = {}
    for path in sorted(RESULTS.glob("compile-*.csv")):
        with path.open(newline="") as file:
            _, kernels, version = path.stem.split("-")
            tables[kernels, version] = list(csv.DictReader(file))
    return tables


def _rows_of(kernels: str, target: str) -> list[dict[str, Any]]:
    return [row(case, target) for case in KERNELS[kernels].cases()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the rows to bench/results/compile-KERNELS-VERSION.csv")
    parser.add_argument("--doc", type=Path, help="compile nothing, write this page from the committed rows")
    options = parser.parse_args()
    if options.doc:
        write_text(options.doc, markdown(committed()))
        return
    if options.write and options.targets != list(TARGETS):
        parser.error(f"--write takes all targets, got --targets {' '.join(options.targets)}")
    broken = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for kernels in options.kernels:
            rows = []
            for target, result in zip(options.targets, pool.map(_rows_of, [kernels] * len(options.targets), options.targets), strict=True):
                rows += result
                faulty = [r for r in result if r["faults"]]
                broken += len(faulty)
                print(f"triton {triton.__version__} {kernels} {target}: {len(result)} kernels, {len(faulty)} with faults", flush=True)
                for r in faulty:
                    print("  ", *(f"{key}={value}" for key, value in r.items() if key not in ("triton", "target")), flush=True)
            if options.write:
                version = ".".join(triton.__version__.split(".")[:2])
                write_rows(RESULTS / f"compile-{kernels}-{version}.csv", list(rows[0]), rows)
    raise SystemExit(broken > 0)


if __name__ == "__main__":
    main()
