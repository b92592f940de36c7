"""Models of published size: their numbers of parameters, plans of every one, and attention by formula against what torch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.fitting import fitting_model_size
from scalediff.cascade.memory import estimate_model
from scalediff.cost.flops import _attention_flops, _count_flops, _on_meta, attention_work, count
from scalediff.cost.models import MODELS, TEXT_ENCODERS, built
from scalediff.families import family_of
from scalediff.patch import patch_model
from scalediff.settings import Attention

diffusers = pytest.importorskip("diffusers", reason="the models are diffusers' classes")

GIB = 2**30
# Billions of parameters, as the model cards and papers round them.
PUBLISHED = {
    "sdxl": 2.6, "flux": 12, "sd3.5-large": 8.1, "flux2": 32, "chroma": 8.9, "qwen-image": 20, "z-image": 6, "lumina2": 2.6,
    "lumina-next": 2, "pixart-sigma": 0.6, "cogview4": 6, "ovis-image": 7,
}  # fmt: skip
SPECIMENS = {
    "sd3.5-large": "SD3", "flux2": "FLUX.2", "chroma": "Chroma", "qwen-image": "Qwen-Image", "z-image": "Z-Image", "lumina2": "Lumina 2",
    "lumina-next": "Lumina-Next", "pixart-sigma": "PixArt", "cogview4": "CogView4", "ovis-image": "Ovis-Image",
}  # fmt: skip


@pytest.mark.parametrize("attention", ["npa", "full"])
@pytest.mark.parametrize("name", SPECIMENS.values())
def test_attention_of_every_family_is_what_torch_counts(name: str, attention: Attention) -> None:
    """Self-attention over windows or all, text among itself, and cross-attention, on a grid that is not square."""
    specimen = ZOO[name]
    model = specimen.build().to("meta")
    drawn = specimen.inputs(Draw(0), (12, 8), 1)
    inputs = {key: value if key.endswith("ids") else _on_meta(value) for key, value in drawn.items()}  # ids are read
    family = family_of(model)
    assert family is not None
    with patch_model(model, window=WINDOW) as handle:
        handle.attention = attention
        counted = _attention_flops(_count_flops(lambda: model(**inputs)))
        native = handle.window
    assert native is not None
    told = attention_work(model, inputs, attention=attention, native=native)
    assert sum(told) == pytest.approx(counted, rel=1e-12)


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
    """Two stages, of which the second has windows and four times the tokens."""
    settings, (base, last) = count(name, (2048, 2048))
    assert (base.steps, last.steps) == (settings.steps, settings.stage_steps)
    assert base.total > 0
    assert 3.5 < (last.linear / last.passes) / (base.linear / base.passes) < 4.1
    assert 2.5 < (last.attention / last.passes) / (base.attention / base.passes) < 6
    peaks = list(estimate_model(name, (2048, 2048)).peaks().values())
    assert peaks == sorted(peaks, reverse=True)
    weights = sum(x.numel() for part in built(MODELS[name]) for x in part.parameters())
    assert peaks[0] > 2 * (weights + sum(TEXT_ENCODERS[text] for text in MODELS[name].texts))


def test_positions_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="SD3Transformer2DModel has positions for at most 3072 x 3072 pixels, got 4096 x 4096"):
        estimate_model("sd3.5-large", (4096, 4096))


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
