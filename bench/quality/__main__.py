"""What each part of the method does for the picture, on the embedded model: `python -m bench.quality`.

The captions are those of held-out scenes, so the true picture of every prompt exists at the target size and is the reference of every
column. All rows share prompts and seeds, hence their base pictures. Rows take turns, batch by batch, so that whatever else the machine
does affects all of them alike: all are complete in the last round, and a run that is interrupted before adds no row. A row goes to the CSV
and to the page as soon as it is measured; rows that are there and are not measured stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import scalediff
from bench.harness.command import positive
from bench.harness.facts import ROOT, facts, machine
from bench.harness.pages import fill, has_pandas, require_pandas
from bench.harness.rows import RESULTS, RowFile, read_rows, slug, write_text
from bench.quality.metrics import seam_score
from bench.quality.pictures import Task, border, in_turn, measure, native_rows, quantised, word_rows, write_sheet
from bench.quality.tables import COLUMNS, FIELDS, SWEEP, SWITCHES, TABLES, sections
from scalediff.cascade.pipeline import stage_sizes
from scalediff.command.allocator import keep_freed_memory
from scalediff.demo.scenes import HELD_OUT_SEED, render

PAGE = ROOT / "docs" / "evidence" / "quality.md"
DEFAULT = TABLES["The parts of the method"]
KNOWN = (*DEFAULT, *SWITCHES, *SWEEP)


def committed() -> list[dict[str, dict[str, str]]]:
    """The rows of every machine that has been measured."""
    return [read_rows(path, FIELDS) for path in sorted(RESULTS.glob("quality-*.csv"))]


def write_page(csv: Path) -> None:
    """docs/evidence/quality.md from all committed results; for a CSV elsewhere a page beside it."""
    page, results = (PAGE, committed()) if csv.parent == RESULTS else (csv.with_suffix(".md"), [read_rows(csv, FIELDS)])
    write_text(page, fill(PAGE.read_text(), {"tables": sections(*results)}))


def add_row(file: RowFile, options: argparse.Namespace, row: str, columns: Mapping[str, float]) -> None:
    """Add or replace a row in the CSV, and write the page."""
    what = f"--words {options.words}" if options.words else f"--native {options.native}" if options.native else ""
    what = what or f"--n {options.n} --size {options.size}" + " --sweep" * (row in SWEEP) + " --switches" * (row in SWITCHES)
    cells = {name: f"{value:.6g}" for name, value in columns.items()}
    file.add({"row": row, **cells, "command": f"python -m bench.quality {what} --seed {options.seed}"})
    if has_pandas():
        write_page(options.csv)
    shown = (f"{heading} {form.format(columns[name])}" for name, (heading, form) in COLUMNS.items() if name in columns)
    print(", ".join([row, *shown]), flush=True)


def _rows(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in KNOWN]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(KNOWN)}, got {', '.join(unknown)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=positive(int), default=16, help="pictures per row (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rows", type=_rows, default=list(DEFAULT), help=f"rows to measure, of {','.join(KNOWN)}")
    what.add_argument(
        "--sweep", dest="rows", action="store_const", const=list(SWEEP), help="measure restart x cutoff instead of the ablation"
    )
    what.add_argument(
        "--switches", dest="rows", action="store_const", const=list(SWITCHES), help="measure the rows of the switches instead"
    )
    what.add_argument("--native", type=positive(int), metavar="N", help="only count the discs of N pictures of native size")
    what.add_argument("--words", type=positive(int), metavar="N", help="only check the words of N pictures per hour and place")
    what.add_argument("--doc", action="store_true", help="measure nothing, write the page from the rows that are there")
    results = RESULTS / f"quality-{slug(machine())}.csv"
    parser.add_argument("--csv", type=Path, default=results, help="results (default: bench/results/quality-MACHINE.csv)")
    parser.add_argument("--sheet", type=Path, help="contact sheet, a .png or .jpg")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.csv = options.csv.resolve()
    if options.sheet and options.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--sheet must be a .png or .jpg, got {options.sheet}")
    try:
        order = [name for names in TABLES.values() for name in names]
        file = RowFile(options.csv, FIELDS, {"model": "embedded", **facts()}, order=order)
    except ValueError as error:
        parser.error(f"--csv: {error}")
    if options.doc:
        require_pandas()
        write_page(options.csv)
        return
    if not has_pandas():
        print("pandas is not installed: rows are written, the page is not", flush=True)
    keep_freed_memory()
    pipe = scalediff.load_demo()
    pipe.set_progress_bar_config(disable=True)
    if options.words or options.native:
        counted, n = (word_rows, options.words) if options.words else (native_rows, options.native)
        for row, columns in counted(pipe, n=n, seed=options.seed).items():
            add_row(file, options, row, columns)
        return
    try:
        stage_sizes(pipe, options.size, options.size)
        seam_score(torch.zeros(1, 3, options.size, options.size), period=border(pipe))
    except ValueError as error:
        parser.error(f"--size {options.size}: {error}")
    task = Task(pipe, options.n, options.size, options.seed)
    reference = quantised(render(HELD_OUT_SEED, task.n, task.size))
    pictures = {"true renders of the captions": reference}
    for row, drawn in in_turn(task, options.rows):
        columns, pictures[row] = measure(task, row, drawn, reference)
        add_row(file, options, row, columns)
        if options.sheet:
            write_sheet(options.sheet, pictures)


if __name__ == "__main__":
    main()
