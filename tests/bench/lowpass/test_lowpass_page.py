"""The page of the filters' benchmark shows the committed rows, how they were measured and what is missing; prose has their ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.harness.facts import ROOT, is_commit
from bench.lowpass import __main__ as lowpass
from bench.lowpass.cases import LATENTS, Case


def test_the_page_is_that_of_the_committed_rows(tmp_path: Path) -> None:
    assert (ROOT / "docs" / "evidence" / "filters-measured.md").read_text() == lowpass.markdown(lowpass.committed())
    lowpass.main(["--doc", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == lowpass.markdown(lowpass.committed())


def test_committed_rows_are_named_and_say_what_came_of_them() -> None:
    for rows in lowpass.committed().values():
        for row in rows:
            assert row["row"] == "/".join(row[key] for key in ("case", "dtype", "layout", "operation", "implementation"))
            assert (row["p50_ms"] != "") == (row["status"] == "ok")
            assert row["note"] or row["status"] == "ok"
            assert is_commit(row["commit"])


def _row(case: Case, implementation: str, **more: str) -> dict[str, str]:
    row = dict.fromkeys(lowpass.FIELDS, "") | case.identity | {"operation": "low pass", "implementation": implementation, "status": "ok"}
    return row | {"machine": "CPU", "p50_ms": "2", "p20_ms": "1", "p80_ms": "3", "megabytes": "4", "copy_ms": "1"} | more


def test_what_has_no_package_is_told_once_and_what_failed_in_its_row() -> None:
    cases = LATENTS[:2]
    absent = {"p50_ms": "", "status": "skipped", "note": "the kornia package is not installed"}
    records = [row for case in cases for row in (_row(case, "eager"), _row(case, "kornia gaussian_blur2d", **absent))]
    failed = _row(cases[0], "scalediff", p50_ms="", status="FAILED", note="error 1 exceeds the budget")
    text = lowpass.markdown({"cpu": [*records, failed]})
    assert text.count("kornia") == 2
    assert "Skipped: kornia gaussian_blur2d: the kornia package is not installed (2 rows)." in text
    assert "| low pass | scalediff | FAILED: error 1 exceeds the budget |" in text


def test_rows_without_an_eager_time_have_no_ratio() -> None:
    alone = lowpass.markdown({"cpu": [_row(LATENTS[0], "scalediff"), _row(LATENTS[0], "eager", p50_ms="", status="error", note="no")]})
    assert "| scalediff | 2 (1 - 3) | 4 | 50% | - | - | - |" in alone


def test_rows_that_were_measured_otherwise_have_a_table_of_their_own() -> None:
    gpu = _row(LATENTS[0], "eager", cuda="12.8", cudnn="91002", card="driver 570, 700 W", torch="2.11.0", seconds="0.2", command="run")
    assert "`run`: torch 2.11.0, cuda 12.8, cudnn 91002, driver 570, 700 W," in lowpass.markdown({"gpu": [gpu]})
    two = [_row(LATENTS[0], "eager", commit="a"), _row(LATENTS[0], "scalediff", commit="b"), _row(LATENTS[1], "eager", commit="a")]
    text = lowpass.markdown({"cpu": two})
    assert text.count("| case |") == 2
    assert text.count("## CPU") == 1
    assert "| scalediff | 2 (1 - 3) | 4 | 50% | - | - | - |" in text, "no ratio to what was measured otherwise"


def test_the_ratios_in_prose_are_those_of_the_committed_rows() -> None:
    """docs/internals/filters.md: guided steps on latents against the definition, and every operation against one filter by hand."""
    (rows,) = (rows for rows in lowpass.committed().values() if not rows[0]["cuda"])
    prose = (ROOT / "docs" / "internals" / "filters.md").read_text()

    def ratios(case: str, layout: str, operation: str, other: str) -> list[float]:
        of = [r for r in rows if r["case"].startswith(case) and (r["layout"], r["operation"]) == (layout, operation)]
        times = {(r["case"], r["implementation"]): float(r["p50_ms"]) for r in of if r["status"] == "ok"}
        return sorted(times[name, other] / times[name, "scalediff"] for name, implementation in times if implementation == "scalediff")

    def ratios_text(found: Sequence[float]) -> str:
        return " to ".join(dict.fromkeys(f"{ratio:.1f}x" for ratio in (found[0], found[-1])))

    by_line = ratios("latent", "planes", "guided step", "eager, line by line")
    assert f"| {'met' if by_line[0] >= 2 else 'missed'}: {by_line[0]:.2f}x to {by_line[-1]:.2f}x |" in prose
    columns = (("latent", "planes"), ("features", "planes"), ("features", "channels last"))
    for operation in ("guided step", "mix frequencies", "low pass"):
        cells = [ratios_text(ratios(case, layout, operation, "eager")) for case, layout in columns]
        assert f"| {operation} | {' | '.join(cells)} |" in prose
