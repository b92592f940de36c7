"""MultiDiffusion refuses what is not linear in its views, draws noise or is tied to places, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import native_size
from scalediff.methods import MultiDiffusion
from scalediff.methods.views import INPUTS, Denoise
from tests.scalediff.cascade.test_pipelines import PIPELINES, built
from tests.scalediff.methods.test_multidiffusion import CUT, FREE, PROMPT, run

diffusers = pytest.importorskip("diffusers")


def test_options_out_of_range_are_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match=r"stride must be at least 1 latent, got stride=0"):
        MultiDiffusion(stride=0)
    with pytest.raises(ValueError, match=r"view_batch must be at least 1, got view_batch=0"):
        MultiDiffusion(view_batch=0)
    with pytest.raises(ValueError, match=r"at most the window's 16 latents and a multiple of a token's 1, got stride=17"):
        run(demo, (128, 128), {"prompt": PROMPT}, MultiDiffusion(stride=17))
    with pytest.raises(ValueError, match="must be at least the model's native 64 x 64, got height=32, width=64"):
        run(demo, (32, 64), {"prompt": PROMPT})
    pipe, arguments = built("SD3")
    with scalediff.patch_model(pipe, window=WINDOW), pytest.raises(ValueError, match="a multiple of a token's 2, got stride=3"):
        run(pipe, (32, 32), arguments, MultiDiffusion(stride=3))


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_schedulers_that_draw_noise_are_refused(demo: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "scheduler", getattr(diffusers, name)())
    with pytest.raises(NotImplementedError, match=f"MultiDiffusion needs a scheduler whose step is linear and adds no noise.* got {name}"):
        run(demo, (128, 128), {"prompt": PROMPT})


@pytest.mark.parametrize(
    ("scheduler", "more", "why"),
    [
        (("DDIMScheduler", {"clip_sample": True}), {}, "DDIMScheduler without clip_sample, got clip_sample=True"),
        (("DDIMScheduler", {"clip_sample": False}), {"eta": 0.5}, "call the pipeline with eta=0.0, got eta=0.5"),
        (("DDIMScheduler", {"clip_sample": False}), {"guidance_rescale": 0.7}, "guidance_rescale=0.0, got guidance_rescale=0.7"),
        (("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}), {}, r"got algorithm_type='sde-dpmsolver\+\+'"),
        (("UniPCMultistepScheduler", {"thresholding": True}), {}, "got thresholding=True"),
    ],
)
def test_steps_that_are_not_linear_are_refused(
    demo: Any, scheduler: tuple[str, dict[str, Any]], more: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "scheduler", getattr(diffusers, scheduler[0])(**scheduler[1]))
    with pytest.raises(NotImplementedError, match=why):
        run(demo, (128, 128), {"prompt": PROMPT, **more})
    run(demo, (64, 64), {"prompt": PROMPT})  # one view is the pipeline's own affair


def test_lumina_2_is_told_how_to_guide_linearly() -> None:
    pipe, arguments = built("Lumina 2")
    with scalediff.patch_model(pipe, window=WINDOW):
        with pytest.raises(NotImplementedError, match="call the pipeline with cfg_normalization=False, got cfg_normalization=True"):
            run(pipe, (32, 32), arguments)
        run(pipe, (32, 32), arguments | FREE["Lumina 2"])


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - set(CUT)))
def test_families_that_cannot_be_cut_are_refused(name: str) -> None:
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        names = ", ".join(sorted(INPUTS))
        with pytest.raises(NotImplementedError, match=f"MultiDiffusion supports {names}, got {type(pipe.transformer).__name__}"):
            run(pipe, (2 * native[0], native[1]), arguments)


def test_arguments_tied_to_places_are_refused(demo: Any) -> None:
    with pytest.raises(NotImplementedError, match="with some of the denoiser's arguments, got ip_adapter_masks"):
        run(demo, (128, 128), {"prompt": PROMPT, "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 32, 32)]}})
    given = {"sample": torch.ones(1, 4, 8, 8), "timestep": 1, "mid_block_additional_residual": torch.ones(1)}
    with pytest.raises(NotImplementedError, match="with some of the denoiser's arguments, got mid_block_additional_residual"):
        Denoise(demo.unet, given, INPUTS["UNet2DConditionModel"], size=(8, 8), patch=1, view_batch=1)
