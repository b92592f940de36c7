"""The kernels as a folder that Hugging Face's `kernels` package loads: the layout of a universal (`noarch`) kernel.

The files are those of `scalediff_kernels` with relative imports, because the package is loaded under a name that the loader chooses, and
with operators in a namespace of their own, so that several builds and the installed package work in one process.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

PACKAGE = "scalediff_kernels"
NAME = "scalediff-kernels"
SOURCE = Path(__file__).parents[2] / "kernels" / PACKAGE
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
_LICENSE = "apache-2.0"
_NAMESPACE_FILE = "_ops.py"  # the builder's own in torch-ext, and one for each backend in build


def relative_imports(text: str, folders: int) -> str:
    """Make the absolute imports of the package in a module relative, which has so many folders above it: 0 for `_launch.py`.

    Raises:
        ValueError: The package is imported as a whole (`import scalediff_kernels`), which has no relative form.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            wrong = f"line {node.lineno}: {ast.unparse(node)}"
            raise ValueError(f"imports of {PACKAGE} must have the form from {PACKAGE}... import ..., got {wrong}")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and node.module.split(".")[0] == PACKAGE:
            inside = node.module.removeprefix(PACKAGE).removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {'.' * (folders + 1)}{inside} import", 1)
    return "".join(lines)


def package_files() -> dict[str, str]:
    """The modules of the package with relative imports, by path in the package, without that of the namespace."""
    files = {}
    for path in sorted(SOURCE.rglob("*.py")):
        inside = path.relative_to(SOURCE)
        if str(inside) != _NAMESPACE_FILE:
            files[inside.as_posix()] = relative_imports(path.read_text(), len(inside.parts) - 1)
    return files


def namespace_file(namespace: str) -> str:
    """`_ops.py` of one backend, with the functions that kernel-builder's has."""
    return (
        f'import torch\n\nNAMESPACE = "{namespace}"\nops = torch.ops.{namespace}\n\n\n'
        'def add_op_namespace_prefix(name: str) -> str:\n    return f"{NAMESPACE}::{name}"\n'
    )


def build(out: Path, *, version: int, repo_id: str | None = None) -> list[Path]:
    """Write the folder, which appears complete or not at all; returns the folders of the backends in it.

    A change of the public names needs the next `version`. `repo_id` is `OWNER/NAME` of the repository that it will be published in.

    Raises:
        ValueError: The folder has files in it, is no folder, or has no parent folder; the version or `repo_id` is not one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "files in it" if out.is_dir() else "no folder there"
        raise ValueError(f"--out must be a new or an empty folder, got {out}, which has {what}")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"--out must lie in an existing folder, got {out}")
    if version < 1:
        raise ValueError(f"--version must be at least 1, got {version}")
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--repo-id must be OWNER/NAME, got {repo_id!r}")
    files = package_files()
    digest = hashlib.sha256(json.dumps([version, files]).encode()).hexdigest()[:10]
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}-") as temporary:
        root = Path(temporary) / "whole"
        _write(root, {"build.toml": _build_toml(version, repo_id), "README.md": _readme(version, repo_id)})
        _write(root / "torch-ext" / PACKAGE, files)
        for backend in BACKENDS:
            unique = f"_{PACKAGE}_{backend}_{digest}"
            metadata = {
                "id": unique, "name": NAME, "version": version, "license": _LICENSE, "python-depends": [], "backend": {"type": backend},
            }  # fmt: skip
            own = {_NAMESPACE_FILE: namespace_file(unique), "metadata.json": json.dumps(metadata, indent=2) + "\n"}
            _write(root / "build" / f"torch-{backend}", files | own)
        if out.exists():
            out.rmdir()  # empty
        shutil.move(root, out)
    return [out / "build" / f"torch-{backend}" for backend in BACKENDS]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _build_toml(version: int, repo_id: str | None) -> str:
    """The description from which kernel-builder makes `build/` itself."""
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id is not None else ""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        f'[general]\nname = "{NAME}"\nversion = {version}\nedition = 5\nlicense = "{_LICENSE}"\nbackends = [{backends}]\n{hub}\n'
        '[torch-noarch]\npyext = ["py"]\n'
    )


def _readme(version: int, repo_id: str | None) -> str:
    name = repo_id or "OWNER/NAME"
    return f"""---
license: {_LICENSE}
tags: [kernel]
---

# {NAME}

Neighborhood patch attention, low-pass filters and guided steps for high-resolution diffusion (ScaleDiff, arXiv:2510.25818), on torch and
Triton.

```python
from kernels import get_kernel

scalediff_kernels = get_kernel("{name}", version={version})
out = scalediff_kernels.neighborhood_patch_attention(q, k, v, window=(64, 64), patch=(32, 32))  # q, k, v: [B, Y, X, H, D]
```
"""
