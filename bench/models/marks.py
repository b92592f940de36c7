"""The marks `composes` and `draws` of the tests, which say what a test shows.

    @pytest.mark.composes("LoRA", "cascade")                           the test shows a feature on a patched network, or in the cascade
    @pytest.mark.composes("attention slicing", "network", refused="why")                the test shows that it raises an error
    @pytest.mark.composes("guiders", "cascade", case="HunyuanImage 2.1")                only this parameter of the test shows it
    @pytest.mark.draws("upscale", PICTURES, switch="mask")              the test runs a task with a switch, for each of these families

Files of tests that have such marks are imported, so what they import must be installed: `pip install -e ".[diffusers,test]"`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import isfunction
from typing import Any, NamedTuple

from bench.harness.facts import ROOT

WHERE = ("network", "cascade")
TASKS = ("text-to-image", "image-to-image", "inpainting", "upscale")


class MarkedTest(NamedTuple):
    """A test with a mark."""

    file: str  # from the root of the repository
    name: str
    slow: bool  # all of its cases are left out of the default run


class Composes(NamedTuple):
    """A test of a feature on a patched `network` or in the `cascade`. `refused` says why, where it shows that an error is raised."""

    test: MarkedTest
    feature: str
    where: str
    refused: str = ""
    case: str = ""


class Draws(NamedTuple):
    """A test that runs a task with a switch, for each of the families."""

    test: MarkedTest
    task: str
    families: tuple[str, ...]
    switch: str


def read_marks() -> tuple[list[Composes], list[Draws]]:
    """All marks of the tests, in the order of their files and lines; raises as `marks_of`."""
    found: list[Composes | Draws] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if re.search(r"mark\.(composes|draws)\(", path.read_text()):
            file = path.relative_to(ROOT)
            module = import_module(".".join(file.with_suffix("").parts))
            tests = [function for function in vars(module).values() if isfunction(function) and function.__module__ == module.__name__]
            found += [mark for test in tests for mark in marks_of(test, str(file))]
    return [mark for mark in found if isinstance(mark, Composes)], [mark for mark in found if isinstance(mark, Draws)]


def marks_of(function: Callable[..., Any], file: str) -> Iterator[Composes | Draws]:
    """The marks of one test, the uppermost first.

    Raises:
        ValueError: A mark names no place or task.
        TypeError: It has other arguments than these classes.
    """
    marks = getattr(function, "pytestmark", [])[::-1]
    test = MarkedTest(file, function.__name__, any(mark.name == "slow" for mark in marks))
    for mark in marks:
        if mark.name == "composes":
            composes = Composes(test, *mark.args, **mark.kwargs)
            _check(test, "where", composes.where, WHERE)
            yield composes
        elif mark.name == "draws":
            task, families = mark.args
            _check(test, "task", task, TASKS)
            names = (one if isinstance(one, str) else one.values[0] for one in families)  # or of pytest.param
            yield Draws(test, task, tuple(names), **mark.kwargs)


def _check(test: MarkedTest, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{test.file}, {test.name}: {name} must be one of {', '.join(known)}, got {name}={value!r}")
