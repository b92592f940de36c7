"""The page of what composes with what is what the marks of the tests say."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("diffusers", reason="the marked tests import it")

from bench.harness.facts import ROOT
from bench.models.compositions import (
    FEATURES,
    PAGE,
    Composes,
    Draws,
    MarkedTest,
    family_table,
    feature_table,
    marks_of,
    page,
    read_marks,
    switch_table,
)

TEST = MarkedTest("tests/test_a.py", "test_a", slow=False)


def test_the_page_is_what_the_tests_say() -> None:
    """To write it: `python -m bench.models --write`."""
    assert PAGE.read_text() == page()


def test_marks_are_read_from_the_uppermost_on() -> None:
    @pytest.mark.slow
    @pytest.mark.composes("LoRA", "network", refused="why")
    @pytest.mark.composes("LoRA", "cascade", case="SD3")
    @pytest.mark.draws("upscale", ["SD3", pytest.param("FLUX", marks=pytest.mark.slow)], switch="mask")
    @pytest.mark.draws("upscale", {"SDXL": 1}, switch="prompt")
    def test_b() -> None: ...

    test = MarkedTest("tests/test_b.py", "test_b", slow=True)
    assert list(marks_of(test_b, test.file)) == [
        Composes(test, "LoRA", "network", refused="why"),
        Composes(test, "LoRA", "cascade", case="SD3"),
        Draws(test, "upscale", ("SD3", "FLUX"), "mask"),
        Draws(test, "upscale", ("SDXL",), "prompt"),
    ]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (pytest.mark.draws("outpainting", ["SD3"], switch="mask"), "task must be one of text-to-image, .* got task='outpainting'"),
        (pytest.mark.composes("LoRA", "pipeline"), "where must be one of network, cascade, got where='pipeline'"),
    ],
)
def test_marks_that_cannot_be_read(mark: pytest.MarkDecorator, message: str) -> None:
    @mark
    def test_b() -> None: ...

    with pytest.raises(ValueError, match=f"tests/test_b.py, test_b: {message}"):
        list(marks_of(test_b, "tests/test_b.py"))


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
