"""Write the kernels as a folder for Hugging Face's `kernels` package: `python -m bench.hub --out FOLDER`.

The layout is that of a universal (`noarch`) kernel. The files are those of `scalediff_kernels` with relative imports, because the package
is loaded under a name that the loader chooses, and with operators in a namespace of their own, so that several builds and the installed
package work in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from bench.harness.command import positive
from bench.harness.facts import ROOT

PACKAGE = "scalediff_kernels"
NAME = "scalediff-kernels"
SOURCE = ROOT / "kernels" / PACKAGE
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
TEMPLATES = Path(__file__).parent / "templates"
_NAMESPACE_FILE = "_ops.py"  # of the operators: kernel-builder writes its own into torch-ext; build has one for each backend


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
    paths = [path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / _NAMESPACE_FILE]
    return {path.as_posix(): relative_imports((SOURCE / path).read_text(), len(path.parts) - 1) for path in paths}


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
    facts = {"name": NAME, "version": version, "license": "apache-2.0"}
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id is not None else ""
    build_toml = _filled("build.toml", **facts, backends=json.dumps(BACKENDS), hub=hub)  # from which the builder makes `build/` itself
    _write(out, {"build.toml": build_toml, "README.md": _filled("README.md", **facts, repo=repo_id or "OWNER/NAME")})
    _write(out / "torch-ext" / PACKAGE, files)
    for backend in BACKENDS:
        unique = f"_{PACKAGE}_{backend}_{digest}"
        metadata = {"id": unique, **facts, "python-depends": [], "backend": {"type": backend}}
        own = {_NAMESPACE_FILE: _filled(_NAMESPACE_FILE, unique=unique), "metadata.json": json.dumps(metadata, indent=2) + "\n"}
        _write(out / "build" / f"torch-{backend}", files | own)
    return [out / "build" / f"torch-{backend}" for backend in BACKENDS]


def _filled(template: str, **values: object) -> str:
    return Template((TEMPLATES / f"{template}.template").read_text()).substitute(values)


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hub", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument("--version", type=positive(int), default=1, metavar="N", help="version of the kernel (default: 1)")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="the repository that it will be published in")
    options = parser.parse_args(arguments)
    try:
        print(*build(options.out, version=options.version, repo_id=options.repo_id), sep="\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
