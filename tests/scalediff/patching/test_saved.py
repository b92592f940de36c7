"""What is saved, pickled or forgotten of a patched model: the model that it was."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import scalediff
from bench.models.zoo import ZOO
from tests.conftest import forward, state_of
from tests.scalediff.patching.test_composition import (
    GRID,
    assert_close,
    patch,
    plain_and_patched,
)
from tests.scalediff.patching.test_composition import _places_are_given_back as _places_are_given_back  # a fixture for every test here

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests


@pytest.mark.composes("saving", "network")
@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_a_patched_model_is_saved_as_its_original_class(name: str, tmp_path: Path) -> None:
    model, (plain, patched) = ZOO[name].build(), plain_and_patched(name)
    cls: Any = type(model)
    model.save_pretrained(tmp_path / "before")
    with patch(model):
        model.save_pretrained(tmp_path / "patched")
        loaded = cls.from_pretrained(tmp_path / "patched")
        assert torch.equal(ZOO[name].run(model, GRID), patched)
    assert type(loaded) is cls
    assert_close(ZOO[name].run(loaded, GRID), plain)  # the weights lie elsewhere in memory, and sums are taken in another order
    files = [{p.name: p.read_bytes() for p in (tmp_path / side).iterdir()} for side in ("before", "patched")]
    assert files[0] == files[1]


@pytest.mark.composes("saving", "cascade")
def test_a_patched_pipeline_is_saved_as_its_original_class(demo: Any, tmp_path: Path) -> None:
    cls, plain = type(demo), forward(demo.unet, (32, 24))
    demo.save_pretrained(tmp_path / "before")
    with scalediff.patch_model(demo):
        demo.save_pretrained(tmp_path / "patched")
    before, after = (json.loads((tmp_path / side / "model_index.json").read_text()) for side in ("before", "patched"))
    assert before == after
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "patched")
    assert type(loaded) is cls
    assert type(loaded.unet) is type(demo.unet)
    assert torch.equal(forward(loaded.unet, (32, 24)), plain)


def test_a_patched_transformer_goes_through_a_pickle_unpatched() -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    state, file = state_of(model), io.BytesIO()
    with patch(model):
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), patched)
        torch.save(model, file)
        twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), patched)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), *twins):
        assert state_of(twin) == state
        assert_close(ZOO["FLUX.1"].run(twin, GRID), plain)


def test_a_model_made_from_the_class_of_a_patched_one_is_a_model_of_its_own() -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    with patch(model):
        kind: Any = type(model)
        other = kind.from_config(model.config).eval()
        other.load_state_dict(model.state_dict())
    assert_close(ZOO["FLUX.1"].run(other, GRID), plain)
    with patch(other):
        assert_close(ZOO["FLUX.1"].run(other, GRID), patched)
        assert_close(ZOO["FLUX.1"].run(model, GRID), plain)
    assert_close(ZOO["FLUX.1"].run(other, GRID), plain)


@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_nothing_of_a_forgotten_model_is_alive(name: str) -> None:
    model = ZOO[name].build()
    handle = patch(model)
    ZOO[name].run(model, GRID)
    traces = [weakref.ref(x) for x in (model, handle, next(model.parameters()))]
    del handle, model
    gc.collect()
    assert [trace() for trace in traces] == [None] * 3
