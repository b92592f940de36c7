"""The cascade from a prompt: tokenizer, text encoder, denoiser and autoencoder of every pipeline class that it knows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff.cascade.latents import encode, unpack
from scalediff.cascade.pipeline import stage_sizes
from scalediff.patching.networks import denoiser_of
from scalediff_kernels import low_pass
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.prompted_pipelines import PROMPTED, draw, drawn, picture_of, ready, target_of

BOAT, MOONS = "a red boat", "two green moons"

every_pipeline = pytest.mark.parametrize("name", PROMPTED)
# What test_pipelines.py tests of every class with embeddings in place of a prompt: here a U-Net, packed latents and a long system prompt.
few_pipelines = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("SD1.5", "FLUX", "Lumina 2") else pytest.mark.slow) for name in PROMPTED]
)


def global_randomness() -> list[Any]:
    state = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), [part.tolist() if isinstance(part, np.ndarray) else part for part in state], random.getstate()]


def place(pipe: Any) -> list[Any]:
    """What a pipeline is, beside its weights."""
    modules = {name: state_of(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    others = {name: id(part) for name, part in pipe.components.items()}
    return [type(pipe), sorted(pipe.__dict__), others, modules, dict(pipe.scheduler.__dict__), dict(pipe._progress_bar_config)]


@torch.no_grad()
def native(pipe: Any) -> Tensor:
    """A picture of the pipeline's own, encoded again: every part has had its turn."""
    side = target_of(pipe)[0] // 2
    picture = pipe(BOAT, height=side, width=side, num_inference_steps=2, output_type="pt", generator=seeded()).images
    return encode(pipe, 2 * picture - 1)


@pytest.mark.draws("text-to-image", PROMPTED, switch="prompt")
@every_pipeline
def test_a_prompt_is_drawn_in_two_stages(name: str) -> None:
    """One seed and prompt are one picture; the pipeline and the global randomness stay as they were."""
    pipe = ready(name)
    plain = native(pipe)
    before, randomness = place(pipe), global_randomness()
    first, second, other_prompt, other_seed = drawn(name, BOAT), draw(pipe, BOAT), draw(pipe, MOONS), drawn(name, BOAT, 1)
    assert global_randomness() == randomness
    assert place(pipe) == before
    assert torch.equal(native(pipe), plain)
    latents = first.stages[-1].latents
    assert torch.equal(second.stages[-1].latents, latents)
    assert second.images[0].tobytes() == first.images[0].tobytes()
    assert first.images[0].tobytes() != other_prompt.images[0].tobytes()
    assert (other_prompt.stages[-1].latents - latents).abs().max() > 1e-3
    assert (other_seed.stages[-1].latents - latents).abs().max() > 0.1


def test_without_a_generator_every_run_has_a_seed_of_its_own() -> None:
    pipe, randomness = ready("SD3"), global_randomness()
    first, second = (draw(pipe, BOAT, generator=None).stages[-1].latents for _ in range(2))
    assert (first - second).abs().max() > 0.1
    assert global_randomness() == randomness


@pytest.mark.draws("text-to-image", PROMPTED, switch="list of prompts")
@pytest.mark.parametrize("name", PROMPTED)
def test_a_list_of_prompts_is_a_picture_of_each(name: str) -> None:
    """Each with a generator of its own is drawn as it is drawn alone."""
    pipe, prompts = ready(name), [BOAT, MOONS]
    both = draw(pipe, prompts, generator=[seeded(0), seeded(1)])
    assert len(both.images) == 2
    for i, prompt in enumerate((BOAT, MOONS)):
        for stage, alone in zip(both.stages, drawn(name, prompt, i).stages, strict=True):
            torch.testing.assert_close(stage.latents[i : i + 1], alone.latents, rtol=1e-3, atol=1e-3)
    assert prompts == [BOAT, MOONS]
    assert (both.stages[-1].latents[0] - both.stages[-1].latents[1]).abs().max() > 0.1


@pytest.mark.draws("text-to-image", PROMPTED, switch="several pictures")
@every_pipeline
def test_several_pictures_of_a_prompt(name: str) -> None:
    pipe = ready(name)
    several = draw(pipe, BOAT, generator=[seeded(0), seeded(1)], call={"num_images_per_prompt": 2})
    for i in range(2):
        alone = drawn(name, BOAT, i).stages[-1].latents
        torch.testing.assert_close(several.stages[-1].latents[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.draws("text-to-image", PROMPTED, switch="pipeline's own call")
@few_pipelines
def test_the_patched_call_is_generate(name: str) -> None:
    """Latents to the bit, and the picture that both make of them."""
    pipe = ready(name)
    height, width = target_of(pipe)
    negative = {"negative_prompt": MOONS} if name != "FLUX" else {}
    with scalediff.patch_model(pipe, window=(4, 4)):
        result = draw(pipe, BOAT, **negative)
        how = {"prompt": BOAT, "height": height, "width": width, "num_inference_steps": 4, **negative}
        latents = pipe(**how, generator=seeded(), output_type="latent").images
        image = pipe(**how, generator=seeded()).images[0]
        factor = pipe.vae_scale_factor
    last = result.stages[-1].latents
    assert torch.equal(unpack(latents, (height // factor, width // factor)) if latents.ndim == 3 else latents, last)
    assert image.tobytes() == result.images[0].tobytes()


@pytest.mark.draws("text-to-image", [name for name in PROMPTED if name != "FLUX"], switch="negative prompt")
@pytest.mark.parametrize("name", [name for name in PROMPTED if name != "FLUX"])  # schnell: no guidance
def test_a_negative_prompt_is_heard(name: str) -> None:
    pipe = ready(name)
    plain = drawn(name, BOAT).stages[-1].latents
    negative, unguided, deaf = (
        draw(pipe, BOAT, **how).stages[-1].latents
        for how in (
            {"negative_prompt": MOONS},
            {"guidance_scale": 1.0 - (name == "Z-Image")},
            {"guidance_scale": 0.0, "negative_prompt": MOONS},
        )
    )
    assert (negative - plain).abs().max() > 1e-3
    assert (unguided - plain).abs().max() > 1e-3
    assert torch.equal(deaf, unguided)


@pytest.mark.draws("upscale", PROMPTED, switch="prompt")
@few_pipelines
def test_a_picture_is_enlarged_with_a_prompt(name: str) -> None:
    """The smaller the restart, the nearer to the picture; at any, the prompt is heard."""
    pipe = ready(name)
    height, width = target_of(pipe)
    image = picture_of((height // 2, width // 2))
    above = [size for size in stage_sizes(pipe, height, width) if 4 * size[0] * size[1] > height * width]
    how: dict[str, Any] = {"height": height, "width": width, "steps": 4}

    def enlarged(prompt: str, restart: float) -> scalediff.Result:
        return scalediff.upscale(pipe, image, prompt, restart=restart, generator=seeded(), **how)

    near, far, other = enlarged(BOAT, 0.25), enlarged(BOAT, 1.0), enlarged(MOONS, 1.0)
    assert [(stage.height, stage.width) for stage in near.stages] == above
    assert [{stage.steps for stage in result.stages} for result in (near, far)] == [{1}, {4}]
    assert near.images[0].size == (width, height)
    with torch.no_grad():
        encoded = encode(pipe, pipe.image_processor.preprocess(image.resize((width, height), Image.Resampling.BICUBIC)))
    distance = [(one.stages[-1].latents - encoded).square().mean() for one in (near, far)]
    assert distance[0] < distance[1]
    assert (far.stages[-1].latents - other.stages[-1].latents).abs().max() > 1e-3
    assert torch.equal(enlarged(BOAT, 1.0).stages[-1].latents, far.stages[-1].latents)


# By hand, in float64: neither a scheduler nor a pipeline's call nor the cascade


def guided(reference: Tensor | None, x0: Tensor, gamma: float, cutoff: float) -> Tensor:
    return x0 if reference is None else x0 + gamma * (low_pass(reference, cutoff=cutoff) - low_pass(x0, cutoff=cutoff))


def mixed(pipe: Any, latents: Tensor, size: tuple[int, int], cutoff: float) -> Tensor:
    """The reference of a stage: the picture enlarged, its low frequencies those of the enlarged latents."""
    larger = F.interpolate(decode(pipe, latents), size=size, mode="bicubic")
    z_ru = (pipe.vae.encode(larger).latent_dist.mean - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
    z_lu = F.interpolate(latents, size=z_ru.shape[-2:], mode="bicubic")
    reference: Tensor = z_ru - low_pass(z_ru, cutoff=cutoff) + low_pass(z_lu, cutoff=cutoff)
    return reference


def decode(pipe: Any, latents: Tensor) -> Tensor:
    config = pipe.vae.config
    decoded: Tensor = pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return decoded


@torch.no_grad()
def sd3_by_hand(pipe: Any, base: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both stages' latents: 4 Euler steps of the flow at a shift of 3, of which the second stage runs 3, a share of 0.6 rounded up."""
    rng, steps, kept, cutoff, scale = seeded(), 4, 3, 0.25, 7.0
    text, negative, pooled, negative_pooled = pipe.encode_prompt(BOAT, None, None)
    inputs = {"encoder_hidden_states": torch.cat([negative, text]), "pooled_projections": torch.cat([negative_pooled, pooled])}

    def shifted(sigma: Any) -> Any:
        return 3 * sigma / (1 + 2 * sigma)

    sigmas = [*shifted(np.linspace(1, shifted(1 / 1000), steps)), 0.0]  # the end is shifted twice

    def denoise(x: Tensor, sigmas: list[float], reference: Tensor | None) -> Tensor:
        for now, after in itertools.pairwise(sigmas):
            time = torch.full((2,), 1000 * now, dtype=x.dtype)
            without, with_text = pipe.transformer(torch.cat([x, x]), timestep=time, **inputs, return_dict=False)[0].chunk(2)
            x0 = guided(reference, x - now * (without + scale * (with_text - without)), now, cutoff)
            x = x0 + after * (x - x0) / now
        return x

    def noise(size: tuple[int, int]) -> Tensor:
        return torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=rng).double()

    latents = denoise(noise(base), sigmas, None)
    reference, tail = mixed(pipe, latents, size, cutoff), sigmas[steps - kept :]
    return latents, denoise((1 - tail[0]) * reference + tail[0] * noise(size), tail, reference)


@torch.no_grad()
def sd15_by_hand(pipe: Any, base: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both stages' latents: 4 DDIM steps, of which the second stage runs the last 2, a share of 0.3 rounded up."""
    rng, steps, kept, cutoff, scale = seeded(), 4, 2, 0.125, 1.5
    text, negative = pipe.encode_prompt(BOAT, "cpu", 1, True)
    abar = (1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    times = [751, 501, 251, 1]

    def denoise(x: Tensor, times: list[int], reference: Tensor | None) -> Tensor:
        for now in times:
            a, after = abar[now], abar[now - 250] if now > 250 else torch.tensor(1.0).double()
            without, with_text = pipe.unet(torch.cat([x, x]), now, torch.cat([negative, text]), return_dict=False)[0].chunk(2)
            eps = without + scale * (with_text - without)
            gamma = float((1 - a) / (1 - abar[times[0]]))
            x0 = guided(reference, (x - (1 - a).sqrt() * eps) / a.sqrt(), gamma, cutoff)
            x = after.sqrt() * x0 + (1 - after).sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt()
        return x

    def noise(size: tuple[int, int]) -> Tensor:
        return torch.randn(1, 4, size[0] // 8, size[1] // 8, generator=rng).double()

    latents = denoise(noise(base), times, None)
    reference, a = mixed(pipe, latents, size, cutoff), abar[times[steps - kept]]
    return latents, denoise(a.sqrt() * reference + (1 - a).sqrt() * noise(size), times[steps - kept :], reference)


@pytest.mark.draws("text-to-image", ["SD3", "SD1.5"], switch="loop by hand")
@pytest.mark.parametrize(("name", "by_hand"), [("SD3", sd3_by_hand), ("SD1.5", sd15_by_hand)])
def test_a_prompt_is_drawn_as_by_hand(name: str, by_hand: Callable[..., tuple[Tensor, Tensor]]) -> None:
    pipe, exact = ready(name), PROMPTED[name]()
    base, size = stage_sizes(pipe, *target_of(pipe))
    stages = draw(pipe, BOAT).stages
    exact.to(torch.float64)
    denoiser = denoiser_of(exact)
    plain = by_hand(exact, base, size)[1]
    with scalediff.patch_model(denoiser) as handle:
        handle.attention = "full"
        first, _ = by_hand(exact, base, size)
        handle.attention = "npa"
        _, second = by_hand(exact, base, size)
    for stage, expected in zip(stages, (first, second), strict=True):
        torch.testing.assert_close(stage.latents.double(), expected, rtol=1e-4, atol=1e-4)
    assert (plain - second).abs().max() > 1e-2
