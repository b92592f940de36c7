"""The tables and plots of docs/evidence/benchmarks.md, and the README's tables, from the CSVs of bench/results: `python -m bench.report`.

Every number in them is read or divided out of rows of one CSV, one device and one commit, and stands with its command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.harness.facts import ROOT
from bench.harness.pages import fill, page_parser, write_or_check
from bench.harness.rows import RESULTS
from bench.quality.tables import summary
from bench.report.plots import PREFIX, Plot, plots, save
from bench.report.rows import NOT_YET, Results, read
from bench.report.tables import attention, checks, goals, pictures

PAGE = ROOT / "docs" / "evidence" / "benchmarks.md"
README = ROOT / "README.md"


def pages(results: Results, found: Sequence[Plot]) -> dict[Path, str]:
    """The page and the README as the results have them."""
    images = [f"![{plot.title}: {plot.source}]({plot.file})\n" for plot in found]
    blocks = {
        "goals": goals(results), "checks": checks(results), "pictures": pictures(results), "attention": attention(results),
        "plots": images or ["There is nothing to draw yet."],
    }  # fmt: skip
    readme = {"goals": goals(results, readme=True), "quality": quality(results)}
    return {PAGE: fill(PAGE.read_text(), blocks), README: fill(README.read_text(), readme)}


def quality(results: Results) -> list[str]:
    """The main columns of `bench.quality`, a table for every CSV that has rows of all methods."""
    tables = {file: lines for file, rows in results.quality.items() if (lines := summary(rows))}
    if len(tables) > 1:
        tables = {file: ["", f"{file}:", "", *lines] for file, lines in tables.items()}
    return [line for lines in tables.values() for line in lines] or [f"{NOT_YET}."]


def main(arguments: Sequence[str] | None = None) -> None:
    what = "the tables of docs/evidence/benchmarks.md and README.md, and the plots"
    options = page_parser("report", __doc__.split("\n")[0], what).parse_args(arguments)
    try:
        results = read(RESULTS)
        if not options.write and not options.check:
            print("\n".join(goals(results)))
            return
        found = list(plots(results))
        files = pages(results, found)
    except ValueError as error:
        raise SystemExit(f"python -m bench.report: {error}") from error
    drawn, wanted = {path.name for path in PAGE.parent.glob(f"{PREFIX}*.svg")}, {plot.file for plot in found}
    if options.write:
        for plot in found:
            save(plot, PAGE.parent)
        for name in drawn - wanted:
            (PAGE.parent / name).unlink()
    problems = [f"docs/evidence/{name} is not drawn" for name in sorted(wanted - drawn)]
    problems += [f"docs/evidence/{name} is a plot of nothing in bench/results" for name in sorted(drawn - wanted)]
    write_or_check(files, check=options.check, command="python -m bench.report --write", problems=problems)


if __name__ == "__main__":
    main()
