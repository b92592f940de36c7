"""Compile the kernels for GPUs that this machine does not have, and read the binaries: `python -m bench.compile --write`.

What is compiled and which faults are looked for: `bench/compile/attention.py`, `bench/compile/lowpass.py`. Every launch is built by the
library's own code on meta tensors. Worker processes compile, one target each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton

from bench.compile.binary import TARGETS
from bench.compile.rows import KERNELS, rows_of
from bench.harness.pages import fill, require_pandas, table
from bench.harness.rows import RESULTS, write_rows, write_text

if TYPE_CHECKING:
    from pandas import DataFrame


def committed(kernels: str) -> dict[str, DataFrame]:
    """Rows by Triton version, oldest first."""
    from pandas import read_csv

    paths = sorted(RESULTS.glob(f"compile-{kernels}-*.csv"))
    return {path.stem.split("-")[2]: read_csv(path, dtype=str, keep_default_na=False) for path in paths}


def tables(kernels: str) -> list[str]:
    """Registers / KB of shared memory by target, for every Triton version. `w` and `p` mark the warp-specialised and the pointer path."""
    lines: list[str] = []
    keys, shown = KERNELS[kernels].KEYS, KERNELS[kernels].SHOWN
    for version, every in committed(kernels).items():
        rows = every.query(shown) if shown else every
        cell = rows["registers"] + "/" + [str(-(-int(shared or 0) // 1024)) for shared in rows["shared"]]
        pointers = rows.get("path", rows["target"]).map({"pointer": "p ", "warp-specialised": "w "}).fillna("")
        cells = (pointers + cell).where(rows["registers"] != "", "does not compile")
        rows = rows.assign(cell=cells).drop_duplicates([*keys, "target"])  # the path that the table chooses is first
        by_target = rows.pivot(index=list(keys), columns="target", values="cell")[list(rows["target"].unique())]
        ordered = rows[list(keys)].drop_duplicates().merge(by_target, on=list(keys)).rename(columns=keys)
        lines += [f"Triton {version}: {len(every)} kernels, {(every['faults'] != '').sum()} with faults", ""]
        lines += [*table(ordered, text=("queries", "side", "kind", "dtype", "layout")), ""]
    return lines[:-1]


def page(text: str) -> str:
    """docs/evidence/compiled.md with its tables from the committed rows."""
    return fill(text, {kernels: tables(kernels) for kernels in KERNELS})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    targets = f"compile for these alone, of {', '.join(TARGETS)} (default: all)"
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME", help=targets)
    parser.add_argument("--write", action="store_true", help="write the rows to bench/results/compile-KERNELS-VERSION.csv")
    parser.add_argument("--doc", type=Path, help="compile nothing, write the tables of this page from the committed rows")
    options = parser.parse_args(arguments)
    if options.write and set(options.targets) != set(TARGETS):
        parser.error(f"--write needs all targets, for a file has the rows of all, got --targets {' '.join(options.targets)}")
    if options.doc:
        require_pandas()
        write_text(options.doc, page(options.doc.read_text()))
        return
    broken, version = 0, ".".join(triton.__version__.split(".")[:2])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for kernels in options.kernels:
            rows: list[dict[str, Any]] = []
            for target, found in zip(options.targets, pool.map(partial(rows_of, kernels), options.targets), strict=True):
                faulty = [row for row in found if row["faults"]]
                print(f"triton {triton.__version__} {kernels} {target}: {len(found)} kernels, {len(faulty)} with faults", flush=True)
                for row in faulty:
                    print("  ", *(f"{key}={value}" for key, value in row.items() if key not in ("triton", "target")), flush=True)
                rows += found
                broken += len(faulty)
            if options.write:
                write_rows(RESULTS / f"compile-{kernels}-{version}.csv", list(rows[0]), rows)
    raise SystemExit(broken > 0)


if __name__ == "__main__":
    main()
