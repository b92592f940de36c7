"""docs/evidence/benchmarks.md and the README's tables, from the CSVs of bench/results: `python -m bench.report --write`.

Nothing in them is typed: a number is read or divided out of rows of one CSV, one device and one commit, and stands with its command.
Plots are drawn where matplotlib is installed; without it the page is whole, and tells how to draw them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.harness import rows as harness
from bench.quality.rows import summary
from bench.report.drawing import draw, drawable
from bench.report.missing import missing
from bench.report.pictures import pictures
from bench.report.plots import PREFIX, Plot, plots, state
from bench.report.rows import NOT_YET, Results, read
from bench.report.tables import attention, checks, goals, work

RESULTS = harness.ROOT / "bench" / "results"
DOCS = harness.ROOT / "docs" / "evidence"
README = harness.ROOT / "README.md"
BEGIN, END = "<!-- python -m bench.report --write: from here -->", "<!-- to here -->"
QUALITY_BEGIN, QUALITY_END = "<!-- python -m bench.report --write: quality -->", "<!-- to here: quality -->"
PLOTS_HOW = '`pip install -e ".[bench]" && python -m bench.report --write`'

LEGEND = """Made from the CSVs of `bench/results` by `python -m bench.report --write`, held by `--check`. Ratios are taken within one
CSV, one device, one commit, one set of versions and one way of measuring. "Useful" FLOPs are 2 for a multiply-add and count neither
padding nor tiles; a "matrix product" is a large one of random numbers, measured in the same process. A row is timed after it passed its
gate: of attention at that very shape; of whole pictures the windows of every layer at that very size, and a stage of twice the native
one (`bench/cascade/gate.py` tells each method's). Direct inference and full attention of whole pictures are torch's own and have no gate.
"x ours" is a row's time divided by ours: the Triton kernel's on a GPU, windows by SDPA on a CPU. What no machine has measured yet is
listed at the end."""

GPU = """What needs a GPU, the most valuable first, for eight minutes ([gpu.md](../internals/gpu.md)): `python3 -m bench.gpu --out FOLDER`;
the same command goes on where it stopped, and `--list` tells its parts. Then copy `FOLDER/*.csv` to `bench/results`, and run
`python -m bench.lowpass --doc docs/evidence/filters-measured.md` and `python -m bench.report --write`. One benchmark alone:
`python -m bench.attention`, `bench.lowpass`, `bench.cascade`, on a CPU too."""

PICTURES = """Runs by `python -m bench.cascade`: SDXL and FLUX at their true size and small models, with random weights, and `demo`, the
embedded model. "Composed" is the time of a watched step ("timed steps" of every stage were) times the steps of a stage, and what a stage
does once; "measured" a run from start to end, nothing watched, where it takes no more than the command's --limit; of several such runs
p50 (p20 - p80). "View batch" is how many views one pass has. "x ours" is of measured times where both rows have one, and says so where
it is of composed ones; blocks are run the same way.

Useful FLOPs count the autoencoder as it runs, in tiles where it works in tiles; [flops.md](flops.md) counts it in one piece with full
attention, so the two differ by a few per cent. "Peak MB" is what torch has allocated on a GPU, and on a CPU the resident set of the
process, what was there before the run included. There the process keeps memory that it has freed (docs/adr/0009), for every method
alike."""

ATTENTION = """One call by `python -m bench.attention`: ms are p50 (p20 - p80). "window" is neighborhood patch attention, "full" attention
to the whole grid, "views" MultiDiffusion's views; each is counted and gated by its own definition. "Executed / useful" is how many FLOPs
are run, padding and tiles included, for one that is useful; "made ready" what is done once for a shape, outside the clock, as a mask is.
On a CPU what one run times of a shape is timed side by side. There torch's attention takes 32, 64 or 256 queries at a time where a call
has fewer than 192, fewer than 768, or more, and is the slower the fewer: a window has a quarter of the queries of a view of the same size,
as the rows of `multidiffusion` show. What that leaves is SDPA on one window alone, again and again, most of it in cache (`window_tflops` in
the CSV); what is missing from there to ours is reading windows that are in no cache, gathering them and putting results back."""

MISSING = """By the names that the command lines take: of `python -m bench.attention` every shape in its model's dtype by every
implementation, of `python -m bench.cascade` every model and size by every method, on a GPU with blocks run eagerly and compiled. What
does not exist is not missing: implementations that refuse a rule for text, DemoFusion for FLUX, rules for text in models that have it in
calls of its own, and the authors' jitter compiled."""

ELSEWHERE = """- Low-pass filters and guided steps, by `python -m bench.lowpass`: [filters-measured.md](filters-measured.md).
- Microseconds that the patch adds to a call, by `python -m bench.hook`: `bench/results/hook-*.csv`.
- Picture quality on the embedded model, by `python -m bench.quality`: [quality.md](quality.md).
- What the compiler makes of the kernels, by `python -m bench.compile`: [compiled.md](compiled.md)."""


def markdown(results: Results, docs: Path) -> str:
    """docs/evidence/benchmarks.md; of the plots those that lie in `docs`."""
    sections: list[tuple[str, Sequence[str]]] = [
        ("The goals", goals(results)),
        ("On a GPU", [GPU, "", *checks(results)]),
        ("Whole pictures", [PICTURES, *pictures(results)]),
        ("Attention", [ATTENTION, *attention(results)]),
        ("Plots", _plots(plots(results), docs)),
        ("Work", ["Counted by `python -m bench.flops --write`; all sizes and parts: [flops.md](flops.md).", "", *work(results)]),
        ("Not measured yet", [MISSING, "", *missing(results)]),
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
    lines = [line for plot in here for line in (f"![{plot.title}]({plot.file})".replace("\n", ": "), "")]
    left = len(found) - len(here)
    return [*lines, f"{left} plots are not drawn; {PLOTS_HOW} draws them." if left else f"Drawn by {PLOTS_HOW}."]


def readme(text: str, results: Results) -> str:
    """The README with its tables as they should be.

    Raises:
        ValueError: the lines that a table stands between are missing.
    """
    text = _between(text, BEGIN, END, goals(results, readme=True))
    return _between(text, QUALITY_BEGIN, QUALITY_END, quality(results))


def _between(text: str, begin: str, end: str, lines: Sequence[str]) -> str:
    """Lines in place of those that stand between two others."""
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"README.md must have the lines {begin!r} and {end!r}, got {bool(found)} and {bool(ended)}")
    return "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"])


def quality(results: Results) -> list[str]:
    """The main columns of `bench.quality`, a table for every CSV."""
    lines: list[str] = []
    for file, records in results.quality.items():
        lines += ["", f"{file}:", "", summary(records)] if len(results.quality) > 1 else [summary(records)]
    return lines or [f"{NOT_YET}."]


def wrong(results: Results) -> list[str]:
    """What is not as the CSVs have it, in sentences."""
    found = plots(results)
    sentences = [
        harness.difference(DOCS / "benchmarks.md", markdown(results, DOCS)),
        harness.difference(README, readme(README.read_text(), results)),
        *(f"docs/evidence/{plot.file} is a plot of other numbers" for plot in found if state(plot, DOCS) == "stale"),
        *(f"docs/evidence/{path.name} is a plot of nothing in bench/results" for path in _unknown(found)),
    ]
    return [sentence for sentence in sentences if sentence]


def _unknown(found: Sequence[Plot]) -> list[Path]:
    return sorted(path for path in DOCS.glob(f"{PREFIX}*.svg") if path.name not in {plot.file for plot in found})


def write(results: Results) -> list[str]:
    """The page, the README's tables, and the plots where they can be drawn; what was not, in sentences."""
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
    left = [plot.file for plot in found if state(plot, DOCS) != "drawn"]
    return [f"not drawn, matplotlib is not installed: {', '.join(left)}; {PLOTS_HOW.strip('`')}"] if left else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="write docs/evidence/benchmarks.md, the README's tables and the plots")
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
