"""The tree keeps its shape: top-level names, the order of the wings, sizes, a small public surface, no work at import."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import scalediff
import scalediff_kernels

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "scalediff").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
MODEL_LIBRARIES = {"diffusers", "transformers", "accelerate", "safetensors", "PIL"}
# From the ground up.
WINGS = (
    "arguments",
    "settings",
    "demo",
    "families",
    "patching",
    "cost",
    "cascade",
    "methods",
    "patch",
    "draw",
    "comfy",
    "web",
    "command",
    "__main__",
)
COMFYUI = {"comfy", "latent_preview"}  # its top-level modules


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path, *, eager_only: bool) -> set[str]:
    """Top-level packages that a file imports; with `eager_only`, at module level alone."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if eager_only else list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


def files_imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, in functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES)


def test_top_level_is_exactly_what_the_readme_promises() -> None:
    """What is tracked: a virtual environment or a picture beside it is the user's own affair."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    visible = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in visible if not name.startswith(".")} == {
        "pyproject.toml", "README.md", "kernels", "scalediff", "bench", "tests", "docs",
    }  # fmt: skip


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    used = imports(path, eager_only=False)
    if layer == "kernels":
        assert used.isdisjoint({"scalediff", "bench", "tests", "einops"} | MODEL_LIBRARIES)
        assert "triton" not in used or path.name in ("kernel.py", "launch.py", "_common.py") or path.parent.name == "hopper"
    if layer == "scalediff":
        assert used.isdisjoint({"bench", "tests", "triton"})
        assert imports(path, eager_only=True).isdisjoint(MODEL_LIBRARIES) or path.name in ("train.py", "architecture.py")
        assert imports(path, eager_only=True).isdisjoint(COMFYUI)
        assert used.isdisjoint(COMFYUI) or path.parent.name == "comfy"
    if path.name == "geometry.py":
        assert "torch" not in used
    if path.name == "reference.py":
        assert "triton" not in used
        assert "kernel" not in path.read_text().replace("scalediff_kernels", "")


def test_wings_import_downwards() -> None:
    """A file of one wing imports its own wing and those below it; the nodes, which build on the public names, import the package."""
    inside = [name for name in MODULES if name.startswith("scalediff.")]
    assert {name.split(".")[1] for name in inside} == set(WINGS), "a new folder has a place in WINGS"
    height = {name: WINGS.index(name.split(".")[1]) for name in inside}
    upwards = [
        f"{name} imports {other}"
        for name in height
        for other in sorted(files_imported(MODULES[name]))
        if (other == "scalediff" and not name.startswith("scalediff.comfy.")) or height.get(other, -1) > height[name]
    ]
    assert not upwards


def test_the_nodes_use_attention_by_its_public_names() -> None:
    used = {name: files_imported(MODULES[name]) for name in MODULES if name.startswith("scalediff.comfy.")}
    assert [(name, other) for name, others in used.items() for other in others if other.startswith("scalediff.patching")] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = graphlib.TopologicalSorter({name: files_imported(path) - {name} for name, path in MODULES.items()})
    graph.prepare()  # raises CycleError, which names the circle


def test_a_circle_and_a_step_upwards_are_seen(tmp_path: Path) -> None:
    """Of an import inside a function, too."""
    file = tmp_path / "file.py"
    file.write_text("def f():\n    from scalediff.cascade import run\n    import scalediff.draw\n    from scalediff import patch\n")
    assert files_imported(file) == {"scalediff.cascade.run", "scalediff.draw", "scalediff.patch"}


def test_public_names_are_pinned() -> None:
    assert scalediff.__all__ == [
        "AttentionPlan", "Family", "Handle", "Layout", "Result", "Sequence", "TextRotation", "attention_pass", "generate", "load_demo",
        "patch_model", "register_backend", "register_family", "unpatch_model", "unregister_family", "upscale",
    ]  # fmt: skip
    assert scalediff_kernels.__all__ == [
        "GuidedStep", "LowPass", "NoiseLevel", "guide_structure", "joint_neighborhood_patch_attention", "low_pass", "mix_frequencies",
        "neighborhood_patch_attention", "packed_view", "sharded_joint_neighborhood_patch_attention",
        "sharded_neighborhood_patch_attention",
    ]  # fmt: skip


def test_imports_are_light() -> None:
    """One after another in a fresh process, each on top of the last; what torch itself has loaded by then is not counted."""
    absent = {
        "import scalediff_kernels": MODEL_LIBRARIES | {"scalediff", "triton"},
        "import scalediff": MODEL_LIBRARIES | {"triton"},
        "from scalediff.comfy import NODE_CLASS_MAPPINGS": MODEL_LIBRARIES | {"triton"} | COMFYUI,
        "from scalediff.command.cli import main": MODEL_LIBRARIES | {"triton"},
    }
    lines = [f"{statement}; print(*(set(sys.modules) - before))" for statement in absent]
    code = "\n".join(["import sys, torch; before = set(sys.modules)", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    for (statement, names), loaded in zip(absent.items(), done.stdout.splitlines(), strict=True):
        assert names.isdisjoint(loaded.split()), statement


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := lines([path])) > 350}
    assert not long, f"split these: {long}"
    assert lines([ROOT / "README.md"]) <= 150


def test_the_benchmarks_stay_smaller_than_what_they_measure() -> None:
    assert lines(sorted((ROOT / "bench").rglob("*.py"))) < lines(sorted((ROOT / "scalediff").rglob("*.py")))
