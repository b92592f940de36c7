"""What the command says of a model that cannot be loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from scalediff.command.cli import main

diffusers = pytest.importorskip("diffusers")


def test_a_model_that_the_hub_refuses_says_what_the_hub_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.errors import GatedRepoError

    text = "403 Client Error. (Request ID: 1)\n\nCannot access gated repo for url x.\nAccess to model some/model is restricted."
    refusal = GatedRepoError(text, response=SimpleNamespace(headers={}, request=None))
    refusal.__cause__ = RuntimeError("Client error '403 Forbidden'")

    def load(*_: Any, **__: Any) -> None:
        raise OSError("Cannot load model: look at the stacktrace above") from refusal

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    assert main(["generate", "a moon", "--size", "128", "--model", "some/model"]) == 2
    said = "the hub does not give it: Cannot access gated repo for url x. Access to model some/model is restricted.\n"
    assert capsys.readouterr().err.endswith(f"got 'some/model': {said}")


def test_a_model_that_cannot_be_imported_says_the_cause(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to import (look up to see its traceback)") from ImportError("operator torchvision::nms does not exist")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    assert main(["generate", "a moon", "--size", "128", "--model", "some/model"]) == 2
    assert capsys.readouterr().err.endswith("got 'some/model': operator torchvision::nms does not exist\n")
