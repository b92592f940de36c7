"""The marks `composes` and `draws` of the tests, read from their source. The tests are parsed and not imported.

    @pytest.mark.composes("LoRA", "cascade")                           the test shows a feature on a patched network, or in the cascade
    @pytest.mark.composes("attention slicing", "network", refused="why")                the test shows that it raises an error
    @pytest.mark.composes("guiders", "cascade", case="HunyuanImage 2.1")                only this parameter of the test shows it
    @pytest.mark.draws("upscale", PICTURES, switch="mask")              the test runs a task with a switch, for each of these families

The families are the parameters of the test: a list of strings, a dict with them as keys, or an expression of such names. The names may come
from other files of tests, by `from ... import`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.facts import ROOT

WHERE = ("network", "cascade")
TASKS = ("text-to-image", "image-to-image", "inpainting", "upscale")


@dataclass(frozen=True)
class MarkedTest:
    """A test with a mark.

    Attributes:
        file: Path of its file, from the root of the repository.
        name: Name of the function.
        slow: Whether all of its cases are left out of the default run.
    """

    file: str
    name: str
    slow: bool


@dataclass(frozen=True)
class Composes:
    """A test of a feature on a patched `network` or in the `cascade`. `refused` says why, where it shows that an error is raised."""

    test: MarkedTest
    feature: str
    where: str
    refused: str = ""
    case: str = ""


@dataclass(frozen=True)
class Draws:
    """A test that runs a task with a switch, for each of the families."""

    test: MarkedTest
    task: str
    families: tuple[str, ...]
    switch: str


def read_marks(folder: Path = ROOT / "tests", root: Path = ROOT) -> tuple[list[Composes], list[Draws]]:
    """All marks of the tests in a folder, in the order of their files and lines.

    Raises:
        ValueError: A mark has other arguments than these classes, or families that cannot be read.
    """
    composes, draws = list[Composes](), list[Draws]()
    for path in sorted(folder.rglob("test_*.py")):
        if "mark.composes(" not in path.read_text() and "mark.draws(" not in path.read_text():
            continue
        source = _Source(path, root)
        for function in source.tree.body:
            if isinstance(function, ast.FunctionDef):
                names = [ast.unparse(one) for one in function.decorator_list]
                test = MarkedTest(str(path.relative_to(root)), function.name, "pytest.mark.slow" in names)
                for kind, place, values, named in _marks(function, source):
                    try:
                        if kind == "composes":
                            composes.append(_checked(Composes(test, *values, **named)))
                        else:
                            task, families = values
                            draws.append(_checked(Draws(test, task, tuple(families), **named)))
                    except (TypeError, ValueError) as error:
                        raise ValueError(f"{place}: {error}") from error
    return composes, draws


def _checked(mark: Any) -> Any:
    name, value, known = ("where", mark.where, WHERE) if isinstance(mark, Composes) else ("task", mark.task, TASKS)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {name}={value!r}")
    return mark


def _marks(function: ast.FunctionDef, source: _Source) -> Iterator[tuple[str, str, list[Any], dict[str, Any]]]:
    """The marks of a test: name, file and line, arguments, arguments by name."""
    for one in function.decorator_list:
        kind = ast.unparse(one.func) if isinstance(one, ast.Call) else ""
        if isinstance(one, ast.Call) and kind in ("pytest.mark.composes", "pytest.mark.draws"):
            place = f"{source.path.name}:{one.lineno}"
            named = {keyword.arg or "**": source.value(keyword.value) for keyword in one.keywords}
            yield kind.rpartition(".")[2], place, [source.value(argument) for argument in one.args], named


class _Source:
    """A file of tests, and the values that its names have."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self._root, self.tree = path, root, ast.parse(path.read_text())
        self._assigned, self._imported = dict[str, ast.expr](), dict[str, tuple[str, str]]()
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self._assigned |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom) and node.module:
                self._imported |= {name.asname or name.name: (node.module, name.name) for name in node.names}

    def value(self, node: ast.expr) -> Any:
        """A string, or the strings of a collection; of a dict its keys.

        Raises:
            ValueError: It is another expression.
        """
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple() | ast.Set():
                return [one for part in node.elts for one in self._strings(part)]
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return [one for key, value in pairs for one in self._strings(ast.Starred(value) if key is None else key)]
            case ast.Starred():
                return self.value(node.value)
            case ast.BinOp(op=ast.BitOr() | ast.Add()):
                return [*self.value(node.left), *self.value(node.right)]
            case ast.Call(func=ast.Attribute(attr="param"), args=[first, *_]):
                return self.value(first)
            case ast.ListComp(elt=ast.Name(id=name), generators=[ast.comprehension(target=ast.Name(id=same), iter=every, ifs=[test])]) if (
                name == same
            ):
                return [one for one in self.value(every) if self._holds(test, one)]
            case ast.Name(id=name) if name in self._assigned:
                return self.value(self._assigned[name])
            case ast.Name(id=name) if name in self._imported:
                module, original = self._imported[name]
                path = self._root / (module.replace(".", "/") + ".py")
                if path.is_file():
                    return _Source(path, self._root).value(ast.Name(original))
        raise ValueError(f"{self.path.name}: families must be a list of strings, or a dict with such keys, got {ast.unparse(node)}")

    def _strings(self, node: ast.expr) -> list[str]:
        found = self.value(node)
        return [found] if isinstance(found, str) else found

    def _holds(self, test: ast.expr, one: str) -> bool:
        """The condition `name != "..."` or `name not in (...)` of a list, for one of its strings."""
        match test:
            case ast.Compare(ops=[ast.NotEq() | ast.NotIn()], comparators=[other]):
                return one not in self._strings(other)
            case ast.Compare(ops=[ast.Eq() | ast.In()], comparators=[other]):
                return one in self._strings(other)
        raise ValueError(f"{self.path.name}: families must be listed, got the condition {ast.unparse(test)}")
