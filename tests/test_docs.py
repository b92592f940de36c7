"""The documentation points at what exists: links, anchors, files, commands, tests, public names, the help of the command."""

from __future__ import annotations

import ast
import functools
import re
import runpy
from pathlib import Path

import pytest

import scalediff
import scalediff_kernels

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "internals" / "architecture.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by the rule of GitHub and of Python-Markdown."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def mentioned_paths(text: str) -> list[str]:
    """Paths of files in the tree, `*` allowed, and of folders where they end with a slash."""
    tops = "scalediff|kernels|bench|tests|docs"
    return re.findall(rf"(?<![\w/.-])((?:{tops})/(?:[\w.*-]+/)*(?:[\w*-][\w.*-]*\.[a-z]+)?)(?![\w/])", text)


@every_page
def test_files_and_folders_that_are_named_exist(page: Path) -> None:
    must_not_exist = {"kernels/__init__.py"}  # docs/adr/0001
    missing = {path for path in mentioned_paths(page.read_text()) if not list(ROOT.glob(path.rstrip("/")))}
    assert missing <= must_not_exist


def test_files_that_docstrings_and_the_checks_name_exist() -> None:
    files = [file for top in ("scalediff", "kernels", "bench", "tests", "docs") for file in (ROOT / top).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    text = "\n".join([(ROOT / ".ci" / "run").read_text(), *(ast.get_docstring(node) or "" for node in documented)])
    assert [path for path in mentioned_paths(text) if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("`scalediff/patching/plan.py`, see bench/results/a-*.csv.", ["scalediff/patching/plan.py", "bench/results/a-*.csv"]),
        ("`scalediff/demo/` and https://x.org/docs/a.md", ["scalediff/demo/"]),
        ("docs/guide/models.md lists tests/kernels/test_a.py::test_b", ["docs/guide/models.md", "tests/kernels/test_a.py"]),
    ],
)
def test_paths_are_found_in_prose(text: str, paths: list[str]) -> None:
    assert mentioned_paths(text) == paths


@every_page
def test_benchmarks_that_are_named_can_be_run(page: Path) -> None:
    names = set(re.findall(r"python3? -m bench\.(\w+)", page.read_text()))
    assert {name for name in names if not (ROOT / "bench" / name / "__main__.py").is_file()} == set()


@functools.cache
def names_of_tests() -> set[str]:
    """Of all files of tests and their functions."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    return {file.stem for file in files} | {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}


@every_page
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", page.read_text()))
    assert named <= names_of_tests()


@pytest.mark.parametrize("package", [scalediff, scalediff_kernels], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: object) -> None:
    name, public = package.__name__, set(package.__all__)  # type: ignore[attr-defined]
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert public <= set(re.findall(rf"^::: {name}\.(\w+)$", page, flags=re.MULTILINE))


def test_the_command_page_is_what_the_command_prints() -> None:
    """Line breaks apart, which differ between versions of Python. To write the page: `python docs/site/command_page.py`."""
    writer = runpy.run_path(str(ROOT / "docs" / "site" / "command_page.py"))
    assert writer["PAGE"].read_text().split() == writer["page"]().split()


def test_the_architecture_page_names_what_is_in_the_files() -> None:
    """In the rows of its last table, and in sentences: `name` in `file`."""
    page = ARCHITECTURE.read_text()
    named = re.findall(r"^\| [^|]+ \| `([\w/.]+\.py)` \| `(\w+)` \|$", page, flags=re.MULTILINE)
    assert len(named) > 10
    in_prose = re.findall(r"`([\w.]+)`,? (?:in|from)\s+`([\w/]+\.py)`", page)
    assert len(in_prose) > 10
    named += [(file, name.split(".")[-1]) for name, file in in_prose]
    assert [(file, name) for file, name in named if not _defines(ROOT / file, name)] == []


def _defines(file: Path, name: str) -> bool:
    return file.is_file() and bool(re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.*=", file.read_text(), flags=re.MULTILINE))


def test_imports_run_along_the_arrows_of_the_architecture_page() -> None:
    page = ARCHITECTURE.read_text()
    below: dict[str, set[str]] = {}
    for source, target in re.findall(r"^ +(\w+)(?:\[.*?\])? --> (\w+)", page, flags=re.MULTILINE):
        below.setdefault(source, set()).add(target)

    def reached(wing: str, seen: tuple[str, ...] = ()) -> set[str]:
        assert wing not in seen, f"a circle of arrows: {seen}"
        return {wing}.union(*(reached(one, (*seen, wing)) for one in below.get(wing, ())))

    wrong = []
    for file in (ROOT / "scalediff").rglob("*.py"):
        wing = file.relative_to(ROOT / "scalediff").with_suffix("").parts[0]
        if wing not in ("__init__", "__main__"):
            wrong += [(str(file.relative_to(ROOT)), used) for used in _imported_wings(file) if used not in reached(wing)]
    assert wrong == []


def _imported_wings(file: Path) -> set[str]:
    """The folders, or files beside them, of the two packages that a file imports from."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {"kernels" if part[0] == "scalediff_kernels" else part[1] for part in parts if part[0] == "scalediff_kernels" or (
        part[0] == "scalediff" and len(part) > 1)}  # fmt: skip
