"""Named settings: which a model has, what else they bring along, and what a scheduler must be for them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import scalediff
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.pipeline import cascade_of, family_with_cascade, named_preset, preset
from scalediff.settings import Settings
from tests.conftest import seeded
from tests.scalediff.cascade.prompted_pipelines import flux, quiet, sdxl, stable_diffusion
from tests.scalediff.cascade.test_pipelines import PIPELINES, built

diffusers = pytest.importorskip("diffusers")

BOAT = "a red boat"
NEGATIVE = "blurry, ugly, duplicate, poorly drawn, deformed, mosaic"
SUFFIX = ", highly detailed, 4k resolution, best quality"


def small_xl(spacing: str = "leading") -> Any:
    """Stable Diffusion XL, small, with a native size of 32 latents; below, a U-Net counts as one like the embedded model."""
    pipe = quiet(sdxl())
    pipe.unet.register_to_config(sample_size=32)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    return pipe


def dev() -> Any:
    """FLUX with an embedded guidance scale."""
    pipe = quiet(flux())
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True).eval()
    return pipe


class Encoded(Exception):
    """What `encode_prompt` was asked, instead of a picture."""


def asked(pipe: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> dict[str, Any]:
    """The first call of the pipeline's `encode_prompt`, by name."""

    def stop(*args: Any, **kwargs: Any) -> None:
        assert not args
        raise Encoded(kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", stop)
    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = (4 * side for side in scalediff.cascade.pipeline.native_size(pipe))
        with pytest.raises(Encoded) as found:
            scalediff.generate(pipe, how.pop("prompt", BOAT), height=height, width=width, **how)
    values: dict[str, Any] = found.value.args[0]
    return values


@pytest.mark.parametrize("name", PIPELINES)
def test_every_model_has_a_default(name: str) -> None:
    pipe, _ = built(name)
    assert preset(pipe) == named_preset(pipe, "default").settings
    for found in cascade_of(pipe).presets(pipe.unet if name == "SDXL" else pipe.transformer).values():
        assert found.source


@pytest.mark.parametrize(
    ("name", "names"),
    [("SD3", "default"), ("FLUX", "default"), ("Lumina 2", "default"), ("SDXL", "default, paper")],  # a small U-Net has the demo's
)
def test_a_name_that_a_model_does_not_have(name: str, names: str) -> None:
    pipe, arguments = built(name)
    kind = "UNet2DConditionModel" if name == "SDXL" else type(pipe.transformer).__name__
    with pytest.raises(ValueError, match=f"preset must be one of {names} for this {kind}, got 'fast'"):
        scalediff.generate(pipe, None, height=32, width=32, call=arguments, preset="fast")
    assert "turbo" not in names
    with pytest.raises(ValueError, match=f"preset must be one of {names} for this {kind}, got 'turbo'"):
        preset(pipe, "turbo")


def test_the_presets_of_the_papers_models() -> None:
    xl, other, flux_dev = small_xl(), quiet(stable_diffusion()), dev()
    other.unet.register_to_config(sample_size=64)
    for pipe, names in ((xl, ["default", "paper", "turbo", "lightning"]), (other, ["default"]), (flux_dev, ["default", "paper"])):
        assert list(cascade_of(pipe).presets(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)) == names
    published = Settings(steps=50, restart=0.4, guidance_scale=7.5, lfm_cutoff=0.125, sg_cutoff=0.125)
    assert preset(xl) == preset(xl, "paper") == preset(other) == published
    for name in ("default", "paper"):
        assert preset(flux_dev, name) == Settings(steps=30, restart=0.6, guidance_scale=3.5, lfm_cutoff=0.25, sg_cutoff=0.25)
    with pytest.raises(ValueError, match="preset must be one of default for this FluxTransformer2DModel, got 'paper'"):
        preset(quiet(flux()), "paper")  # schnell


def test_the_paper_has_a_negative_prompt_for_stable_diffusion_xl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller has none, as text or as embeddings."""
    pipe = small_xl()
    assert asked(pipe, monkeypatch)["negative_prompt"] is None
    assert asked(pipe, monkeypatch, preset="paper")["negative_prompt"] == NEGATIVE
    assert asked(pipe, monkeypatch, preset="paper", negative_prompt="fog")["negative_prompt"] == "fog"
    assert asked(pipe, monkeypatch, preset="paper", negative_prompt="")["negative_prompt"] == ""
    assert asked(pipe, monkeypatch, preset=preset(pipe, "paper"))["negative_prompt"] is None
    _, embeddings = built("SDXL")
    given = asked(pipe, monkeypatch, prompt=None, preset="paper", call=embeddings)
    assert given["negative_prompt"] is None
    assert given["negative_prompt_embeds"] is embeddings["negative_prompt_embeds"]
    both = asked(pipe, monkeypatch, prompt=[BOAT, BOAT], preset="paper")
    assert (both["prompt"], both["negative_prompt"]) == ([BOAT, BOAT], NEGATIVE)


def test_the_paper_adds_words_to_the_prompts_of_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, prompts = dev(), [BOAT, "a moon"]
    plain, paper, both = (
        asked(pipe, monkeypatch, **how) for how in (dict[str, Any](), {"preset": "paper"}, {"preset": "paper", "prompt": prompts})
    )
    assert (plain["prompt"], plain["max_sequence_length"]) == (BOAT, 512)
    assert (paper["prompt"], paper["max_sequence_length"]) == (BOAT + SUFFIX, 256)
    assert both["prompt"] == [BOAT + SUFFIX, "a moon" + SUFFIX]
    assert prompts == [BOAT, "a moon"]
    assert asked(pipe, monkeypatch, preset="paper", call={"max_sequence_length": 64})["max_sequence_length"] == 64
    _, embeddings = built("FLUX")
    assert asked(pipe, monkeypatch, prompt=None, preset="paper", call=embeddings)["prompt"] is None


@pytest.mark.parametrize("name", ["turbo", "lightning"])
def test_few_steps_are_for_trailing_timesteps(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"preset '{name}' needs a scheduler with timestep_spacing='trailing', got EulerDiscreteScheduler with spacing='leading'",
    ):
        scalediff.generate(small_xl(), BOAT, height=1024, width=1024, preset=name)
    pipe = small_xl("trailing")
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with scalediff.patch_model(pipe, window=(8, 8)):
        result = scalediff.generate(pipe, BOAT, height=256, width=256, generator=seeded(), preset=name)
    assert [(stage.height, stage.steps) for stage in result.stages] == [(64, 4), (128, 2), (256, 2)]
    assert batches == [1] * 8  # no guidance
    assert (result.settings.guidance_scale, result.settings.stage_steps) == (0.0, 2)
    assert result.images[0].size == (256, 256)


def test_a_model_that_the_cascade_does_not_know_has_none() -> None:
    with pytest.raises(
        ValueError,
        match=r"the cascade supports pipelines with one of .*Flux.*UNet2DConditionModel.*, got DiTTransformer2DModel: it draws classes",
    ):
        family_with_cascade(ZOO["DiT"].build())


def test_a_preset_is_a_beginning(demo: Any) -> None:
    """What is named beside it counts; Settings of one's own are taken as they are."""

    def drawn(**how: Any) -> tuple[Settings, Tensor]:
        result = scalediff.generate(demo, BOAT, height=80, width=80, generator=seeded(), **how)
        return result.settings, result.stages[-1].latents

    own = Settings(steps=2, restart=0.5, guidance_scale=2.0, sg=False)
    assert drawn(preset=own)[0] == own
    assert drawn(preset=own, steps=3, sg=True)[0] == Settings(steps=3, restart=0.5, guidance_scale=2.0)
    paper, numbers = drawn(preset="paper", steps=2), drawn(steps=2, restart=0.4, guidance_scale=7.5)
    assert paper[0] == numbers[0]
    assert paper[1].equal(numbers[1])
