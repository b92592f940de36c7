"""Rehearse `bench.gpu` from its first line to its last on a machine without a GPU: `python3 -m bench.rehearsal`.

The last commit is copied without git and is not installed, as on another machine. The parent process gets a pretended GPU; every part runs
its own command on the CPU, on small problems, and tests are collected and skipped. What fails here would have failed there: an import, a
path, an option, a missing summary. Exit status: 0 if the run ended with status 0 and every part was done, or skipped because diffusers is
missing.

By default the environment is this one without diffusers and the installed package. `--build FOLDER` makes one with Python 3.12, torch
2.11, Triton 3.6, numpy 2.5, transformers and pytest-xdist (some gigabytes) and uses that. `--wheels FOLDER` is put on the path: with
diffusers unpacked in it, whole pictures are rehearsed, too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness.facts import ROOT

VERSIONS = ("torch==2.11.0", "triton==3.6.0", "numpy==2.5.*")
PACKAGES = (*VERSIONS, "transformers", "pytest", "pytest-xdist", "pytest-timeout", "einops", "requests", "pillow")
HIDDEN = ("diffusers", "scalediff", "_editable_impl_scalediff", "__editable__")
PARTS = ("tests", "kernel", "attention-goals", "cascade-sdxl", "filters")  # one of every kind, but for `tune`

PRETENDED = """
import runpy, shlex
from dataclasses import replace
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
torch.backends.cudnn.version = lambda: None  # asks the device
from bench.gpu import parts
INSTEAD = {  # options that replace those before them
    "attention": "--device cpu --shape cpu-32 --provider sdpa windows-flash --seconds 0.05",
    "lowpass": "--device cpu --seconds 0.01 --cases 'latent 1 x 4'",
    "cascade": "--device cpu --model demo --size 128 --method npa --steps 2 --compile eager",
    "": "-m gpu",
}
more = {part.name: shlex.split(INSTEAD.get(part.csv, "")) for part in parts.PARTS}
parts.PARTS = tuple(replace(part, arguments=(*part.arguments, *more[part.name]), limit=240.0) for part in parts.PARTS)
runpy.run_module("bench.gpu", run_name="__main__")
"""


def copy_tree(tree: Path) -> None:
    """Copy the files of the last commit, without git."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        subprocess.run(["git", "archive", "--output", archive.name, "HEAD"], cwd=ROOT, check=True)
        shutil.unpack_archive(archive.name, tree, filter="data")


def link_packages(folder: Path) -> None:
    """Link this environment's packages but the hidden ones. No .pth is read in a folder of PYTHONPATH: no editable install is seen."""
    for packages in dict.fromkeys([*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]):
        for entry in Path(packages).iterdir() if Path(packages).is_dir() else ():
            if not entry.name.lower().startswith(HIDDEN) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)


def build_environment(folder: Path) -> Path:
    """The interpreter of an environment with `PACKAGES`, made if there is none yet."""
    python, finished = folder / "bin" / "python3", folder / "finished"
    if not finished.exists():
        if (maker := shutil.which("python3.12")) is None:
            raise SystemExit("--build needs python3.12 on the path, got none")
        subprocess.run([maker, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        finished.touch()
    return python


@contextmanager
def stage(build: Path | None) -> Iterator[tuple[Path, Path, list[Path]]]:
    """A folder to work in, an interpreter in whose environment nothing of this project is installed, and folders for its path."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if build:
            yield work, build_environment(build), []
            return
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(work / "venv")], check=True)
        (work / "packages").mkdir()
        link_packages(work / "packages")
        yield work, work / "venv" / "bin" / "python3", [work / "packages"]


def rehearse(parts: Sequence[str], *, build: Path | None = None, wheels: Path | None = None) -> tuple[int, str]:
    """The exit status of the run and all that it printed, which is printed as it comes, too."""
    with stage(build) as (work, python, paths):
        copy_tree(work / "tree")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, [*([wheels.resolve()] if wheels else []), *paths])), "PYTHONUNBUFFERED": "1"}
        command = [str(python), "-c", PRETENDED, "--out", str(work / "out"), "--commit", "0123abc", "--only", *parts]
        how: Any = {"cwd": work / "tree", "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        printed = []
        with subprocess.Popen(command, **how) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                printed.append(line)
        if process.returncode and (work / "out" / "gpu.log").exists():
            print((work / "out" / "gpu.log").read_text()[-4000:])
        return process.returncode, "".join(printed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python3 -m bench.rehearsal", description=__doc__.split("\n")[0])
    build = "an environment with Python 3.12, torch 2.11, Triton 3.6; made if needed"
    parser.add_argument("--build", type=Path, metavar="FOLDER", help=build)
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="unpacked packages, put on the path")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help="of bench.gpu (default: one of every kind)")
    options = parser.parse_args(arguments)
    status, printed = rehearse(options.parts, build=options.build, wheels=options.wheels)
    well = re.findall(r"^(\S+) +(?:done|skipped .*needs diffusers)\b", printed, re.MULTILINE)
    wrong = [part for part in options.parts if part not in well]
    if status or wrong:
        raise SystemExit(f"the rehearsal failed: exit status {status}; not done by the summary: {', '.join(wrong) or 'nothing'}")
    print("rehearsed: the run ended with its summary and exit status 0")


if __name__ == "__main__":
    main()
