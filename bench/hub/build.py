"""The kernels as a folder that Hugging Face's `kernels` package loads: the layout of a universal (`noarch`) kernel.

The files are those of `scalediff_kernels` with relative imports, because the package is loaded under a name that the loader chooses, and
with operators in a namespace of their own, so that several builds and the installed package work in one process.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

PACKAGE = "scalediff_kernels"
NAME = "scalediff-kernels"
SOURCE = Path(__file__).parents[2] / "kernels" / PACKAGE
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
_LICENSE = "apache-2.0"
_NAMESPACE_FILE = "_ops.py"  # the builder's own in torch-ext, and one for each backend in build
# What `_ops.py` of one backend is, with the functions that kernel-builder's has.
_NAMESPACE = """import torch

NAMESPACE = "{unique}"
ops = torch.ops.{unique}


def add_op_namespace_prefix(name: str) -> str:
    return f"{{NAMESPACE}}::{{name}}"
"""
# From which kernel-builder makes `build/` itself.
_BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = {backends}
{hub}
[torch-noarch]
pyext = ["py"]
"""
_README = """---
license: {license}
tags: [kernel]
---

# {name}

Neighborhood patch attention, low-pass filters and guided steps for high-resolution diffusion (ScaleDiff, arXiv:2510.25818), on torch and
Triton.

```python
from kernels import get_kernel

scalediff_kernels = get_kernel("{repo}", version={version})
out = scalediff_kernels.neighborhood_patch_attention(q, k, v, window=(64, 64), patch=(32, 32))  # q, k, v: [B, Y, X, H, D]
```
"""


def relative_imports(text: str, folders: int) -> str:
    """Make the absolute imports of the package in a module relative, which has so many folders above it: 0 for `_launch.py`.

    Raises:
        ValueError: The package is imported as a whole (`import scalediff_kernels`), which has no relative form.
    """
    if whole := re.search(rf"^\s*import {PACKAGE}\b.*$", text, re.MULTILINE):
        raise ValueError(f"imports of {PACKAGE} must have the form from {PACKAGE}... import ..., got {whole[0].strip()}")
    return re.sub(rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import", rf"\1from {'.' * (folders + 1)}\2 import", text, flags=re.MULTILINE)


def package_files() -> dict[str, str]:
    """The modules of the package with relative imports, by path in the package, without that of the namespace."""
    paths = [path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py"))]
    return {
        path.as_posix(): relative_imports((SOURCE / path).read_text(), len(path.parts) - 1)
        for path in paths
        if str(path) != _NAMESPACE_FILE
    }


def build(out: Path, *, version: int, repo_id: str | None = None) -> list[Path]:
    """Write the folder; returns the folders of the backends in it.

    A change of the public names needs the next `version`. `repo_id` is `OWNER/NAME` of the repository that it will be published in.

    Raises:
        ValueError: The folder has files in it, or `repo_id` is not one.
        OSError: It cannot be written.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out must be a new or an empty folder, got {out}, which has files in it")
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--repo-id must be OWNER/NAME, got {repo_id!r}")
    files = package_files()
    digest = hashlib.sha256(json.dumps([version, files]).encode()).hexdigest()[:10]
    facts = {"name": NAME, "version": version, "license": _LICENSE}
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id is not None else ""
    description = {
        "build.toml": _BUILD_TOML.format(**facts, backends=json.dumps(BACKENDS), hub=hub),
        "README.md": _README.format(**facts, repo=repo_id or "OWNER/NAME"),
    }
    _write(out, description)
    _write(out / "torch-ext" / PACKAGE, files)
    for backend in BACKENDS:
        unique = f"_{PACKAGE}_{backend}_{digest}"
        metadata = {"id": unique, **facts, "python-depends": [], "backend": {"type": backend}}
        own = {_NAMESPACE_FILE: _NAMESPACE.format(unique=unique), "metadata.json": json.dumps(metadata, indent=2) + "\n"}
        _write(out / "build" / f"torch-{backend}", files | own)
    return [out / "build" / f"torch-{backend}" for backend in BACKENDS]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
