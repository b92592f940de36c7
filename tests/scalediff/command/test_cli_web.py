"""`scalediff web`: what the command refuses before it serves anything."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from scalediff.command import commands
from scalediff.command.cli import main


@pytest.fixture
def _with_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks come before Gradio is imported."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name == "gradio" else name))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["web", *arguments]) == 2
    return capsys.readouterr().err


def test_without_gradio_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert error_of(capsys) == 'scalediff: error: the page needs Gradio: pip install "scalediff[web]"\n'


@pytest.mark.usefixtures("_with_gradio")
def test_a_port_in_use_is_refused_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "load_model", lambda *args, **named: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = error_of(capsys, "--port", str(port))
    assert f"the page needs a free address of this machine, got 127.0.0.1, port {port}: address already in use" in told


@pytest.mark.usefixtures("_with_gradio")
def test_a_file_is_no_folder_for_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"--out must be a folder, got the file {tmp_path / 'file'}" in error_of(capsys, "--out", str(tmp_path / "file"))


@pytest.mark.usefixtures("_with_gradio")
def test_a_pipeline_without_an_autoencoder_is_refused(
    demo: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = copy.copy(demo)  # the demo itself would keep an entry without autoencoder in its config
    without.vae = None
    monkeypatch.setattr(commands, "load_model", lambda *args, **named: without)
    assert "the pipeline must have an autoencoder" in error_of(capsys, "--port", "0")


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_is_a_number(capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit):
        main(["web", f"--port={port}"])
    assert f"a port must be an integer in [0, 65535], got {port!r}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_page_is_served_until_a_signal_and_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "scalediff.command.cli", "web", "--port", "0", "--out", str(tmp_path / "pictures")]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stderr is not None
    address = next(line.split()[0] for line in server.stderr if line.startswith("http://127.0.0.1:"))
    for _ in range(100):  # until the model is loaded and the page is made, connections wait
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert b"scalediff/viewer.js" in answer.read()
            break
        except OSError:
            time.sleep(0.1)
    assert list(tmp_path.glob("scalediff-web-*"))
    server.send_signal(number)
    assert server.wait(timeout=60) == code
    assert list(tmp_path.iterdir()) == []
