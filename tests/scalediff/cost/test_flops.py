"""The counted work: attention's formulas against what torch runs, with windows and without, at true size."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scalediff.cascade import memory
from scalediff.cascade.memory import Estimate, estimate_model
from scalediff.command import commands
from scalediff.command.cli import main
from scalediff.cost import flops
from scalediff.cost.flops import Work, _attention_flops, _count_flops, attention_work, count, forward_work, layer_work
from scalediff.cost.models import MODELS
from scalediff.patch import patch_model
from scalediff.settings import Attention, Settings
from scalediff_kernels.neighborhood.api import TextQueries

diffusers = pytest.importorskip("diffusers", reason="the models are diffusers' classes")


def counted_attention(denoiser: Any, inputs: dict[str, Any], *, attention: Attention, text_queries: TextQueries = "window") -> float:
    """TFLOPs of the attention that torch runs in a patched pass, window by window; position ids are read, so not on the meta device."""
    with patch_model(denoiser, text_queries=text_queries) as handle:
        handle.attention = attention
        return _attention_flops(_count_flops(lambda: denoiser(**inputs)))


@pytest.fixture(scope="module", autouse=True)
def _models_are_built_once() -> Iterator[None]:
    once = functools.cache(flops.built)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flops, "built", once)
        patched.setattr(memory, "built", lambda model: copy.deepcopy(once(model)))  # it casts what it gets
        yield


@pytest.fixture(scope="module")
def sdxl() -> tuple[Any, dict[str, Any]]:
    """The U-Net at its true size, and inputs of a grid that is not square."""
    with torch.device("meta"):
        return flops.built(MODELS["sdxl"])[0], MODELS["sdxl"].inputs(256, 192)


@pytest.mark.parametrize("attention", ["npa", "full"])
@pytest.mark.parametrize("layers", [(1, 1, 2), pytest.param((1, 2, 10), marks=pytest.mark.slow)], ids=["few layers", "all layers"])
def test_attention_of_sdxl_is_what_torch_counts(sdxl: tuple[Any, dict[str, Any]], layers: tuple[int, ...], attention: Attention) -> None:
    """Self-attention at two levels, over windows or all, and cross-attention to 77 tokens."""
    with torch.device("meta"):
        unet = type(sdxl[0]).from_config(dict(sdxl[0].config) | {"transformer_layers_per_block": layers})
    inputs = sdxl[1]
    attended, cross = attention_work(unet, inputs, attention=attention)
    blocks = {1: 5 * layers[1], 2: 6 * layers[2]}  # by level: a quarter of the tokens and twice the channels each
    assert cross == pytest.approx(sum(n * 4 * (256 * 192 // 4**k) * 77 * 640 * k for k, n in blocks.items()) / 1e12, rel=1e-12)
    assert attended + cross == pytest.approx(counted_attention(unet, inputs, attention=attention), rel=1e-12)


def test_linear_layers_of_sdxl_are_most_of_its_layers(sdxl: tuple[Any, dict[str, Any]]) -> None:
    linear, convolution = layer_work(*sdxl)
    assert linear > convolution > 0


@pytest.mark.parametrize(("attention", "text_queries"), [("npa", "window"), ("npa", "global"), ("full", "window")])
def test_attention_of_flux_is_what_torch_counts(attention: Attention, text_queries: TextQueries) -> None:
    """One block of each kind, at true width and size: 2048 x 1536 pixels."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        inputs = MODELS["flux"].inputs(256, 192)
    attended, cross = attention_work(transformer, inputs, attention=attention, text_queries=text_queries)
    counted = counted_attention(transformer, inputs, attention=attention, text_queries=text_queries)
    assert (attended, cross) == (pytest.approx(counted, rel=1e-12), 0)


@pytest.mark.parametrize("latent", [(128, 128), (64, 256)])
def test_up_to_the_native_area_windows_change_nothing(latent: tuple[int, int]) -> None:
    """Nor do the rules for text: the hook lets such passes through."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        inputs = MODELS["flux"].inputs(*latent)
    full = forward_work(transformer, inputs, attention="full")
    assert forward_work(transformer, inputs, attention="npa") == full
    assert full.attention == pytest.approx(counted_attention(transformer, inputs, attention="npa"), rel=1e-12)


def test_a_plan_adds_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    once = functools.cache(count)  # for the table and for JSON
    monkeypatch.setattr(commands, "count", once)
    monkeypatch.setattr(commands, "estimate_model", functools.cache(estimate_model))
    settings, (base,) = once("sdxl", (1024, 1024), attention="npa")
    assert (base.steps, base.passes, settings.steps) == (50, 100, 50)
    assert base.total == pytest.approx(base.attention + base.linear + base.convolution + base.vae)
    assert main(["plan", "--size", "1024"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:5] == ["1024", "x", "1024", "50", "100"]
    (share,) = (line.split() for line in table if line.split()[0] == "share")
    assert share[-1] == "100.0%"
    assert table[-5].startswith("estimated GPU memory in bf16")
    assert [line.split()[1] for line in table[-4:]] == ["GiB"] * 4
    assert main(["plan", "--size", "1024", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "TFLOP"
    assert told["stages"][0]["total"] == pytest.approx(base.total)
    for share in (told["share"], told["stages"][0]["share"]):
        assert share["attention"] == pytest.approx(base.attention / base.total)
    peaks = list(told["memory"]["peak"].values())
    assert peaks == sorted(peaks, reverse=True)
    assert 6e9 < peaks[-1] < peaks[0] < 12e9, "5 GB of U-Net and more"


def test_a_plan_says_what_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the memory that is named; where nothing does, the largest size that would."""
    monkeypatch.setattr(commands, "count", lambda *args, **how: (Settings(), [Work(4096, 4096, 50, 100, 1.0, 1.0, 1.0, 1.0)]))
    weights = {"denoiser": 10 * 2**30, "vae": 2**30}
    needs = Estimate(weights, denoiser=4 * 2**30, halves=2, vae=20 * 2**30, vae_tiled=2**30)
    monkeypatch.setattr(commands, "estimate_model", lambda name, size, total: needs)
    monkeypatch.setattr(
        commands, "fitting_model_size", lambda name, size, available, options: (2048, 1024) if all(options.values()) else None
    )
    assert main(["plan", "--size", "4096", "--memory", "17"]) == 0
    fits = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert fits == ["does not fit", "fits", "fits", "fits"]
    assert main(["plan", "--size", "4096", "--memory", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.rpartition(": ")[2] for line in lines[:4]] == ["does not fit"] * 4
    assert lines[4] == "8.0 GiB are available: 2048 x 1024 would fit"
    assert main(["plan", "--size", "4096", "--memory", "8", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["available"], memory["fitting_size"]) == (8 * 2**30, [2048, 1024])
    for wrong in ("0", "much", "inf"):
        with pytest.raises(SystemExit):
            main(["plan", "--memory", wrong])
        assert f"GiB, got '{wrong}'" in capsys.readouterr().err


def test_the_memory_of_this_machines_gpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(commands, "total_bytes", lambda device: 24 * 2**30 if device.type == "cuda" else None)
    assert commands._planned_memory(None) == 24 * 2**30
    assert commands._planned_memory(12.5) == int(12.5 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert commands._planned_memory(None) is None


@pytest.mark.slow
def test_the_memory_of_true_models_is_what_the_project_aims_at() -> None:
    """SDXL at 4096 within 12 GB and at 8192 within 24 GB, FLUX at 4096 within 40 GB; weights by their published numbers."""
    weights = {}
    for name, size, parameters, goal in (("sdxl", 4096, 2.567e9, 12e9), ("sdxl", 8192, 2.567e9, 24e9), ("flux", 4096, 11.9e9, 40e9)):
        needs = estimate_model(name, (size, size))
        weights[name] = needs.weights
        assert needs.weights["denoiser"] == pytest.approx(2 * parameters, rel=0.01)
        assert min(needs.peaks().values()) < goal
        assert needs.peaks()["as it is"] > goal
    texts = [weights[name] for name in ("sdxl", "flux")]
    assert [texts[0][f"text_encoder_{i}"] for i in (0, 1)] == pytest.approx([2 * 123.1e6, 2 * 694.7e6], rel=0.01)
    assert texts[1]["text_encoder_1"] == pytest.approx(2 * 4.762e9, rel=0.01)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be one of sdxl, flux, .*, got 'dalle'"):
        estimate_model("dalle", (1024, 1024))


def test_unknown_models_and_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"model must be one of sdxl, flux, .*, got 'dalle'"):
        count("dalle", (1024, 1024))
    assert main(["plan", "--size", "512"]) == 2
    assert "at least the model's native 1024 x 1024" in capsys.readouterr().err


def test_flux_is_counted_too() -> None:
    """Text attends in every window under the authors' rule; the published figure is 28.6 to 31 PFLOP for 4096 x 4096."""
    _, rows = count("flux", (4096, 4096))
    assert [row.passes for row in rows] == [30, 18, 18]
    assert 28_000 < sum(row.total for row in rows) < 31_000
