"""Pictures to change: patched image-to-image and inpainting pipelines above their native size, and masks at every stage."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.inputs import ids
from bench.models.zoo import WINDOW
from scalediff.cascade.latents import encode, pack, unpack, unpacked
from scalediff.cascade.pipeline import native_size
from scalediff.cascade.progress import Step
from scalediff.settings import Settings
from scalediff_kernels import low_pass
from tests.conftest import seeded
from tests.scalediff.cascade.changing_pipelines import (
    BY_FAMILY,
    CHANGED,
    INPAINTED,
    WITH_MASK,
    WITHOUT_SIZE,
    as_tensor,
    changing,
    conditioned_on_the_picture,
    right_half,
)  # fmt: skip
from tests.scalediff.cascade.prompted_pipelines import picture_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:.*were passed to UNet2DConditionModel.*")


def call(pipe: Any, arguments: dict[str, Any], size: tuple[int, int], picture: Any, **more: Any) -> Tensor:
    """The pipeline's own call, with the right half as the mask where it takes one."""
    name = type(pipe).__name__
    given: dict[str, Any] = {"image": picture, "num_inference_steps": 5, "output_type": "latent", "generator": seeded()}
    given |= {} if name in WITHOUT_SIZE else {"height": size[0], "width": size[1]}
    given |= {"mask_image": right_half(size)} if name in WITH_MASK else {}
    latents: Tensor = pipe(**{**arguments, **given, **more}).images
    return latents


@pytest.mark.composes("image-to-image", "cascade")
@pytest.mark.composes("inpainting", "cascade")
@pytest.mark.draws("image-to-image", CHANGED, switch="pipeline's own call")
@pytest.mark.draws("inpainting", INPAINTED, switch="pipeline's own call")
@pytest.mark.parametrize("name", BY_FAMILY)
def test_every_pipeline_changes_a_picture_above_its_native_size(name: str) -> None:
    """With a base stage, with the same bits for one seed, and untouched at the native size; outside the mask the picture is kept."""
    pipe, arguments = changing(name)
    window = WINDOW if not hasattr(pipe, "unet") else None
    with scalediff.patch_model(pipe, window=window) as handle:
        assert handle.report.call == f"{name} runs the cascade above the native size, from its picture at its strength"
        native = native_size(pipe)
        target = 2 * native[0], 2 * native[1]
        picture, small = picture_of(target), picture_of(native)
        how = {"strength": 0.8, "num_inference_steps": 3}
        plain = call(pipe, arguments, native, small, **how)
        scheduler, attributes = pipe.scheduler, sorted(pipe.__dict__)
        first, second = (call(pipe, arguments, target, picture, **how) for _ in range(2))
        assert pipe.scheduler is scheduler
        assert sorted(pipe.__dict__) == attributes
        assert torch.equal(first, second)
        latents = unpacked(pipe, first, target)
        assert latents.isfinite().all()
        if name in WITH_MASK:
            kept = encode(pipe, as_tensor(picture))
            half = kept.shape[-1] // 2
            torch.testing.assert_close(latents[..., :half], kept[..., :half], rtol=1e-5, atol=1e-5)
            assert (latents - kept)[..., half:].abs().max() > 0.1
    assert torch.equal(call(pipe, arguments, native, small, **how), plain)


@torch.no_grad()
def flux_inpainting_by_hand(pipe: Any, arguments: dict[str, Any], picture: Tensor) -> Tensor:
    """FLUX from a picture of 32 pixels: 4 of 5 Euler steps at 16 pixels, then 3 at 32, keeping the left half. No scheduler, no pipeline."""
    rng, steps, cutoff = seeded(), 5, 0.25
    mu = torch.tensor(0.5 + (16 - 4) * (1.15 - 0.5) / (64 - 4)).double()  # of the 16 tokens of the base, at every size
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = [*(mu.exp() / (mu.exp() + (1 / even - 1))).tolist(), 0.0]

    def noise(side: int) -> Tensor:
        return torch.randn(1, 4, side, side, generator=rng).double()

    def encoded(pixels: Tensor) -> Tensor:
        return (pipe.vae.encode(pixels).latent_dist.mean - 0.1) * 0.4  # type: ignore[no-any-return]

    def blend(x: Tensor, z: Tensor, n: Tensor, sigma: float) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([((1 - sigma) * z + sigma * n)[..., :half], x[..., half:]], dim=-1)

    def denoise(x: Tensor, sigmas: list[float], z: Tensor, n: Tensor, reference: Tensor | None) -> Tensor:
        for now, after in itertools.pairwise(sigmas):
            v = pipe.transformer(
                hidden_states=pack(x), timestep=torch.tensor([now]).double(), encoder_hidden_states=arguments["prompt_embeds"].double(),
                pooled_projections=arguments["pooled_prompt_embeds"].double(), txt_ids=torch.zeros(6, 3),
                img_ids=ids((x.shape[2] // 2, x.shape[3] // 2)), return_dict=False,
            )[0]  # fmt: skip
            v = unpack(v, (x.shape[2], x.shape[3]))
            if reference is not None:
                x0 = x - now * v
                x0 = x0 + now * (low_pass(reference, cutoff=cutoff) - low_pass(x0, cutoff=cutoff))
                v = (x - x0) / now
            x = blend(x + (after - now) * v, z, n, after)
        return x

    z = encoded(F.interpolate(picture, size=(16, 16), mode="bicubic", antialias=True).clamp(-1, 1))
    noise(8)  # for the sample of the narrow posterior
    n = noise(8)
    base = denoise((1 - sigmas[1]) * z + sigmas[1] * n, sigmas[1:], z, n, None)
    noise(8)  # for that of the masked picture
    z_ru = encoded(F.interpolate(pipe.vae.decode(base / 0.4 + 0.1).sample, size=(32, 32), mode="bicubic"))
    z_lu = F.interpolate(base, size=(16, 16), mode="bicubic")
    z, n = encoded(picture), noise(16)
    reference = blend(z_ru - low_pass(z_ru, cutoff=cutoff) + low_pass(z_lu, cutoff=cutoff), z, n, 0.0)
    tail = sigmas[2:]
    return denoise((1 - tail[0]) * reference + tail[0] * n, tail, z, n, reference)


@pytest.mark.draws("inpainting", ["FLUX"], switch="loop by hand")
def test_flux_inpainting_is_the_hand_written_loop() -> None:
    """The base stage redraws the shrunk picture, since the strength is above the restart of 0.5."""
    pipe, arguments = changing("FluxInpaintPipeline")
    picture = picture_of((32, 32))
    with scalediff.patch_model(pipe, window=WINDOW):
        result = call(pipe, arguments, (32, 32), picture, strength=0.8, guidance_scale=0.0)
    pipe.to(torch.float64)
    with scalediff.patch_model(pipe.transformer, window=WINDOW):
        expected = flux_inpainting_by_hand(pipe, arguments, as_tensor(picture).double())
    torch.testing.assert_close(unpack(result, (16, 16)).double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def sdxl_by_hand(pipe: Any, arguments: dict[str, Any], picture: Tensor) -> Tensor:
    """SDXL from a picture of 16 pixels: 2 of 5 Euler steps at its own size, guided by it. No scheduler, no pipeline."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    every = ((1 - abar) / abar).sqrt()
    z = pipe.vae.encode(picture).latent_dist.mean * 0.4
    n = torch.randn(z.shape, generator=seeded()).double()
    times = [249.75, 0.0]  # of 999, 749.25, 499.5, 249.75, 0
    sigmas = [float(every[249] + 0.75 * (every[250] - every[249])), float(every[0]), 0.0]
    more = {"text_embeds": arguments["pooled_prompt_embeds"].double(), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).double()}
    x = z + sigmas[0] * n
    for t, (now, after) in zip(times, itertools.pairwise(sigmas), strict=True):
        eps = pipe.unet(
            x / (now**2 + 1) ** 0.5, torch.tensor(t).double(), encoder_hidden_states=arguments["prompt_embeds"].double(),
            added_cond_kwargs=more, return_dict=False,
        )[0]  # fmt: skip
        x0 = x - now * eps
        gamma = (now**2 / (1 + now**2)) / (sigmas[0] ** 2 / (1 + sigmas[0] ** 2))
        x0 = x0 + gamma * (low_pass(z, cutoff=0.5) - low_pass(x0, cutoff=0.5))
        x = x + (after - now) * (x - x0) / now
    return x


@pytest.mark.draws("image-to-image", ["SDXL"], switch="loop by hand")
def test_a_large_picture_at_a_small_strength_is_the_hand_written_loop() -> None:
    """It enters at the last stage: nothing of its detail goes through a smaller one."""
    pipe, arguments = changing("StableDiffusionXLImg2ImgPipeline")
    picture = picture_of((16, 16))
    how = {"steps": 5, "strength": 0.4, "restart": 0.5, "guidance_scale": 1.0, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
    result = scalediff.upscale(pipe, picture, None, height=16, width=16, call=arguments, generator=seeded(), **how)
    assert [(stage.height, stage.steps) for stage in result.stages] == [(16, 2)]
    pipe.to(torch.float64)
    with scalediff.patch_model(pipe.unet):
        expected = sdxl_by_hand(pipe, arguments, as_tensor(picture).double())
    torch.testing.assert_close(result.images and result.stages[-1].latents.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "strength", "stages"),
    [
        (12, 0.3, [(16, 3), (32, 4), (64, 4)]),  # smaller than native: enlarged for the base stage
        (16, None, [(32, 4), (64, 4)]),  # the picture is the base
        (16, 0.3, [(16, 3), (32, 4), (64, 4)]),  # no detail above the native size: a base stage, whatever the strength
        (16, 0.9, [(16, 9), (32, 4), (64, 4)]),
        (32, 0.3, [(64, 3)]),  # detail that a base stage would lose
        (32, 0.9, [(16, 9), (32, 4), (64, 4)]),
        (64, 0.4, [(64, 4)]),
        (64, 0.5, [(16, 5), (32, 4), (64, 4)]),
    ],
)
def test_where_the_cascade_enters(side: int, strength: float | None, stages: list[tuple[int, int]]) -> None:
    pipe, arguments = changing("FluxImg2ImgPipeline")
    chosen = Settings(steps=10, restart=0.4, guidance_scale=0.0, lfm_cutoff=0.5, sg_cutoff=0.5, attention="full")
    with scalediff.patch_model(pipe, window=WINDOW):
        result = scalediff.upscale(
            pipe, picture_of((side, side)), None, height=64, width=64, strength=strength, call=arguments, preset=chosen
        )
    assert [(stage.height, stage.steps) for stage in result.stages] == stages


def test_the_base_stage_is_the_pipelines_own_call() -> None:
    """Bit for bit, but for the rounding of the picture to the values between 0 and 1 that pipelines take."""
    pipe, arguments = changing("FluxImg2ImgPipeline")
    picture = picture_of((16, 16))
    with scalediff.patch_model(pipe, window=WINDOW):
        how = {"strength": 0.6, "steps": 5, "guidance_scale": 0.0}
        result = scalediff.upscale(pipe, picture, None, height=32, width=32, call=arguments, generator=seeded(), **how)
        own = call(pipe, arguments, (16, 16), picture, strength=0.6, guidance_scale=0.0)
    torch.testing.assert_close(result.stages[0].latents, unpack(own, (8, 8)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "StableDiffusionImg2ImgPipeline"])
def test_a_base_stage_with_a_strength_is_watched_at_its_noise_levels(name: str) -> None:
    """The estimate of its last step is its result: with another noise level it would not be."""
    pipe, arguments = changing(name)
    previews: list[list[Any]] = []

    def note(step: Step) -> None:
        previews.extend([step.preview()] if step.stage == 1 and step.step == step.steps else [])

    with scalediff.patch_model(pipe, window=WINDOW):
        side = native_size(pipe)[0]
        how = {"height": 2 * side, "width": 2 * side, "strength": 0.6, "steps": 5, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
        result = scalediff.upscale(
            pipe, picture_of((side, side)), None, call=arguments, generator=seeded(), guidance_scale=1.0, on_step=note, **how
        )
    (preview,) = previews
    assert result.stages[0].steps == 3
    assert np.abs(np.asarray(preview[0]).astype(int) - np.asarray(result.stages[0].images[0])).max() <= 1


@pytest.mark.parametrize("name", ["SDXL", "FluxInpaintPipeline", "StableDiffusionXLInpaintPipeline"])
def test_at_every_step_the_picture_is_kept_at_its_noise_level(name: str) -> None:
    """Outside the mask x = a z + s n with one noise n, whether the pipeline knows of masks or not."""
    pipe, arguments = built(name) if name == "SDXL" else changing(name)
    seen: list[tuple[Tensor, float, float]] = []

    def note(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        left = pipe.scheduler.levels[step + 1 :]
        level = (left[0].signal, left[0].noise) if left else (1.0, 0.0)
        seen.append((unpacked(pipe, values["latents"], size), *level))
        return values

    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        size = 2 * native[0], 2 * native[1]
        picture = picture_of(size)
        how = {"height": size[0], "width": size[1], "steps": 8, "restart": 0.5, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
        result = scalediff.upscale(
            pipe, picture, None, mask_image=right_half(size), call={**arguments, "callback_on_step_end": note}, generator=seeded(), **how
        )
    z = encode(pipe, as_tensor(picture))
    half = z.shape[-1] // 2
    noises = [((x - a * z) / s)[..., :half] for x, a, s in seen[:-1]]
    assert len(seen) == 4
    for one in noises[1:]:
        torch.testing.assert_close(one, noises[0], rtol=1e-3, atol=1e-3)
    assert 0.5 < noises[0].std() < 1.5
    torch.testing.assert_close(result.stages[-1].latents[..., :half], z[..., :half], rtol=1e-5, atol=1e-5)
    assert (result.stages[-1].latents - z)[..., half:].abs().max() > 0.05


def test_a_network_that_sees_the_mask_sees_it_at_the_size_of_the_stage() -> None:
    """Nine channels: latents, mask, masked picture. Its pipeline blends nothing; the stages keep the picture all the same."""
    pipe, arguments = conditioned_on_the_picture()
    seen: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    picture = picture_of((16, 16))
    with scalediff.patch_model(pipe):
        latents = call(pipe, arguments, (16, 16), picture, strength=1.0)
    assert {x.shape[-1] for x in seen} == {4, 8}
    for x in seen:
        side = x.shape[-1]
        assert torch.equal(x[:, 4], torch.cat([torch.zeros(side, side // 2), torch.ones(side, side // 2)], 1).expand(2, side, side))
    z = encode(pipe, as_tensor(picture))
    torch.testing.assert_close(latents[..., :4], z[..., :4], rtol=1e-5, atol=1e-5)
    masked = as_tensor(picture) * (torch.arange(16) < 8)
    torch.testing.assert_close(seen[-1][:1, 5:], encode(pipe, masked), rtol=1e-5, atol=1e-5)


def test_several_pictures() -> None:
    """Two prompts with a picture each, and two pictures of one prompt; every picture is drawn as it is alone."""
    pipe, arguments = changing("StableDiffusionXLInpaintPipeline")
    pictures, mask = [picture_of((16, 16), seed) for seed in (5, 6)], right_half((16, 16))
    both = {name: torch.cat([value, value]) for name, value in arguments.items()}
    generators = lambda: [seeded(1), seeded(2)]  # noqa: E731
    how = {"height": 16, "width": 16, "mask_image": mask, "strength": 0.9, "steps": 5, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
    two = scalediff.upscale(pipe, pictures, None, call=both, generator=generators(), **how).stages[-1].latents
    for i, picture in enumerate(pictures):
        alone = scalediff.upscale(pipe, picture, None, call=arguments, generator=[generators()[i]], **how).stages[-1].latents
        torch.testing.assert_close(two[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    with scalediff.patch_model(pipe):
        repeated = call(pipe, arguments, (16, 16), pictures[0], strength=0.3, num_images_per_prompt=2, generator=generators())
    assert repeated.shape[0] == 2
    assert not torch.equal(repeated[0], repeated[1])


def test_a_pipeline_made_from_another_upscales() -> None:
    pipe, arguments = built("FLUX")
    made = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    how = {"height": 32, "width": 32, "call": arguments, "steps": 5}
    with scalediff.patch_model(made, window=WINDOW):
        image, text = (scalediff.upscale(one, picture_of((16, 16)), None, generator=seeded(), **how) for one in (made, pipe))
    assert torch.equal(image.stages[-1].latents, text.stages[-1].latents)
