"""`scalediff compare`: a picture for every method, a sheet of all with times and work, and what it does not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scalediff.cascade.metadata import read_metadata
from scalediff.command import comparing, loading
from scalediff.command.cli import main
from scalediff.command.method_options import method_objects
from scalediff.command.pictures import side_by_side
from scalediff.command.runs import SHARED
from scalediff.methods import DiffuseHigh, Direct, MultiDiffusion
from scalediff.settings import Preset, Settings

Image = pytest.importorskip("PIL.Image")
FAST = ["--steps", "1", "--size", "72", "--quiet"]


@pytest.fixture(autouse=True)
def _loaded_once(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_demo", lambda: demo)


def test_pictures_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sheet's metadata and the JSON tell the same."""
    methods = "super-resolution,full-attention,scalediff"
    run = ["compare", "a moon", "--methods", methods, "--no-sg", "--json"]
    assert main([*run, "--out", str(tmp_path / "x.png"), *FAST]) == 0
    names = ["x.full-attention.png", "x.png", "x.scalediff.png", "x.super-resolution.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    said = capsys.readouterr()
    told = json.loads(said.out)
    sheet = read_metadata(tmp_path / "x.png")
    assert [panel["title"] for panel in sheet["panels"]] == ["super-resolution", "full attention", "ScaleDiff without SG"]
    assert [panel["method"] for panel in sheet["panels"]] == methods.split(",") == [panel["method"] for panel in told["panels"]]
    assert sheet["panels"][0]["options"] == {"upsampler": None} == read_metadata(tmp_path / "x.super-resolution.png")["options"]
    tflops = [panel["tflops"] for panel in sheet["panels"]]
    assert 0 < tflops[0] < tflops[2] < tflops[1], "enlarging is cheapest, windows cost less than full attention"
    assert tflops == [panel["tflops"] for panel in told["panels"]]
    assert f"{tmp_path / 'x.png'}: super-resolution " in said.err
    assert " TFLOPs | full attention " in said.err
    with Image.open(tmp_path / "x.png") as image:
        assert image.width == 3 * 72 + 2 * 4


def test_a_panel_that_does_not_wrap_says_so(tmp_path: Path) -> None:
    assert main(["compare", "a moon", "--methods", "direct,scalediff", "--tile", "x", "--out", str(tmp_path / "x.png"), *FAST]) == 0
    sheet = read_metadata(tmp_path / "x.png")
    assert [panel["title"] for panel in sheet["panels"]] == ["direct, not seamless", "ScaleDiff"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "direct", "--workdir", "folder"], "`scalediff compare` does not support --workdir"),
        (["--methods", "direct", "--option", "stride=8"], "--option must be METHOD.NAME=VALUE, got 'stride=8'"),
        (["--methods", "direct", "--option", "direct.stride=8"], "--method direct has no options, got --option stride=8"),
        (
            ["--methods", "direct,scalediff", "--option", "demofusion.stride=8"],
            "--option is for methods of --methods that have options (none), got 'demofusion.stride=8'",
        ),
        (
            ["--methods", "direct,diffusehigh", "--restart", "0.5", "--tile", "x"],
            "--restart, --tile must be with scalediff or full-attention in --methods, got direct,diffusehigh",
        ),
        (
            ["--methods", "direct,demofusion", "--upsampler", "demo"],
            "--upsampler must be with a method that enlarges pictures in --methods, got direct,demofusion",
        ),
        (["--methods", "hiflow"], "HiFlow needs a flow model with FlowMatchEulerDiscreteScheduler, got DDIMScheduler"),
    ],
)
def test_what_it_does_not_take(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", "a moon", "--out", str(tmp_path / "x.png"), *arguments, *FAST]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_every_method_has_its_own_options() -> None:
    pairs = ["multidiffusion.stride=8", "diffusehigh.guided=0", "multidiffusion.view-batch=2"]
    found = method_objects(["direct", "scalediff", "multidiffusion", "diffusehigh"], pairs)
    expected = {"direct": Direct(), "scalediff": None, "multidiffusion": MultiDiffusion(stride=8, view_batch=2)}
    assert found == {**expected, "diffusehigh": DiffuseHigh(guided=0)}


def test_unknown_methods_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "a moon", "--methods", "direct,slow"])
    assert f"must be of {', '.join(comparing.COMPARABLE)}, got slow" in " ".join(capsys.readouterr().err.split())


def test_work_that_cannot_be_counted_is_left_out(capsys: pytest.CaptureFixture[str], demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scalediff.cost import recorded

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(recorded, "forward_work", fail)
    assert main(["compare", "a moon", "--methods", "super-resolution", "--out", "x.png", *FAST]) == 0
    assert "no TFLOPs: the FLOPs of StableDiffusionPipeline cannot be counted: no meta kernel" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_panel_of_a_tokenizer_without_a_length() -> None:
    """Another method has the arguments of the pipeline's call too. Without them the tokenizer is named, also by ScaleDiff."""
    from tests.scalediff.cascade.further_pipelines import ready

    pipe, call = ready("PRX")
    job, shared = comparing.Job("a moon", 0, Path("x.png")), dict.fromkeys(SHARED) | {"progress": False, "force": True}
    shared["preset"] = Preset(Settings(steps=2), "the test")
    panel = comparing.draw_panel(pipe, "direct", Direct(), job, (32, 32), {**shared, "call": call})
    assert panel.result.images[0].size == (32, 32)
    for name, method in (("direct", Direct()), ("scalediff", None)):
        with pytest.raises(
            ValueError, match=r"PRXPipeline pads prompts to .* its tokenizer, got tokenizer.model_max_length=1e\+30: set it to"
        ):
            comparing.draw_panel(pipe, name, method, job, (32, 32), shared)


def test_many_pictures_are_in_rows_of_four() -> None:
    colors = ["red", "lime", "blue", "white", "black", "yellow"]
    sheet = side_by_side([Image.new("RGB", (40, 30), color) for color in colors], ["a long label of a picture\n1 s"] * 6)
    assert sheet.width == 4 * 40 + 3 * 4
    bottom = sheet.height // 2 + 15
    assert [sheet.getpixel((20 + 44 * i, 15)) for i in (0, 2)] == [(255, 0, 0), (0, 0, 255)]
    assert [sheet.getpixel((20 + 44 * i, bottom)) for i in (0, 1, 2)] == [(0, 0, 0), (255, 255, 0), (255, 255, 255)]
