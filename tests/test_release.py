"""What is installed: the wheel and the sdist, in an environment that does not see the source tree, and systems without Triton."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import scalediff
import scalediff_kernels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {"scalediff": scalediff.__all__, "scalediff_kernels": scalediff_kernels.__all__}


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command without the environment variables that lead to the source tree."""
    hidden = ("PYTHONPATH", "MYPYPATH", "VIRTUAL_ENV", "SCALEDIFF_DEBUG")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, extracted."""
    pytest.importorskip("hatchling", reason="the extra dev has the build backend")
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist alone."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=sdist)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel; torch and the rest are those of this environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=wheel.parent)
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # Lines of a .pth file are put on the path, but the .pth files in there are not read: an editable install stays unseen.
    (Path(site) / "shared.pth").write_text("\n".join(shared) + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return bin_folder


def test_the_version_has_one_source() -> None:
    """pyproject.toml; everything else asks the installed metadata."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    sources = [path for top in ("scalediff", "kernels", "bench") for path in (ROOT / top).rglob("*.py")]
    assert not [path for path in sources if f'"{PROJECT["version"]}"' in path.read_text() or "__version__ =" in path.read_text()]
    assert f"## {PROJECT['version']}" in (ROOT / "docs" / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path, sdist: Path) -> None:
    assert wheel.name == f"scalediff-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"scalediff", "scalediff_kernels", f"scalediff-{PROJECT['version']}.dist-info"}
    data = ["scalediff/py.typed", "scalediff_kernels/py.typed", "scalediff/web/viewer.js", "scalediff/web/page.css",
            "scalediff/demo/model/unet/diffusion_pytorch_model.safetensors"]  # fmt: skip
    assert set(data) <= set(names)
    assert any(name.endswith("licenses/docs/LICENSE") for name in names)
    listed = subprocess.run(["git", "ls-files", "scalediff", "kernels"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode == 0:
        tracked = {line.removeprefix("kernels/") for line in listed.stdout.splitlines()}
        assert {name for name in names if ".dist-info/" not in name} == tracked
    assert {path.name for path in sdist.iterdir()} >= {"scalediff", "kernels", "tests", "bench", "pyproject.toml", "README.md", "PKG-INFO"}
    assert all((sdist / "bench" / name).is_file() for name in ("gpu/parts.toml", "attention/shapes.csv", "hub/templates/_ops.py.template"))


@pytest.mark.slow
def test_the_installed_command_draws_away_from_the_sources(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the picture-making path needs diffusers")
    found = run(installed / "python", "-c", "import scalediff, scalediff_kernels as k; print(scalediff.__file__, k.__file__)", cwd=tmp_path)
    assert all(Path(path).is_relative_to(installed.parent) for path in found.stdout.split())
    assert f"scalediff {PROJECT['version']}, " in run(installed / "scalediff", "--version", cwd=tmp_path).stdout
    fast = ["--size", "72", "--steps", "2", "--restart", "0.5", "--quiet"]
    run(installed / "scalediff", "generate", "a full moon", "--out", "moon.png", *fast, cwd=tmp_path)
    told = run(installed / "scalediff", "info", "moon.png", cwd=tmp_path).stdout
    assert f'"scalediff": "{PROJECT["version"]}"' in told


@pytest.mark.slow
def test_the_tests_of_the_sdist_pass_against_the_wheel(installed: Path, sdist: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tests-only"
    shutil.copytree(sdist, copy, ignore=lambda folder, names: {"scalediff", "kernels"} & set(names) if Path(folder) == sdist else set())
    tests = ["neighborhood/test_geometry.py", "neighborhood/test_lse.py", "steps/test_steps.py"]
    done = run(installed / "python", "-m", "pytest", "-q", "-x", *(f"tests/kernels/{name}" for name in tests), cwd=copy)
    assert re.search(r"\d{2,} passed", done.stdout), done.stdout
    assert "failed" not in done.stdout


@pytest.mark.slow
def test_the_types_of_the_installed_packages_are_seen(installed: Path, tmp_path: Path) -> None:
    """By `mypy --strict`, in a script with every public name; and a wrong use is an error."""
    pytest.importorskip("mypy", reason="the extra dev has mypy")
    usage = (ROOT / "tests" / "typed_usage.py").read_text()
    imports = "".join(f"from {package} import {name} as {package}_{name}\n" for package, names in NAMES.items() for name in names)
    every = [f"{package}_{name}" for package, names in NAMES.items() for name in names]
    (tmp_path / "good.py").write_text(usage)
    (tmp_path / "names.py").write_text(f"{imports}\nevery: list[object] = [{', '.join(every)}]\n")
    (tmp_path / "wrong.py").write_text('import scalediff\n\nscalediff.generate(scalediff.load_demo(), 3, height="tall", width=128)\n')
    # Annotations of the packages name no class of these libraries, whose types take mypy four times as long as all the rest.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-diffusers.*,transformers.*,peft.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable", installed / "python"]
    errors = run(*command, "good.py", "names.py", "wrong.py", cwd=tmp_path, check=False).stdout
    assert "Found 2 errors in 1 file (checked 3 source files)" in errors
    assert 'wrong.py:3: error: Argument 2 to "generate" has incompatible type "int"' in errors
    assert 'wrong.py:3: error: Argument "height" to "generate" has incompatible type "str"; expected "int"' in errors


WITHOUT_TRITON = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in {absent!r}:
    sys.modules[name] = None  # what find_spec asks first
sys.meta_path.insert(0, Absent())
import torch
import scalediff, scalediff_kernels

q, k, v = torch.randn(3, 1, 16, 16, 2, 16, generator=torch.Generator().manual_seed(0))
how = dict(window=(8, 8), patch=(4, 4))
exact = scalediff_kernels.neighborhood_patch_attention(q.double(), k.double(), v.double(), **how, impl="reference")
for impl in ("auto", "sdpa"):
    assert (scalediff_kernels.neighborhood_patch_attention(q, k, v, **how, impl=impl) - exact).abs().max() < 1e-5
filtered = scalediff_kernels.low_pass(torch.ones(1, 1, 16, 16), cutoff=0.25)
assert (filtered - 1).abs().max() < 1e-5
for call in (
    lambda: scalediff_kernels.neighborhood_patch_attention(q, k, v, **how, impl="triton"),
    lambda: scalediff_kernels.low_pass(torch.ones(1, 1, 16, 16), cutoff=0.25, impl="triton"),
):
    try:
        call()
    except NotImplementedError as error:
        print(error)
{more}
"""


def without(*absent: str, more: str = "") -> str:
    """What a fresh process prints that does not have these modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    code = WITHOUT_TRITON.format(absent=absent, more=more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_without_triton_the_packages_import_and_compute() -> None:
    """As on Windows and macOS, which have no such wheel; the operations, and an error that says what is missing."""
    told = without("triton", "resource", "fcntl").splitlines()
    assert told[0] == "impl='triton' needs the triton package, which is not installed: use impl='auto', got impl='triton'"
    assert len(told) == 2
    assert "triton" in told[1]


@pytest.mark.slow
def test_without_triton_a_picture_is_drawn(tmp_path: Path) -> None:
    """With neighborhood patch attention by torch's SDPA. diffusers needs the module resource on this system."""
    pytest.importorskip("diffusers", reason="the picture-making path needs diffusers")
    out = tmp_path / "moon.png"
    arguments = ["generate", "a moon", "--size", "72", "--steps", "2", "--restart", "0.5", "--quiet", "--out", str(out)]
    told = without("triton", "fcntl", more=f"from scalediff.command.cli import main\nprint(main({arguments!r}))")
    assert told.splitlines()[-1] == "0"
    assert out.is_file()
