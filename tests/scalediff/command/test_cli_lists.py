"""The command with several prompts and seeds, with a preset and switches, and what it says of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scalediff.cascade import fitting
from scalediff.cascade.metadata import read_metadata
from scalediff.command import drawing, loading, method_options, runs
from scalediff.command.cli import main
from scalediff.command.loading import SCHEDULERS
from scalediff.cost.models import MODELS
from scalediff.methods import method_names

Image = pytest.importorskip("PIL.Image")

FAST = ["--size", "96", "--steps", "2", "--restart", "0.5", "--quiet"]


@pytest.fixture(autouse=True)
def _here(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_demo", lambda: demo)
    monkeypatch.chdir(tmp_path)


def last_pictures(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.png") if ".stage" not in p.name)


def settings_of(file: str) -> dict[str, Any]:
    told: dict[str, Any] = read_metadata(Path(file))["settings"]
    return told


def test_every_prompt_with_every_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.txt").write_text("\ufeffa sun\n\n  a moon \n", encoding="utf-8")  # as some editors begin a file
    assert main(["generate", "a moon", "--prompts", "more.txt", "--seed", "3,5-6", "--json", *FAST, "--size", "72"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["prompt"], one["seed"]) for one in told] == [(p, s) for p in ("a moon", "a sun", "a moon") for s in (3, 5, 6)]
    files = [one["file"] for one in told]
    assert last_pictures(tmp_path) == sorted(files)
    assert len(set(files)) == 9, "the prompt that is there twice has files of its own"
    assert [read_metadata(Path(file))["seed"] for file in files] == [3, 5, 6] * 3
    first, again = (Image.open(files[i]).tobytes() for i in (0, 6))
    assert first == again
    assert [(stage["height"], stage["steps"]) for stage in told[0]["stages"]] == [(64, 2), (72, 1)]
    assert told[0]["settings"]["restart"] == 0.5


def test_several_pictures_go_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").mkdir()
    assert main(["generate", "a moon", "--seed", "0,1", "--out", "here", "--workdir", "kept", *FAST]) == 0
    assert last_pictures(tmp_path / "here") == ["a-moon-0.png", "a-moon-1.png"]
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["a-moon-0", "a-moon-1"]
    capsys.readouterr()
    assert main(["generate", "a moon", "--seed", "0,1", "--out", "one.png", *FAST]) == 2
    assert "--out must be an existing folder for 2 pictures, got one.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a prompt is required, as an argument or in a file with --prompts"),
        (["--prompts", "missing.txt"], "--prompts must be a text file with one prompt per line, got missing.txt"),
        (["a moon", "--preset", "nope"], "preset must be one of default, paper for this UNet2DConditionModel, got 'nope'"),
        (["a moon", "--restart", "0.5,0.2"], "restart must have one value for each of the 1 stages above the native size, got"),
        (["a moon", "--sizes", "64,256"], "the last stage in sizes must be the target 96 x 96"),
        (["a moon", "--sizes", "32,96"], "by at most 2x along an axis, got (32, 32) and (96, 96)"),
        (["a moon", "--vae-attention", "npa"], "vae_attention='npa' needs an image autoencoder with attention, got AutoencoderKL"),
        (
            ["a moon", "--size-conditioning", "native"],
            "size_conditioning needs a pipeline with the arguments original_size and target_size",
        ),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["generate", *FAST, *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert said[-1].startswith("scalediff: error: ")
    assert not list(tmp_path.glob("*.png"))


def test_the_line_goes_before_the_preset() -> None:
    off = ["--no-lfm", "--attention", "full"]
    assert main(["generate", "a moon", "--preset", "paper", "--steps", "5", "--size", "96", "--quiet", *off]) == 0
    told = settings_of("a-moon-0.png")
    assert (told["steps"], told["guidance_scale"], told["restart"]) == (5, 7.5, 0.4)
    assert (told["lfm"], told["sg"], told["attention"]) == (False, True, "full")
    assert read_metadata(Path("a-moon-0.png"))["preset"] == "paper"


def test_every_switch_has_an_option() -> None:
    chosen = {
        "restart": [0.5, 0.25], "guidance_until": 0.5, "sg_cutoff_start": [0.5, 0.25], "filter": "butterworth", "anchor": "trajectory",
        "jitter": "alternate", "attention": "npa", "lfm_cutoff": 0.25, "sg_cutoff": [0.125, 0.25], "guidance_scale": 2.0,
    }  # fmt: skip
    line = []
    for name, value in chosen.items():
        line += ["--" + name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    assert (
        main(["generate", "a moon", "--steps", "4", "--size", "128", "--sizes", "64,96,128", "--lfm", "--quiet", "--tile", "x", *line]) == 0
    )
    told = settings_of("a-moon-0.png")
    assert {name: told[name] for name in chosen} == chosen
    assert (told["lfm"], told["wrap"]) == (True, [False, True])
    assert set(method_options.SETTING_OPTIONS) == set(told), "an option for each"


@pytest.mark.parametrize("command", ["generate", "compare", "upscale"])
def test_without_a_size_the_last_stage_is_the_target(command: str, tmp_path: Path) -> None:
    Image.new("RGB", (72, 72), (20, 30, 60)).save(tmp_path / "photo.png")
    subject = ["photo.png", "a moon"] if command == "upscale" else ["a moon"]
    sizes = "80,104" if command == "upscale" else "64,104"
    assert main([command, *subject, "--sizes", sizes, "--steps", "2", "--restart", "0.5", "--out", "x.png", "--quiet"]) == 0
    with Image.open("x.scalediff.png" if command == "compare" else "x.png") as image:
        assert image.size == (104, 104)


def test_previews_are_shown_and_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    keep = runs.save_png

    def look(image: Any, path: Path, *, metadata: Any) -> None:
        if ".preview" in path.name:
            shown.append((image.size, metadata["stage"], metadata["step"]))
        keep(image, path, metadata=metadata)

    monkeypatch.setattr(runs, "save_png", look)
    assert main(["generate", "a moon", "--preview", "2", *FAST, "--steps", "4"]) == 0
    assert shown == [((64, 64), "1/2", "2/4"), ((64, 64), "1/2", "4/4"), ((64, 64), "2/2", "2/2")]
    assert last_pictures(tmp_path) == ["a-moon-0.png"]


def test_memory_is_told_before_anything_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 2**20)
    monkeypatch.setattr(drawing, "generate", lambda *args, **kwargs: pytest.fail("drawn") if not said() else stop())

    def said() -> str:
        told.append(capsys.readouterr().err)
        return told[-1]

    def stop() -> None:
        raise torch.OutOfMemoryError("as foretold")

    told: list[str] = []
    assert main(["generate", "a moon", "--force", *FAST]) == 1
    assert "memory: this run needs about 1.0 GiB; 0.0 GiB are available; it needs about 1.0 GiB as configured" in told[0]
    assert capsys.readouterr().err == "scalediff: error: as foretold\n"


@pytest.mark.parametrize("prompts", [[""], ["a moon", "  "]])
def test_an_empty_prompt_is_named(prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *prompts, *FAST, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith("a prompt is empty: its picture follows no text\n")
    assert "picture-0.png" in last_pictures(tmp_path)
    assert main(["generate", "a moon", *FAST]) == 0
    assert "empty" not in capsys.readouterr().err


def test_progress_in_a_pipe_is_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a moon", "--compare", *FAST[:-1]]) == 0
    lines = capsys.readouterr().err
    assert "\r" not in lines
    stages = [line for line in lines.splitlines() if line.startswith(("stage ", "direct,"))]
    run = ["stage 1/2  64 x 64", "stage 2/2  96 x 96"]
    assert stages == [*run, "direct, 96 x 96", "stage 1/1  96 x 96", *run]


def test_a_run_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers and a size that would fit, which does."""
    room = 2**30 + 60 * 2**20
    monkeypatch.setattr(fitting, "available_bytes", lambda device: room)
    monkeypatch.setattr(drawing, "generate", lambda *args, **kwargs: pytest.fail("drawn"))
    big = ["--steps", "4", "--restart", "0.5", "--quiet", "--device", "cpu", "--no-vae-tiling"]
    assert main(["generate", "a moon", "--size", "1024x512", *big]) == 2
    said = capsys.readouterr().err
    assert said.startswith("scalediff: error: this run needs about 1.")
    assert f"; {room / 2**30:.1f} GiB are available; " in said
    assert said.endswith(" would fit; --force runs it all the same\n")
    height, width = map(int, re.findall(r"; (\d+) x (\d+) would fit", said)[0])
    assert 64 <= width <= 512
    assert abs(height - 2 * width) <= 16
    with pytest.raises(pytest.fail.Exception, match="drawn"):
        main(["generate", "a moon", "--size", f"{height}x{width}", *big])
    assert "this run needs about 1.1 GiB; 1.1 GiB are available" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "upscale"])
def test_a_picture_beyond_all_memory_is_refused(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--force does not help: no machine holds it."""
    Image.new("RGB", (72, 72), (20, 30, 60)).save(tmp_path / "photo.png")
    subject = ["a moon"] if command == "generate" else [str(tmp_path / "photo.png"), "a moon"]
    assert main([command, *subject, *FAST, "--size", "10000000", "--device", "cpu", "--force"]) == 2
    said = capsys.readouterr().err
    assert "the picture must fit into the memory of cpu, " in said
    assert "got 10000000 x 10000000, which takes 1117587.1 GiB for its pixels alone; " in said
    assert said.endswith(" would fit\n")


def test_low_memory_draws_the_same_picture_nearly(tmp_path: Path) -> None:
    """On a CPU nothing is moved; bands of the autoencoder and split guidance change roundings alone."""
    assert main(["generate", "a moon", "--out", "a.png", *FAST]) == 0
    assert main(["generate", "a moon", "--out", "b.png", "--split-guidance", *FAST]) == 0
    assert main(["generate", "a moon", "--out", "c.png", "--low-memory", *FAST]) == 0
    a, b, c = (
        torch.frombuffer(bytearray(Image.open(tmp_path / name).tobytes()), dtype=torch.uint8).float()
        for name in ("a.png", "b.png", "c.png")
    )
    assert (a - b).abs().max() <= 1
    assert (a - c).abs().max() <= 1


def test_pndm_is_that_of_stable_diffusion(demo: Any) -> None:
    config = demo.scheduler
    try:
        assert main(["generate", "a moon", "--scheduler", "pndm", *FAST]) == 0
    finally:
        demo.scheduler = config
    assert read_metadata(Path("a-moon-0.png"))["scheduler"] == "PNDMScheduler"


def test_a_scheduler_of_trailing_steps(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = demo.scheduler
    assert main(["generate", "a moon", "--scheduler", "dpm++-single", "--timestep-spacing", "trailing", *FAST]) == 2
    assert "DPMSolverSinglestepScheduler has no timestep spacing, got --timestep-spacing trailing" in capsys.readouterr().err
    try:
        assert main(["generate", "a moon", "--scheduler", "euler", "--timestep-spacing", "trailing", *FAST]) == 0
        assert demo.scheduler.config.timestep_spacing == "trailing"
    finally:
        demo.scheduler = config
    assert read_metadata(Path("a-moon-0.png"))["scheduler"] == "EulerDiscreteScheduler"


@pytest.mark.parametrize(("command", "names"), [("plan", tuple(MODELS)), ("generate", (*method_names(), *SCHEDULERS))])
@pytest.mark.parametrize("columns", [80, 100])
def test_names_in_the_help_are_whole_and_lines_short(
    command: str, names: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    words = {word.strip(",") for line in lines for word in line.split()}
    assert set(names) <= words


def test_a_picture_of_any_size_is_enlarged_about_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice 50 x 101 are no multiples of 8."""
    Image.new("RGB", (101, 50), (20, 30, 60)).save(tmp_path / "photo.png")
    assert main(["upscale", "photo.png", "a moon", "--steps", "1", "--out", "x.png", "--quiet"]) == 0
    assert "50 x 101 -> 96 x 192" in capsys.readouterr().err
