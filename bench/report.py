"""docs/benchmarks.md and the README's table of goals, from the CSVs of bench/results: `python -m bench.report --write`.

Nothing in them is typed: a number is read or divided out of rows of one CSV, one device and one commit, and stands with its command.
Plots are drawn where matplotlib is installed; without it the page is whole, and tells how to draw them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import harness
from bench.report_plots import PREFIX, Plot, draw, drawable, plots, state
from bench.report_rows import Results, read
from bench.report_tables import attention, checks, goals, pictures, work

RESULTS = harness.ROOT / "bench" / "results"
DOCS = harness.ROOT / "docs"
README = harness.ROOT / "README.md"
BEGIN, END = "<!-- python -m bench.report --write: from here -->", "<!-- to here -->"
PLOTS_HOW = '`pip install -e ".[bench]" && python -m bench.report --write`'

LEGEND = """Made from the CSVs of `bench/results` by `python -m bench.report --write`, held by `--check`. Ratios are taken within one
CSV, one device, one commit and one set of versions. "Useful" FLOPs are 2 for a multiply-add and count neither padding nor tiles; a
"matrix product" is a large one of random numbers, measured in the same process. A row is timed after it passed its gate at that very
shape, if it has one: direct inference and full attention are torch's own. What no machine has measured yet is written so."""

GPU = """What needs a GPU, the most valuable first, for eight minutes: `python -m bench.gpu --out FOLDER`; the same command goes on where it
stopped, with tables of every shape after whole pictures. Then copy `FOLDER/*.csv` to `bench/results`, and run
`python -m bench.lowpass --doc docs/filters-measured.md` and `python -m bench.report --write`. One benchmark alone:
`python -m bench.attention`, `bench.lowpass`, `bench.cascade`, on a CPU too."""

PICTURES = """Runs by `python -m bench.cascade`: SDXL and FLUX at their true size and small models, with random weights, and the embedded
model. "Composed" is the time of a watched step times the steps of a stage, and what a stage does once; "measured" a run from start to
end, nothing watched. "x ours" is of composed times with blocks run the same way. Models named small have pictures of a few tokens: they
show that every method runs, and their times are mostly Python's."""

ATTENTION = """One call by `python -m bench.attention`: ms are p50 (p20 - p80). "window" is neighborhood patch attention, "full" attention
to the whole grid, "views" MultiDiffusion's views; "x ours" is the time over that of the kernel, on a CPU of windows by SDPA. There
torch's attention works in smaller blocks, and at a lower rate, where a call has few queries, as a window has."""

ELSEWHERE = """- Low-pass filters and guided steps, by `python -m bench.lowpass`: [filters-measured.md](filters-measured.md).
- Picture quality on the embedded model, by `python -m bench.quality`: [quality.md](quality.md).
- What the compiler makes of the kernels, by `python -m bench.compile`: [compiled.md](compiled.md)."""


def markdown(results: Results, docs: Path) -> str:
    """docs/benchmarks.md; of the plots those that lie in `docs`."""
    sections: list[tuple[str, Sequence[str]]] = [
        ("The goals", goals(results)),
        ("On a GPU", [GPU, "", *checks(results)]),
        ("Whole pictures", [PICTURES, *pictures(results)]),
        ("Attention", [ATTENTION, *attention(results)]),
        ("Plots", _plots(plots(results), docs)),
        ("Work", ["Counted by `python -m bench.flops --write`; all sizes and parts: [flops.md](flops.md).", "", *work(results)]),
        ("Elsewhere", [ELSEWHERE]),
    ]
    lines = ["# Benchmarks", "", LEGEND]
    for title, section in sections:
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _plots(found: Sequence[Plot], docs: Path) -> list[str]:
    if not found:
        return [f"There is nothing to draw yet. Where there is: {PLOTS_HOW}."]
    here = [plot for plot in found if (docs / plot.file).exists()]
    lines = [line for plot in here for line in (f"![{plot.title}: {plot.kind}]({plot.file})", "")]
    missing = len(found) - len(here)
    return [*lines, f"{missing} plots are not drawn; {PLOTS_HOW} draws them." if missing else f"Drawn by {PLOTS_HOW}."]


def readme(text: str, results: Results) -> str:
    """The README with its table as it should be.

    Raises:
        ValueError: the lines that it stands between are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r}, got {bool(begin)} and {bool(end)}")
    return "\n".join([f"{before}{BEGIN}", "", *goals(results, readme=True), "", f"{END}{after}"])


def wrong(results: Results) -> list[str]:
    """What is not as the CSVs have it, in sentences."""
    found = plots(results)
    sentences = [
        harness.difference(DOCS / "benchmarks.md", markdown(results, DOCS)),
        harness.difference(README, readme(README.read_text(), results)),
        *(f"docs/{plot.file} is a plot of other numbers" for plot in found if state(plot, DOCS) == "stale"),
        *(f"docs/{path.name} is a plot of nothing in bench/results" for path in _unknown(found)),
    ]
    return [sentence for sentence in sentences if sentence]


def _unknown(found: Sequence[Plot]) -> list[Path]:
    return sorted(path for path in DOCS.glob(f"{PREFIX}*.svg") if path.name not in {plot.file for plot in found})


def write(results: Results) -> list[str]:
    """The page, the README's table, and the plots where they can be drawn; what was not, in sentences."""
    table = readme(README.read_text(), results)
    found = plots(results)
    for path in _unknown(found):
        path.unlink()
    for plot in found:
        if drawable():
            draw(plot, DOCS)
        elif state(plot, DOCS) == "stale":
            (DOCS / plot.file).unlink()
    harness.write_text(DOCS / "benchmarks.md", markdown(results, DOCS))
    harness.write_text(README, table)
    missing = [plot.file for plot in found if state(plot, DOCS) != "drawn"]
    return [f"not drawn, matplotlib is not installed: {', '.join(missing)}; {PLOTS_HOW.strip('`')}"] if missing else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="write docs/benchmarks.md, the README's table and the plots")
    how.add_argument("--check", action="store_true", help="fail where these are not what the CSVs say")
    options = parser.parse_args(arguments)
    try:
        results = read(RESULTS)
        if options.check:
            sentences = wrong(results)
            raise SystemExit("\n".join(sentences) + "\nrun python -m bench.report --write" if sentences else 0)
        print("\n".join(write(results) if options.write else goals(results)))
    except ValueError as error:
        raise SystemExit(f"python -m bench.report: {error}") from error


if __name__ == "__main__":
    main()
