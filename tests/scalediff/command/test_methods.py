"""`scalediff generate --method`: any method by its name, its options, and errors that name what it does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scalediff.cascade.metadata import read_metadata
from scalediff.command import loading
from scalediff.command.cli import main
from scalediff.command.method_options import method_object
from scalediff.methods import DemoFusion, MultiDiffusion

pytest.importorskip("PIL")
FAST = ["--steps", "2", "--quiet"]


@pytest.fixture(autouse=True)
def _loaded_once(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_demo", lambda: demo)


def test_a_method_by_name_with_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    run = ["generate", "a moon", "--size", "72", "--method", "multidiffusion", "--option", "stride=8", "--out", str(out)]
    assert main([*run, *FAST]) == 0
    said = capsys.readouterr().err
    assert "72 x 72, seed 0" in said
    assert "no estimate for multidiffusion" in said
    told = read_metadata(out)
    assert (told["method"], told["options"], told["stage"]) == ("multidiffusion", {"stride": 8, "view_batch": 1}, "1/1")


def test_stages_of_a_method_are_saved(tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert main(["generate", "a moon", "--size", "96", "--method", "super-resolution", "--out", str(out), *FAST]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.png", "x.stage1-64x64.png"]
    assert read_metadata(out)["options"] == {"upsampler": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "direct", "--option", "stride=8"], "--method direct has no options, got --option stride=8"),
        (
            ["--method", "multidiffusion", "--option", "blur_std=1"],
            "--method multidiffusion has the options stride, view_batch, got --option blur_std=1",
        ),
        (
            ["--method", "super-resolution", "--option", "upsampler=demo"],
            "--method super-resolution takes its upsampler from --upsampler, got --option upsampler=demo",
        ),
        (["--method", "direct", "--upsampler", "demo"], "--method direct does not support --upsampler"),
        (["--method", "demofusion", "--option", "jitter"], "--option must be NAME=VALUE, got 'jitter'"),
        (
            ["--method", "demofusion", "--option", "blur_std=1", "--option", "blur-std=0.5"],
            "--option blur_std of --method demofusion must be given once, got blur-std=0.5 as well",
        ),
        (["--method", "demofusion", "--option", "blur-std=-1"], "blur_std must be positive, got blur_std=-1"),
        (["--method", "demofusion", "--option", "jitter=some"], "jitter must be True or False, got jitter='some'"),
        (["--option", "stride=8"], "--option is for methods other than scalediff, which has options by name, got stride=8"),
        (
            ["--method", "demofusion", "--restart", "0.5", "--no-sg", "--low-memory"],
            "--method demofusion does not support --restart, --sg, --low-memory",
        ),
        (["--method", "demofusion", "--sizes", "64,128"], "--method demofusion does not support --sizes"),
        (["--method", "demofusion", "--tile", "xy"], "--method demofusion does not support --tile"),
        (
            ["--method", "direct", "--compare"],
            "--compare is for --method scalediff; `scalediff compare` draws any methods, got --method direct",
        ),
        (["--method", "super-resolution", "--upsampler", "none.pth"], "upsampler must be an existing file, got none.pth"),
    ],
)
def test_what_a_method_does_not_have(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "a moon", "--size", "96", "--out", str(tmp_path / "x.png"), *arguments, *FAST]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_upsampler_from_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the file's network, one that repeats pixels."""
    from scalediff.cascade import upsampling

    network = upsampling.NetworkUpsampler(_Nearest(), 2, fingerprint="abc")
    monkeypatch.setattr(upsampling, "load_upsampler", lambda path: network)
    run = ["generate", "a moon", "--size", "128", "--upsampler", "folder/nearest.pth", "--out", str(tmp_path / "x.png"), *FAST]
    assert main([*run, "--method", "super-resolution"]) == 0
    told = read_metadata(tmp_path / "x.png")
    assert (told["upsampler"], told["options"]) == ("nearest.pth", {"upsampler": None})
    assert main([*run, "--method", "direct"]) == 2


class _Nearest:
    def to(self, device: Any) -> None: ...

    def __call__(self, x: Any) -> Any:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_values_of_options() -> None:
    assert method_object("multidiffusion", ["stride=none", "view-batch=4"]) == MultiDiffusion(stride=None, view_batch=4)
    found = method_object("demofusion", ["cosine_scale=3,1.5,1", "jitter=off", "blur_std=0.8"])
    assert found == DemoFusion(cosine_scale=(3, 1.5, 1), jitter=False, blur_std=0.8)
