"""The page of what composes with what is what the marks of the tests say, and the marks are read without importing the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.facts import ROOT
from bench.models.compositions import FEATURES, PAGE, family_table, feature_table, page, switch_table
from bench.models.marks import Composes, Draws, MarkedTest, read_marks

TEST = MarkedTest("tests/test_a.py", "test_a", slow=False)


def test_the_page_is_what_the_tests_say() -> None:
    """To write it: `python -m bench.models --write`."""
    assert PAGE.read_text() == page()


def marks(folder: Path, body: str) -> tuple[list[Composes], list[Draws]]:
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "shared.py").write_text('OTHERS = {"SD3": 1, "FLUX": 2}\n')
    (folder / "tests" / "test_a.py").write_text(f"from tests.shared import OTHERS as MORE\n{body}\ndef test_a() -> None: ...\n")
    return read_marks(folder / "tests", folder)


def test_marks_are_read_from_the_source(tmp_path: Path) -> None:
    found, _ = marks(
        tmp_path,
        '@pytest.mark.slow\n@pytest.mark.composes("LoRA", "network", refused="why")\n@pytest.mark.composes("LoRA", "cascade", case="SD3")',
    )
    test = MarkedTest("tests/test_a.py", "test_a", slow=True)
    assert found == [Composes(test, "LoRA", "network", refused="why"), Composes(test, "LoRA", "cascade", case="SD3")]


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        ('["SD3", pytest.param("FLUX", marks=pytest.mark.slow)]', ("SD3", "FLUX")),
        ("MORE", ("SD3", "FLUX")),
        ('{**MORE, "SDXL": lambda: 0}', ("SD3", "FLUX", "SDXL")),
        ('MORE | {"SDXL": 0}', ("SD3", "FLUX", "SDXL")),
        ('[*MORE, "SDXL"]', ("SD3", "FLUX", "SDXL")),
        ('[name for name in MORE if name != "SD3"]', ("FLUX",)),
        ('[name for name in MORE if name in ("SD3", "SDXL")]', ("SD3",)),
        ("OWN", ("Z-Image",)),
    ],
)
def test_families_are_names_in_any_file(families: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    _, (found,) = marks(tmp_path, f'OWN: list = ["Z-Image"]\n@pytest.mark.draws("upscale", {families}, switch="mask")')
    assert found == Draws(TEST, "upscale", expected, "mask")


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('draws("upscale", sorted(MORE), switch="mask")', "test_a.py: families must be a list of strings, .* got sorted"),
        ('draws("upscale", [n for n in MORE if n > "A"], switch="mask")', "test_a.py: families must be listed, got the condition n > 'A'"),
        ('draws("outpainting", MORE, switch="mask")', "test_a.py:2: task must be one of text-to-image, .* got task='outpainting'"),
        ('composes("LoRA", "pipeline")', "test_a.py:2: where must be one of network, cascade, got where='pipeline'"),
        ('composes("LoRA", "cascade", why="no")', "test_a.py:2: .*unexpected keyword argument 'why'"),
    ],
)
def test_marks_that_cannot_be_read(mark: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        marks(tmp_path, f"@pytest.mark.{mark}")


def test_a_cell_is_a_test_or_a_reason() -> None:
    shown = Composes(TEST, "LoRA", "network")
    table = feature_table([shown, Composes(TEST, "LoRA", "cascade", refused="why")], {"LoRA": {}})
    assert table[-1] == "| LoRA | `test_a` | refused, why: `test_a` |"
    assert feature_table([shown], {"LoRA": {"cascade": "not yet"}})[-1] == "| LoRA | `test_a` | not yet |"
    with pytest.raises(ValueError, match="LoRA, cascade: a cell must have a test or a reason, got 0 tests and reason=''"):
        feature_table([shown], {"LoRA": {}})
    with pytest.raises(ValueError, match="LoRA, network: a cell must have a test or a reason, got 1 tests and reason='not yet'"):
        feature_table([shown], {"LoRA": {"network": "not yet", "cascade": "not yet"}})
    with pytest.raises(ValueError, match="the feature must be a row of FEATURES, got 'LoRA'"):
        feature_table([shown], {})


def test_families_have_their_switches_by_task() -> None:
    draws = [Draws(TEST, "upscale", ("SDXL", "FLUX"), "prompt"), Draws(TEST, "text-to-image", ("FLUX",), "mask")]
    assert family_table(draws)[2:] == ["| FLUX | mask | - | - | prompt |", "| SDXL | - | - | - | prompt |"]
    assert switch_table(draws)[2:] == [
        "| text-to-image | mask | `tests/test_a.py`: `test_a` |",
        "| upscale | prompt | `tests/test_a.py`: `test_a` |",
    ]


@pytest.mark.slow
def test_every_cell_is_a_test_that_pytest_finds() -> None:
    """A family is a parameter of its test, unless the test is of one family alone."""
    composes, draws = read_marks()
    files = sorted({mark.test.file for mark in [*composes, *draws]})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "composes or draws", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    cases = {(mark.test, mark.case) for mark in composes} | {
        (mark.test, family) for mark in draws for family in mark.families if len(mark.families) > 1
    }
    missing = []
    for test, case in cases:
        ids = [line.removeprefix(f"{test.file}::{test.name}") for line in collected if line.startswith(f"{test.file}::{test.name}")]
        if not any(not case or f"[{case}]" in one or f"-{case}]" in one or f"[{case}-" in one for one in ids if one[:1] in ("", "[")):
            missing.append(f"{test.file}::{test.name}[{case}]")
    assert missing == []
    assert FEATURES.keys() == {mark.feature for mark in composes} | {name for name, reasons in FEATURES.items() if len(reasons) == 2}
