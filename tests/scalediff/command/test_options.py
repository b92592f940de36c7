"""Options that the command refuses before it draws: values that are none, and options without effect."""

from __future__ import annotations

import pytest

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
