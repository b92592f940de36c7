"""All methods, and the parts of this one, on the embedded model beside true high-resolution renders: `python -m bench.quality`.

The captions are those of held-out scenes, so the true picture of every prompt exists at the target size and is the reference of every
column. All rows of a table share captions and seeds, hence their base pictures. Pictures are drawn into a folder, scene by scene and all
rows in turn; what is there is not drawn again. Several processes may draw at once, each `--draw --shard i/n`; the same command without
these two then measures. Rows of the CSV that are not measured stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.harness.command import names_of, positive, shard
from bench.harness.facts import ROOT, facts, machine
from bench.harness.pages import fill, has_pandas, require_pandas
from bench.harness.rows import RESULTS, RowFile, read_rows, slug, write_text
from bench.quality.measuring import Columns, Measured, differences, measure, native_rows, word_rows
from bench.quality.metrics import seam_score
from bench.quality.pictures import OTHER_SCENES, Gallery, border, quantised, write_sheet
from bench.quality.tables import BASELINE, DRAWINGS, FIELDS, ROW_NAMES, STATISTICS, TABLES, Table, sections
from scalediff.command.allocator import keep_freed_memory
from scalediff.command.loading import UsageError, load_model
from scalediff.demo.scenes import HELD_OUT_SEED, render

PAGE = ROOT / "docs" / "evidence" / "quality.md"


def committed() -> list[dict[str, dict[str, str]]]:
    """The rows of every machine that has been measured."""
    return [read_rows(path, FIELDS) for path in sorted(RESULTS.glob("quality-*.csv"))]


def write_page(csv: Path) -> None:
    """docs/evidence/quality.md from all committed results; for a CSV elsewhere a page beside it."""
    page, results = (PAGE, committed()) if csv.parent == RESULTS else (csv.with_suffix(".md"), [read_rows(csv, FIELDS)])
    write_text(page, fill(PAGE.read_text(), {"tables": sections(*results)}))


def measure_table(gallery: Gallery, table: Table, add: Callable[[str, Columns], None], sheet: Path | None) -> None:
    """Measure the rows of a table, the baseline first, and their differences from it; draw the contact sheet."""
    seed = HELD_OUT_SEED + table.first
    true = quantised(render(seed, table.n, table.size))
    drawn = {"true renders of the captions": true}
    baseline: Measured | None = None
    for row in sorted(table.rows, key=lambda row: row not in BASELINE):
        pictures = gallery.read(row, table.scenes)
        measured = measure(gallery.pipe, pictures, true, first_scene=seed if DRAWINGS[row].method else OTHER_SCENES)
        add(row, measured.columns | (differences(measured, baseline) if baseline and DRAWINGS[row].method else {}))
        baseline = measured if row in BASELINE else baseline
        drawn[row] = pictures.images
    if sheet is not None:
        write_sheet(sheet, {name: drawn[name] for name in ("true renders of the captions", *table.rows)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tables", type=names_of(TABLES), default=["methods"], help=f"of {','.join(TABLES)} (default: methods)")
    what.add_argument("--native", type=positive(int), metavar="N", help="only count the discs of N pictures of native size")
    what.add_argument("--words", type=positive(int), metavar="N", help="only check the words of N pictures per hour and place")
    what.add_argument("--doc", action="store_true", help="measure nothing, write the page from the rows that are there")
    parser.add_argument("--model", type=Path, help="pipeline folder of another training run (default: the embedded model)")
    parser.add_argument("--rows", type=names_of(DRAWINGS), help="draw and measure only these rows of the tables")
    parser.add_argument("--n", type=positive(int), help="pictures per row (default: the table's own number)")
    parser.add_argument("--size", type=int, help="pixels per side (default: the table's own)")
    parser.add_argument("--pictures", type=Path, default=Path("runs/quality"), help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="products of the denoiser in bfloat16 (mixed precision)")
    parser.add_argument("--draw", action="store_true", help="draw without measuring")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="with --draw: the share of this process")
    results = RESULTS / f"quality-{slug(machine())}.csv"
    parser.add_argument("--csv", type=Path, default=results, help="results (default: bench/results/quality-MACHINE.csv)")
    parser.add_argument("--sheet", type=Path, help="contact sheet of the table, a .png or .jpg")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.csv = options.csv.resolve()
    try:
        if options.sheet and options.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise ValueError(f"--sheet must be a .png or .jpg, got {options.sheet}")
        if options.shard != (0, 1) and not options.draw:
            raise ValueError("--shard is for --draw: all pictures of a row are measured together")
        if options.model and options.csv.parent == RESULTS:
            raise ValueError("the committed results are of the embedded model: name another --csv for --model")
        rows = dict.fromkeys(row for name in options.tables for row in TABLES[name].rows)
        if lacking := [row for row in options.rows or () if row not in rows]:
            raise ValueError(f"--rows of --tables {','.join(options.tables)} must be of {', '.join(rows)}, got {', '.join(lacking)}")
        if options.doc:
            require_pandas()
            write_page(options.csv)
        else:
            run(options)
    except (ValueError, UsageError) as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    """Draw and measure what the options ask for; every row is written and printed as it comes."""
    file = RowFile(options.csv, FIELDS, {"model": str(options.model or "embedded"), **facts()}, order=ROW_NAMES)
    if not has_pandas():
        print("pandas is not installed: rows are written, the page is not", flush=True)
    keep_freed_memory()
    pipe = load_model(str(options.model or "demo"), device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)

    def add(row: str, columns: Columns, command: str) -> None:
        file.add({"row": row, **{name: f"{value:.6g}" for name, value in columns.items()}, "command": f"python -m bench.quality {command}"})
        if has_pandas():
            write_page(options.csv)
        shown = (f"{heading} {form.format(columns[name])}" for name, (heading, form) in STATISTICS.items() if name in columns)
        print(", ".join([row, *shown]), flush=True)

    if options.words or options.native:
        for row, columns in (word_rows(pipe, n=options.words) if options.words else native_rows(pipe, n=options.native)).items():
            add(row, columns, f"--words {options.words}" if options.words else f"--native {options.native}")
        return
    for name in options.tables:
        table = TABLES[name]
        rows = tuple(row for row in table.rows if not options.rows or row in options.rows)
        table = table._replace(rows=rows, n=options.n or table.n, size=options.size or table.size)
        command = f"--tables {name} --n {table.n}" + f" --size {table.size}" * bool(options.size) + " --bf16" * options.bf16
        seam_score(torch.zeros(1, 3, table.size, table.size), period=border(pipe))  # a size that is too small, before anything is drawn
        gallery = Gallery(options.pictures, pipe, table.size, bf16=options.bf16)
        gallery.draw_missing(table, options.shard)
        if not options.draw:
            measure_table(gallery, table, lambda row, columns: add(f"{name}/{row}", columns, command), options.sheet)  # noqa: B023


if __name__ == "__main__":
    main()
