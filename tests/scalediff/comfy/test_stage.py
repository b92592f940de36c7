"""A stage above the native size: its reference, its start in the schedule, structure guidance on the estimates."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.comfy.stage import Sampling, as_picture, guided, make_reference, run_stage, stage_steps
from scalediff.settings import Settings
from scalediff_kernels import low_pass
from tests.conftest import seeded
from tests.scalediff.comfy.host import StandIn

SETTINGS = Settings(steps=10, restart=0.4, lfm_cutoff=0.25, sg_cutoff=0.5)


def cond(seed: int) -> Any:
    return [[torch.randn(1, 7, 5, generator=seeded(seed)), {}]]


def sampling(steps: int = 10) -> Sampling:
    return Sampling(steps, 3.0, "euler", "simple", cond(1), cond(2), seed=5)


def latents(size: tuple[int, int] = (8, 6)) -> Tensor:
    return torch.randn(1, 4, *size, generator=seeded(3))


def noise_of_kind(name: str) -> Any:
    """A class of ComfyUI."""
    return getattr(importlib.import_module("comfy.model_sampling"), name)


def bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("lfm", [True, False])
def test_the_reference_mixes_both_ways_of_upsampling(host: StandIn, lfm: bool, frames: bool) -> None:
    """Z_RU + LP(Z_LU - Z_RU), the latents as nodes pass them."""
    vae, z = host.vae(frames=frames), latents()
    given = z[:, :, None] if frames else z
    reference = make_reference(vae, given, (14, 11), Settings(lfm=lfm, lfm_cutoff=0.25))
    pixels = host.vae().decode(z).movedim(-1, 1)
    z_ru = host.vae().encode(bicubic(pixels, (14 * 8, 11 * 8)).movedim(1, -1))
    expected = z_ru + low_pass(bicubic(z, (14, 11)) - z_ru, cutoff=0.25) if lfm else z_ru
    assert reference.shape == ((1, 4, 1, 14, 11) if frames else (1, 4, 14, 11))
    assert (reference.reshape(expected.shape) - expected).abs().max() < 2e-6 * expected.abs().max()
    assert vae.calls == ["decode", "encode"]


@pytest.mark.parametrize(
    ("kind", "gammas"), [("EPS", [1.0, (0.25 / 1.25) / (4 / 5)]), ("CONST", [2.0, 0.5])], ids=["diffusion", "flow"]
)  # fmt: skip
def test_guidance_moves_the_estimate_in_the_latents_of_the_model(host: StandIn, kind: str, gammas: list[float]) -> None:
    """x0 + gamma LP(reference - x0), after classifier-free guidance; the paper's gamma by the kind of the noise."""
    model = host.specimen("FLUX").model()
    model.add_object_patch("model_sampling", noise_of_kind(kind)())
    reference, x0 = latents(), torch.randn(2, 4, 8, 6, generator=seeded(4), dtype=torch.float64)
    clone = guided(model, reference, SETTINGS, restart=2.0)
    assert "sampler_post_cfg_function" not in model.model_options
    (guide,) = clone.model_options["sampler_post_cfg_function"]
    target = model.model.process_latent_in(reference).double()
    for sigma, gamma in zip((2.0, 0.5), gammas, strict=True):
        out = guide({"denoised": x0, "sigma": torch.tensor([sigma, sigma])})
        expected = x0 + gamma * low_pass(target - x0, cutoff=0.5)
        assert (out - expected).abs().max() < 1e-12
        assert torch.equal(guide({"denoised": x0[:, :, None], "sigma": torch.tensor([sigma])}), out[:, :, None])


def test_earlier_functions_after_guidance_are_kept(host: StandIn) -> None:
    model = host.specimen("FLUX").model()
    model.set_model_sampler_post_cfg_function(print)
    functions = guided(model, latents(), SETTINGS, restart=1.0).model_options["sampler_post_cfg_function"]
    assert (len(functions), functions[0]) == (2, print)


def test_noise_of_another_kind_is_an_error(host: StandIn) -> None:
    model = host.specimen("FLUX").model()
    model.add_object_patch("model_sampling", type("COSMOS_RFLOW", (), {})())
    message = "structure guidance supports models with the noise of diffusion or of a flow, got COSMOS_RFLOW with COSMOS_RFLOW"
    with pytest.raises(NotImplementedError, match=message):
        guided(model, latents(), SETTINGS, restart=1.0)
    model.add_object_patch("model_sampling", type("IMG_TO_IMG", (noise_of_kind("EPS"),), {})())
    with pytest.raises(NotImplementedError, match="got IMG_TO_IMG with EPS, IMG_TO_IMG"):
        guided(model, latents(), SETTINGS, restart=1.0)


@pytest.mark.parametrize(("restart", "steps"), [(0.4, 4), (0.01, 1), (1.0, 10)])
def test_a_stage_runs_the_last_steps_of_the_whole_schedule(host: StandIn, restart: float, steps: int) -> None:
    model, seen = host.specimen("FLUX").model(dtype=torch.float32), list[float]()
    sigmas = sampling().sigmas(model)
    assert stage_steps(sigmas, Settings(restart=restart)) == steps

    def watched(args: Mapping[str, Any]) -> Tensor:
        seen.append(float(args["sigma"].max()))
        denoised: Tensor = args["denoised"]
        return denoised

    model.set_model_sampler_post_cfg_function(watched)
    settings = Settings(restart=restart, lfm_cutoff=0.5, sg_cutoff=0.5)
    out = run_stage(model, host.vae(), {"samples": latents((16, 16))}, (20, 18), settings, sampling(), callback=lambda *_: None)
    assert out["samples"].shape == (1, 4, 20, 18)
    assert seen == sigmas[-steps - 1 : -1].tolist()


def test_guidance_can_be_turned_off(host: StandIn) -> None:
    model, vae = host.specimen("FLUX").model(dtype=torch.float32), host.vae()
    settings, latent = Settings(restart=0.4, lfm_cutoff=0.5, sg_cutoff=0.5), {"samples": latents((16, 16))}
    outs = [run_stage(model, vae, latent, (20, 18), replace(settings, sg=sg), sampling(), callback=lambda *_: None) for sg in (True, False)]
    plain = make_reference(vae, latents((16, 16)), (20, 18), settings)
    started = sampling().run(model, {"samples": plain}, start=6, callback=lambda *_: None)
    assert torch.equal(outs[1]["samples"], started)
    assert not torch.equal(outs[0]["samples"], started)


def test_what_belongs_to_a_latent_is_kept(host: StandIn) -> None:
    """`batch_index`, the number of a picture in an earlier batch, chooses its noise; `noise_mask` keeps a part of the reference."""
    model, vae = host.specimen("FLUX").model(dtype=torch.float32), host.vae()
    settings = Settings(restart=0.4, lfm=False, sg=False)
    seen: list[Any] = []

    def noises(latent: dict[str, Any]) -> Tensor:
        out = run_stage(model, vae, latent, (20, 18), settings, sampling(), callback=lambda *step: seen.append(step))
        assert out.keys() == latent.keys()
        return out["samples"]

    one, two = latents((16, 16)), latents((16, 16)).expand(2, -1, -1, -1)
    batch = noises({"samples": two})
    largest = batch.abs().max()
    assert (noises({"samples": one, "batch_index": [1]})[0] - batch[1]).abs().max() < 1e-5 * largest
    assert (noises({"samples": one})[0] - batch[1]).abs().max() > 1e-3 * largest
    reference = make_reference(vae, one, (20, 18), settings)
    masked = noises({"samples": one, "noise_mask": torch.zeros(1, 160, 144)})
    assert (masked - reference).abs().max() < 1e-5 * reference.abs().max()


def test_a_vae_that_does_not_fit_is_an_error(host: StandIn) -> None:
    vae = host.vae()
    vae.spacial_compression_decode = lambda: 16
    message = r"the VAE does not fit the model: it must have 16 pixels per latent, got \(32, 24\) for \(16, 12\)"
    with pytest.raises(ValueError, match=message):
        make_reference(vae, latents(), (16, 12), SETTINGS)


def test_a_vae_that_overflows_is_an_error(host: StandIn) -> None:
    vae = host.vae()
    vae.encode = lambda pixels: torch.full((1, 4, 16, 12), torch.inf)
    with pytest.raises(ValueError, match="the VAE overflows in 16 bit: start ComfyUI with --fp32-vae or --bf16-vae"):
        make_reference(vae, latents(), (16, 12), SETTINGS)


def test_videos_are_an_error() -> None:
    message = r"ScaleDiff draws pictures, not videos: latents must have one frame, got \(1, 4, 3, 8, 8\)"
    with pytest.raises(NotImplementedError, match=message):
        as_picture(torch.zeros(1, 4, 3, 8, 8))
