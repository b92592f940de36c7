"""The folder for Hugging Face's `kernels`: what it holds, what its loader makes of it, beside an installed scalediff."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import scalediff_kernels
from bench.hub.__main__ import BACKENDS, build, main, package_files, relative_imports
from scalediff_kernels.testing import attention_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    main(["--out", str(out), "--version", "3", "--repo-id", "me/scalediff-kernels"])
    return out


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    """The module as Hugging Face's loader imports it."""
    hub = pytest.importorskip("kernels", reason="the loader is Hugging Face's package kernels")
    if not hasattr(hub, "get_local_kernel"):
        pytest.skip("the name kernels is this repository's folder: Hugging Face's package is not installed")
    return hub.get_local_kernel(folder, backend="cpu")


def test_every_backend_has_the_whole_package(folder: Path) -> None:
    source = {path.relative_to(folder / "torch-ext/scalediff_kernels") for path in (folder / "torch-ext/scalediff_kernels").rglob("*.py")}
    assert Path("neighborhood/hopper/kernel.py") in source
    assert Path("_ops.py") not in source, "kernel-builder writes its own"
    names = set()
    for backend in BACKENDS:
        root = folder / "build" / f"torch-{backend}"
        assert {path.relative_to(root) for path in root.rglob("*") if path.is_file()} == source | {Path("_ops.py"), Path("metadata.json")}
        metadata = json.loads((root / "metadata.json").read_text())
        assert (metadata["name"], metadata["version"], metadata["backend"]) == ("scalediff-kernels", 3, {"type": backend})
        assert f'NAMESPACE = "{metadata["id"]}"' in (root / "_ops.py").read_text()
        names.add(metadata["id"])
    assert len(names) == len(BACKENDS)


def test_no_module_imports_the_package_by_name_or_names_an_operator_itself(folder: Path) -> None:
    for path in folder.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
        imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in imported if name.startswith("scalediff")], path
        if path.name != "_ops.py":
            code = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            assert not [text for text in code if text.startswith("scalediff::") or text == "scalediff"], path
            assert "torch.ops.scalediff" not in [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)], path


def test_the_description_is_valid_for_the_builder(folder: Path) -> None:
    rust = pytest.importorskip("kernels._rust", reason="the parser is that of Hugging Face's package kernels")
    assert len(rust.Build.open(folder).general.backends) == len(BACKENDS)


def test_the_loaded_kernel_has_the_public_names_and_is_another_package(loaded: Any) -> None:
    assert loaded.__all__ == scalediff_kernels.__all__
    assert loaded.neighborhood_patch_attention is not scalediff_kernels.neighborhood_patch_attention
    assert not loaded.__name__.startswith("scalediff")


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa", "triton"])
def test_results_are_those_of_the_installed_package(loaded: Any, impl: Any) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernel needs Triton")
        if not torch.cuda.is_available():
            pytest.importorskip("triton.runtime.interpreter", reason="without a GPU the kernel runs in the interpreter")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q, k, v = attention_inputs((1, 8, 4, 1, 16), dtype=torch.float32, device=device)
    text = [x[:, 0, :5].contiguous() for x in (q, k, v)]
    how: dict[str, Any] = {"window": (4, 4), "patch": (4, 2), "impl": impl}
    ours, theirs = (package.neighborhood_patch_attention(q, k, v, **how) for package in (scalediff_kernels, loaded))
    assert torch.equal(ours, theirs)
    for mine, other in zip(
        scalediff_kernels.joint_neighborhood_patch_attention(q, k, v, *text, **how),
        loaded.joint_neighborhood_patch_attention(q, k, v, *text, **how),
        strict=True,
    ):
        assert torch.equal(mine, other)


def test_filters_and_guided_steps_are_those_of_the_installed_package(loaded: Any) -> None:
    x, reference = torch.randn(2, 1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.low_pass(x, cutoff=0.25), scalediff_kernels.low_pass(x, cutoff=0.25))
    steps = [
        package.GuidedStep(reference, cutoff=0.25, prediction="epsilon")(x, x, level=package.NoiseLevel.of_alpha_bar(0.3), gamma=0.7)
        for package in (loaded, scalediff_kernels)
    ]
    assert torch.equal(*steps)


def test_operators_have_names_of_their_own(loaded: Any, folder: Path) -> None:
    unique = json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"]
    names = [name for name in torch._C._dispatch_get_all_op_names() if "::" in name]
    own = {name.split("::")[1] for name in names if name.startswith(f"{unique}::")}
    installed = {name.split("::")[1] for name in names if name.startswith("scalediff::")}
    assert own == installed
    assert "image_attention" in own


def test_the_same_sources_give_the_same_folder(folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", version=3, repo_id="me/scalediff-kernels")
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()
    build(tmp_path / "next", version=4)
    read = lambda where: json.loads((where / "build/torch-cpu/metadata.json").read_text())["id"]  # noqa: E731
    assert read(tmp_path / "next") != read(folder)
    assert "repo-id" not in (tmp_path / "next" / "build.toml").read_text()


def test_relative_imports_by_depth_and_form() -> None:
    text = "import torch\nfrom scalediff_kernels.a.b import (\n    c,\n)\nfrom scalediff_kernels import d\n"
    text += "def f():\n    from scalediff_kernels._e import g\n"
    assert relative_imports(text, 1) == (
        "import torch\nfrom ..a.b import (\n    c,\n)\nfrom .. import d\ndef f():\n    from .._e import g\n"
    )
    assert "from .neighborhood.api import" in package_files()["__init__.py"]
    with pytest.raises(ValueError, match=r"must have the form from scalediff_kernels... import ..., got import scalediff_kernels as s"):
        relative_imports("\nimport scalediff_kernels as s\n", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "full"], "--out must be a new or an empty folder, got full, which has files in it"),
        (["--out", "full/file"], "full/file"),
        (["--out", "new", "--version", "0"], "argument --version: must be positive and finite, got 0"),
        (["--out", "new", "--repo-id", "alone"], "--repo-id must be OWNER/NAME, got 'alone'"),
    ],
)
def test_what_is_refused_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_an_empty_folder_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    main(["--out", str(tmp_path / "empty")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "empty" / "build" / f"torch-{backend}") for backend in BACKENDS]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
