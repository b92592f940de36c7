"""Options that the command refuses before it draws: values that are none, and options without effect."""

from __future__ import annotations

import pytest

from scalediff.command import drawing
from scalediff.command.cli import main


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("generate", option) for option in ("--workdir", "--out", "--prompts", "--upsampler")),
        *(("upscale", option) for option in ("--workdir", "--out", "--mask", "FILE")),
        ("web", "--out"),
        ("info", "FILE"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    subject = {"generate": ["a moon"], "upscale": ["photo.png", "a moon"]}.get(command, [])
    line = ["", *subject[1:]] if option == "FILE" else [*subject, option, ""]
    with pytest.raises(SystemExit) as stop:
        main([command, *line])
    assert stop.value.code == 2
    assert f"argument {option}: must be the path of a file or folder, got an empty text" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-lfm", "--lfm-cutoff", "0.2"], "--lfm-cutoff has no effect with --no-lfm: leave it out, got 0.2"),
        (["--no-sg", "--sg-cutoff", "0.2,0.1"], "--sg-cutoff has no effect with --no-sg: leave it out, got (0.2, 0.1)"),
        (["--no-sg", "--sg-cutoff-start", "0.5"], "--sg-cutoff-start has no effect with --no-sg: leave it out, got 0.5"),
        (["--no-sg", "--anchor", "trajectory"], "--anchor has no effect with --no-sg: leave it out, got trajectory"),
        (["--no-lfm", "--no-sg", "--filter", "gaussian"], "--filter has no effect with --no-lfm and --no-sg: leave it out, got gaussian"),
        (["--attention", "full", "--jitter", "random"], "--jitter has no effect with --attention full: leave it out, got random"),
    ],
)
@pytest.mark.parametrize("subject", [["generate", "a moon"], ["compare", "a moon"], ["upscale", "photo.png", "a moon"]])
def test_an_option_without_effect_is_refused(
    subject: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*subject, *arguments]) == 2
    assert capsys.readouterr().err == f"scalediff: error: {message}\n"


def test_options_that_have_an_effect_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter is that of the part that is left, and a preset's own values are not options."""
    monkeypatch.setattr(drawing, "load_pipeline", lambda options: pytest.fail("loaded"))
    for arguments in (["--no-lfm", "--filter", "gaussian"], ["--no-sg", "--lfm-cutoff", "0.2"], ["--no-lfm", "--no-sg"]):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            main(["generate", "a moon", *arguments])
