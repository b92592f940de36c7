"""Models of published size: their numbers of parameters, plans of every one, and attention by formula against what torch runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.fitting import fitting_model_size
from scalediff.cascade.memory import estimate_model
from scalediff.cost import flops
from scalediff.cost.flops import _attention_flops, _count_flops, _on_meta, attention_work, count, fit_denoiser, native_rules
from scalediff.cost.models import MODELS, TEXT_ENCODERS, built
from scalediff.cost.stand_ins import runnable_on_meta
from scalediff.cost.tally import OneDevice
from scalediff.families import family_of
from scalediff.patch import patch_model
from scalediff.settings import Attention

diffusers = pytest.importorskip("diffusers", reason="the models are diffusers' classes")

GIB = 2**30
# Billions of parameters, as the model cards and papers round them.
PUBLISHED = {
    "sdxl": 2.6, "flux": 12, "sd3.5-large": 8.1, "flux2": 32, "chroma": 8.9, "qwen-image": 20, "z-image": 6, "lumina2": 2.6,
    "lumina-next": 2, "pixart-sigma": 0.6, "cogview4": 6, "ovis-image": 7,
    "bria-3.2": 4, "fibo": 8, "ernie-image": 8, "hidream-i1": 17, "hunyuan-dit": 1.5, "hunyuan-image": 17, "krea-2": 13, "longcat-image": 6,
    "nucleus-image": 17,
    "auraflow": 6.9,  # the card says 6.8, of an earlier version with fewer positions
    "prx": 1.2,  # the card says about 1.3
}  # fmt: skip
SPECIMENS = {
    "sd3.5-large": "SD3", "flux2": "FLUX.2", "chroma": "Chroma", "qwen-image": "Qwen-Image", "z-image": "Z-Image", "lumina2": "Lumina 2",
    "lumina-next": "Lumina-Next", "pixart-sigma": "PixArt", "cogview4": "CogView4", "ovis-image": "Ovis-Image",
    "auraflow": "AuraFlow", "bria-3.2": "Bria 3", "fibo": "Bria FIBO", "ernie-image": "ERNIE-Image", "hidream-i1": "HiDream-I1",
    "hunyuan-dit": "HunyuanDiT", "hunyuan-image": "HunyuanImage 2.1", "krea-2": "Krea 2", "longcat-image": "LongCat-Image",
    "nucleus-image": "NucleusMoE-Image", "prx": "PRX",
}  # fmt: skip


BESIDE = {"HunyuanDiT": 4 * 32 * 6}  # FLOPs that torch counts besides: the query of the pooled text
NATIVE = {"hunyuan-image": 2048, "prx": 512}  # pixels per side, where they are not 1024
MOE = {
    "HiDream-I1": {"num_routed_experts": 3, "num_activated_experts": 1},
    "NucleusMoE-Image": {"moe_enabled": True, "num_experts": 4, "moe_intermediate_dim": 8, "capacity_factors": [0.0, 2.0],
                         "dense_moe_strategy": "leave_first_block_dense"},
}  # fmt: skip


def of_meta(specimen: Any) -> dict[str, Any]:
    """Arguments of a pass over a grid that is not square; position ids are read, so they keep their values."""
    drawn = specimen.inputs(Draw(0), (12, 8), 1)
    return {key: value if key.endswith("ids") else _on_meta(value) for key, value in drawn.items()}


@pytest.mark.parametrize("attention", ["npa", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPECIMENS.values())
def test_attention_of_every_family_is_what_torch_counts(name: str, attention: Attention) -> None:
    """Self-attention over windows or all, text among itself, and cross-attention."""
    model, inputs = runnable_on_meta(ZOO[name].build().to("meta")), of_meta(ZOO[name])
    family = family_of(model)
    assert family is not None
    with patch_model(model, window=WINDOW) as handle:
        handle.attention = attention
        counted = _attention_flops(_count_flops(lambda: model(**inputs)))
        native = handle.window
    assert native is not None
    told = attention_work(model, inputs, attention=attention, native=native)
    assert sum(told) == pytest.approx(counted - BESIDE.get(name, 0) / 1e12, rel=1e-12)


@pytest.mark.parametrize("name", MOE)
def test_experts_are_counted_as_they_run(name: str) -> None:
    """On the meta device every expert gets as many tokens; on a CPU the values choose, and the work is the same."""
    specimen = ZOO[name]
    sized = dataclasses.replace(specimen, config=specimen.config | MOE[name])
    model, drawn = sized.build(), sized.inputs(Draw(0), (12, 8), 1)
    with torch.no_grad():  # parameters that the class leaves uninitialised
        for parameter in model.parameters():
            torch.nan_to_num_(parameter.clamp_(-1, 1))
    ran = layers_work(model, drawn)
    assert layers_work(runnable_on_meta(model.to("meta")), of_meta(sized)) == pytest.approx(ran, rel=1e-12)
    assert ran != pytest.approx(layers_work(specimen.build(), drawn), rel=1e-3), "the experts are counted"


def test_masks_of_pairs_of_tokens_are_not_computed() -> None:
    """Those of Chroma at 4096 pixels have 4 GiB; the mask of single tokens keeps its values."""
    model, inputs = runnable_on_meta(ZOO["Chroma"].build().to("meta")), of_meta(ZOO["Chroma"])
    tokens = inputs["img_ids"].shape[0] + inputs["txt_ids"].shape[0]
    sizes = list[tuple[str, int]]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend((x.device.type, x.numel()) for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dtype == torch.bool)
            return out

    with torch.no_grad(), OneDevice(), Watch():
        model(**inputs, attention_mask=torch.ones(1, tokens, dtype=torch.bool))
    assert ("meta", tokens**2) in sizes
    assert max(size for device, size in sizes if device == "cpu") <= tokens


def layers_work(model: Any, inputs: dict[str, Any]) -> float:
    """TFLOPs of a pass without its attention."""
    parts = _count_flops(lambda: model(**inputs))
    return sum(parts.values()) - _attention_flops(parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_number(name: str) -> None:
    with torch.device("meta"):
        denoiser: Any = MODELS[name].denoiser()
    billions = sum(x.numel() for x in denoiser.parameters()) / 1e9
    digits = 0 if PUBLISHED[name] >= 2 and PUBLISHED[name] == int(PUBLISHED[name]) else 1
    assert round(billions, digits) == PUBLISHED[name]
    assert all(text in TEXT_ENCODERS for text in MODELS[name].texts)


@pytest.mark.parametrize("name", [name if name == "pixart-sigma" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_every_model_has_a_plan(name: str) -> None:
    """Two stages, of which the second has windows and four times the tokens, or as many as the model has positions for."""
    (y, x), _ = native_rules(name)
    assert (y, x) == (NATIVE.get(name, 1024),) * 2
    size = (1536, 1536) if name == "auraflow" else (2 * y, 2 * x)
    settings, (base, last) = count(name, size)
    assert (base.height, last.height) == (y, size[0])
    assert (base.steps, last.steps) == (settings.steps, settings.stage_steps)
    assert base.total > 0
    times = (size[0] / y) ** 2
    text = {"fibo": 0.7, "hunyuan-image": 0.8}.get(name, 0.85)  # 2048 and 1128 tokens of text beside 4096 of the picture, which stay
    assert text * times < (last.linear / last.passes) / (base.linear / base.passes) < 1.03 * times
    assert 0.6 * times < (last.attention / last.passes) / (base.attention / base.passes) < 2.1 * times
    peaks = list(estimate_model(name, size).peaks().values())
    assert peaks == sorted(peaks, reverse=True)
    weights = sum(x.numel() for part in built(MODELS[name]) for x in part.parameters())
    assert peaks[0] > 2 * (weights + sum(TEXT_ENCODERS[text] for text in MODELS[name].texts))


def test_the_base_stage_has_full_attention_where_it_is_larger_than_the_native_area(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sides are rounded to 61 x 68 tokens, which are more than 64 x 64."""
    monkeypatch.setattr(flops, "layer_work", lambda *_: (0.0, 0.0))  # which takes seconds, and is the same
    monkeypatch.setattr(flops, "autoencoder_work", lambda *_, **__: 0.0)
    (base, last), (full_base, full_last) = (count("pixart-sigma", (1104, 1232), attention=how)[1] for how in ("npa", "full"))
    assert base.height * base.width > 1024**2
    assert base == full_base
    assert last.attention < full_last.attention


def test_a_denoiser_is_set_for_a_stage_as_the_cascade_does() -> None:
    """HiDream-I1 pads a picture that is not square to its longest sequence, which grows with the stage."""
    denoiser: Any = ZOO["HiDream-I1"].build()
    fit_denoiser(MODELS["hidream-i1"], denoiser, (2048, 1024))
    assert denoiser.max_seq == 128 * 64


def test_positions_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="SD3Transformer2DModel has positions for at most 3072 x 3072 pixels, got 4096 x 4096"):
        estimate_model("sd3.5-large", (4096, 4096))


def test_a_plan_has_a_largest_size_and_needs_no_memory_for_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 131072 x 131072 pixels, FLUX.1's alone would take 16 GiB."""
    for plan in (count, estimate_model):
        with pytest.raises(ValueError, match="a plan is for pictures of at most 131072 x 131072 pixels, got 131088 x 1024"):
            plan("flux", (131088, 1024))
    seen = list[bool]()
    monkeypatch.setattr(
        flops, "forward_work", lambda denoiser, inputs, **_: seen.append(inputs["sample"].is_meta) or flops.Forward(1, 1, 1, 1)
    )
    monkeypatch.setattr(flops, "autoencoder_work", lambda *_, **__: 0.0)
    count("sdxl", (2048, 2048))
    assert seen == [True, True]


def test_the_largest_size_that_fits() -> None:
    """It fits, and is not far below what does not."""
    options = {"tiled": True, "split": True, "offloaded": True}
    available = int(11 * GIB)
    fits = fitting_model_size("pixart-sigma", (16384, 8192), available, options)
    assert fits is not None
    assert fits[0] % 16 == fits[1] % 16 == 0
    assert abs(fits[0] / fits[1] - 2) < 0.02
    assert estimate_model("pixart-sigma", fits).peak(**options) <= available
    assert estimate_model("pixart-sigma", (16384, 8192)).peak(**options) > available
    assert fitting_model_size("pixart-sigma", (4096, 4096), GIB, options) is None
