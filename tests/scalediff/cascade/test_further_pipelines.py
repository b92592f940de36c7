"""The cascade of further families from a prompt, and loops written by hand for each form of latents that FLUX.1 does not have."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import scalediff
from scalediff.cascade.latents import decode, encode, packed, unpacked
from scalediff.cascade.pipeline import cascade_of, named_preset, native_size, stage_sizes, takes
from scalediff.families import FAMILIES
from scalediff.patching.networks import denoiser_of, original_call
from tests.conftest import seeded
from tests.scalediff.cascade.further_pipelines import FURTHER, ready
from tests.scalediff.cascade.prompted_pipelines import draw, picture_of, target_of
from tests.scalediff.cascade.test_prompts import BOAT, MOONS, global_randomness, guided, place

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

GUIDED = ("PixArt-Sigma", "AuraFlow", "PRX", "ERNIE-Image", "HiDream-I1", "Bria 3", "Bria FIBO", "HunyuanDiT")
FAST = {"FLUX.2", "FLUX.2 Klein", "FLUX.1 Kontext", "Chroma", "PixArt-Sigma", "AuraFlow", "CogView4", "PRX", "ERNIE-Image"}


def pipelines(names: Iterable[str], fast: Container[str] = FAST) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names])


every_pipeline = pipelines(FURTHER)


@pytest.mark.composes("guiders", "cascade", case="HunyuanImage 2.1")
@pytest.mark.draws("text-to-image", FURTHER, switch="prompt")
@every_pipeline
def test_a_prompt_is_drawn_in_two_stages(name: str) -> None:
    """One seed and prompt are one picture; the pipeline and the global randomness stay as they were; the prompt is heard."""
    pipe, call = ready(name)
    randomness = global_randomness()
    first = draw(pipe, BOAT, call=call).stages[-1].latents
    before = place(pipe)  # some attributes of a pipeline begin with its first call
    second, other = (draw(pipe, prompt, call=call).stages[-1].latents for prompt in (BOAT, MOONS))
    assert global_randomness() == randomness
    assert place(pipe) == before
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 1e-3


@pytest.mark.draws("text-to-image", FURTHER, switch="pipeline's own call")
@every_pipeline
def test_the_pipelines_own_call_is_the_cascade(name: str) -> None:
    """Above the native size; the picture is decoded by the pipeline, from latents of the same form and statistics."""
    pipe, call = ready(name)
    height, width = target_of(pipe)
    how: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": 4, "generator": seeded(), "output_type": "np"}
    picture = torch.from_numpy(pipe(prompt=BOAT, **how, **call).images)
    with torch.no_grad():
        ours = decode(pipe, draw(pipe, BOAT, call=call).stages[-1].latents)
    assert picture.shape == (1, height, width, 3)
    torch.testing.assert_close(picture.permute(0, 3, 1, 2), (ours / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


@every_pipeline
def test_presets_are_the_pipelines_defaults(name: str) -> None:
    pipe, _ = ready(name)
    defaults = inspect.signature(original_call(pipe)).parameters
    chosen, cascade = named_preset(pipe, "default"), cascade_of(pipe)
    if name in ("FLUX.1 Kontext", "FLUX.2 Klein KV"):  # their denoisers are those of other pipelines, whose presets they have
        return
    assert chosen.settings.steps == defaults["num_inference_steps"].default
    assert chosen.settings.guidance_scale == defaults[cascade.guidance].default
    assert chosen.source.startswith("the pipeline's own steps and guidance")


@pytest.mark.parametrize("name", ["FLUX.2", "FLUX.2 Klein", "ERNIE-Image", "Bria FIBO"])
def test_latents_are_those_of_the_pipeline(name: str) -> None:
    """Encoding inverts decoding's statistics, and the form of the steps is the form that the pipeline takes."""
    pipe, call = ready(name)
    side = native_size(pipe)[0]
    run = {"prompt": BOAT, "height": side, "width": side, "num_inference_steps": 1, **call}
    with torch.no_grad():
        returned = pipe(**run, generator=seeded(), output_type="latent", return_dict=False)[0]
        latents = unpacked(pipe, returned, (side, side))
        picture = pipe(**run, generator=seeded(), output_type="np").images
        ours = decode(pipe, latents)
    np.testing.assert_allclose(picture[0], (ours / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        shape = latents.shape if name == "Bria FIBO" else packed(pipe, latents).shape  # in which the pipeline draws its noise
        own = torch.randn(shape, generator=seeded())
        own = packed(pipe, own) if name == "Bria FIBO" else own
        given = pipe(**run, latents=own, output_type="latent", return_dict=False)[0]
        assert torch.equal(given, returned)
        pipe.vae.encode = Encoded(pipe, latents)
        torch.testing.assert_close(encode(pipe, ours), latents, rtol=1e-4, atol=1e-4)


class Encoded:
    """In place of an autoencoder's encoder: its mode is what the decoder was given for some latents."""

    def __init__(self, pipe: Any, latents: Tensor) -> None:
        given: list[Tensor] = []
        self.latent_dist = self
        decoder = pipe.vae.decode
        pipe.vae.decode = lambda z, **_: given.append(z) or decoder(z)
        decode(pipe, latents)
        pipe.vae.decode = decoder
        self.given = given[0]

    def __call__(self, picture: Tensor) -> Encoded:
        return self

    def mode(self) -> Tensor:
        return self.given


# By hand, in float64: neither a scheduler nor a pipeline's call nor the cascade


def statistics_by_hand(pipe: Any, name: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a token's latents `[C, 2, 2]`, or of one latent."""
    if name == "Bria FIBO":
        config = pipe.vae.config
        return tuple(torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (config.latents_mean, config.latents_std))  # type: ignore[return-value]
    eps = 1e-5 if name == "ERNIE-Image" else pipe.vae.config.batch_norm_eps
    return pipe.vae.bn.running_mean.view(-1, 2, 2), (pipe.vae.bn.running_var + eps).sqrt().view(-1, 2, 2)


def whole(token: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape[-2] // token.shape[-2], like.shape[-1] // token.shape[-1]
    return token.repeat(1, rows, columns)


def reference_by_hand(pipe: Any, name: str, latents: Tensor, size: tuple[int, int]) -> Tensor:
    mean, std = statistics_by_hand(pipe, name)
    frame = (slice(None), slice(None), *([None] if name == "Bria FIBO" else []))
    picture = pipe.vae.decode((latents * whole(std, latents) + whole(mean, latents))[frame]).sample
    larger = F.interpolate(picture[:, :, 0] if name == "Bria FIBO" else picture, size=size, mode="bicubic")
    raw = pipe.vae.encode(larger[frame]).latent_dist.mode()
    raw = raw[:, :, 0] if name == "Bria FIBO" else raw
    z_ru = (raw - whole(mean, raw)) / whole(std, raw)
    z_lu = F.interpolate(latents, size=z_ru.shape[-2:], mode="bicubic")
    return guided(z_lu, z_ru, 1.0, 0.25)


def velocity_by_hand(pipe: Any, name: str, call: dict[str, Any]) -> Any:
    """A function from latents `[1, C, Y, X]` and a noise level to the guided velocity, with guidance as each pipeline defines it."""
    net = pipe.transformer
    if name == "ERNIE-Image":
        texts = pipe.encode_prompt(["", BOAT], pipe.device)
        text, lengths = pipe._pad_text(text_hiddens=texts, device=pipe.device, dtype=torch.float64, text_in_dim=net.config.text_in_dim)

        def ernie(x: Tensor, sigma: float) -> Tensor:
            patches = rearrange(x, "b c (y i) (x j) -> b (c i j) y x", i=2, j=2).repeat(2, 1, 1, 1)
            out = net(hidden_states=patches, timestep=torch.full((2,), 1000 * sigma).double(), text_bth=text, text_lens=lengths)[0]
            without, with_text = rearrange(out, "b (c i j) y x -> b c (y i) (x j)", i=2, j=2).chunk(2)
            return without + 4.0 * (with_text - without)

        return ernie
    if name == "Bria FIBO":
        positive, negative, text_ids, mask, negative_mask, layers, negative_layers = pipe.encode_prompt(BOAT, guidance_scale=5)
        text, layers = torch.cat([negative, positive]), [torch.cat(pair) for pair in zip(negative_layers, layers, strict=True)]
        padded = torch.cat([negative_mask, mask]).bool()

        def fibo(x: Tensor, sigma: float) -> Tensor:
            rows, columns = x.shape[-2:]
            ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).double()
            seen = torch.cat([padded, padded.new_ones(2, rows * columns)], dim=1)[:, None, None]
            tokens, time = rearrange(x, "b c y x -> b (y x) c").repeat(2, 1, 1), torch.full((2,), 1000 * sigma).double()
            texts = {"encoder_hidden_states": text, "text_encoder_layers": layers, "joint_attention_kwargs": {"attention_mask": seen}}
            without, with_text = net(tokens, timestep=time, **texts, txt_ids=text_ids[0], img_ids=ids)[0].chunk(2)
            return rearrange(without + 5.0 * (with_text - without), "b (y x) c -> b c y x", y=rows)

        return fibo
    (text, text_ids), (empty, _) = (pipe.encode_prompt(prompt, **call) for prompt in (BOAT, ""))

    def flux2(x: Tensor, sigma: float) -> Tensor:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(1))[None]
        how = {"hidden_states": rearrange(x, "b c (y i) (x j) -> b (y x) (c i j)", i=2, j=2), "timestep": torch.tensor([sigma]).double()}
        guidance = torch.tensor([4.0]) if name == "FLUX.2" else None
        found = [net(**how, encoder_hidden_states=t, txt_ids=text_ids, img_ids=ids, guidance=guidance)[0] for t in (text, empty)]
        v = found[0] if name == "FLUX.2" else found[1] + 4.0 * (found[0] - found[1])
        return rearrange(v, "b (y x) (c i j) -> b c (y i) (x j)", y=rows, i=2, j=2)

    return flux2


@torch.no_grad()
def by_hand(pipe: Any, name: str, call: dict[str, Any], sizes: list[tuple[int, int]], sigmas: list[float]) -> list[Tensor]:
    """Both stages' latents: 4 Euler steps, of which the second stage runs 3."""
    rng, velocity = seeded(), velocity_by_hand(pipe, name, call)
    handle = scalediff.patch_model(denoiser_of(pipe), window=(4, 4))

    def noise(latents: Tensor | tuple[int, ...]) -> Tensor:
        shape = (1, *latents) if isinstance(latents, tuple) else tuple(latents.shape)
        if isinstance(latents, Tensor) or name == "Bria FIBO":  # the cascade draws on the grid; a base stage as its pipeline does
            return torch.randn(shape, generator=rng).double()
        patches = torch.randn(1, 4 * shape[1], shape[2] // 2, shape[3] // 2, generator=rng)
        return rearrange(patches, "b (c i j) y x -> b c (y i) (x j)", i=2, j=2).double()

    def denoise(x: Tensor, sigmas: list[float], reference: Tensor | None) -> Tensor:
        for now, after in itertools.pairwise(sigmas):
            x0 = guided(reference, x - now * velocity(x, now), now, 0.25)
            x = x0 + after * (x - x0) / now
        return x

    factor = 16 if name == "Bria FIBO" else 2
    channels = 16 if name == "Bria FIBO" else 4
    handle.attention = "full"
    base = denoise(noise((channels, sizes[0][0] // factor, sizes[0][1] // factor)), sigmas, None)
    handle.attention = "npa"
    reference, tail = reference_by_hand(pipe, name, base, sizes[1]), sigmas[1:]
    return [base, denoise((1 - tail[0]) * reference + tail[0] * noise(reference), tail, reference)]


@pytest.mark.draws("text-to-image", ["FLUX.2", "FLUX.2 Klein", "ERNIE-Image", "Bria FIBO"], switch="loop by hand")
@pytest.mark.parametrize("name", ["FLUX.2", "FLUX.2 Klein", "ERNIE-Image", pytest.param("Bria FIBO", marks=pytest.mark.slow)])
def test_a_prompt_is_drawn_as_by_hand(name: str) -> None:
    pipe, call = ready(name)
    sizes = stage_sizes(pipe, *target_of(pipe))
    stages = draw(pipe, BOAT, call=call).stages
    assert stages[-1].steps == 3
    sigmas = schedule_by_hand(name, sizes[0])
    exact, _ = FURTHER[name]()
    exact.to(torch.float64)
    for stage, expected in zip(stages, by_hand(exact, name, call, sizes, sigmas), strict=True):
        torch.testing.assert_close(stage.latents.double(), expected, rtol=2e-4, atol=2e-4)


def schedule_by_hand(name: str, base: tuple[int, int], steps: int = 4) -> list[float]:
    """The noise levels of the base stage: shifted by its number of tokens, or by 4 in ERNIE-Image."""
    tokens = base[0] * base[1] // (256 if name == "Bria FIBO" else 16)
    even = np.linspace(1, 1 / steps, steps)
    if name == "ERNIE-Image":
        return [*(4 * even / (1 + 3 * even)).tolist(), 0.0]
    if name == "Bria FIBO":
        mu = 0.5 + (tokens - 4) * (1.15 - 0.5) / (64 - 4)
    else:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    return [*(np.exp(mu) / (np.exp(mu) + (1 / even - 1))).tolist(), 0.0]


@pytest.mark.composes("custom timesteps or sigmas", "cascade")
def test_a_custom_schedule_is_that_of_all_stages() -> None:
    """The base stage runs it, and the stages above run its end, in place of the steps of a preset."""
    pipe, call = ready("Chroma")
    height, width = target_of(pipe)
    custom, seen = [1.0, 0.9, 0.5, 0.25], list[float]()
    pipe.transformer.register_forward_pre_hook(lambda _, args, named: seen.append(float(named["timestep"][0])), with_kwargs=True)
    how: dict[str, Any] = {"height": height, "width": width, "call": call | {"sigmas": custom}, "guidance_scale": 1.0, "restart": 0.6}
    result = scalediff.generate(pipe, BOAT, generator=seeded(), **how)
    assert result.settings.steps == 4
    assert [stage.steps for stage in result.stages] == [4, 3]
    assert seen[1:4] == seen[4:]
    assert len(set(seen)) == 4
    seen.clear()
    latents = pipe(BOAT, height=height, width=width, sigmas=custom, guidance_scale=1.0, generator=seeded(), output_type="latent", **call)
    assert len(seen) == 4 + 3  # 0.6 of the steps, rounded up
    assert torch.equal(unpacked(pipe, latents[0], (height, width)), result.stages[-1].latents)


def test_sizes_and_arguments_that_a_model_cannot_have_are_refused() -> None:
    pipe, call = ready("AuraFlow")
    with pytest.raises(ValueError, match="AuraFlowTransformer2DModel has positions for at most 32 x 32 tokens, 128 x 128 pixels, got 136"):
        scalediff.generate(pipe, BOAT, height=136, width=64, call=call)
    pipe, call = ready("PixArt-Sigma")
    with pytest.raises(ValueError, match="calls PixArtSigmaPipeline with use_resolution_binning=False, got use_resolution_binning=True"):
        scalediff.generate(pipe, BOAT, height=32, width=32, call=call | {"use_resolution_binning": True})
    pipe, call = ready("FLUX.2 Klein")
    with pytest.raises(ValueError, match=r"latents must have the size of the base stage, 8 x 8, got .*1, 16, 8, 8"):
        pipe(prompt=BOAT, height=32, width=32, latents=torch.zeros(1, 16, 8, 8), **call)
    pipe, call = ready("PRX")
    scalediff.unpatch_model(pipe)
    with pytest.raises(ValueError, match=r"PRXTransformer2DModel does not tell its native size: patch_model\(pipe, window="):
        scalediff.generate(pipe, BOAT, height=32, width=32, call=call)


def test_attributes_that_a_stage_sets_are_restored() -> None:
    """HiDream's pipeline scales every size to one area, and its denoiser pads what is not square."""
    pipe, call = ready("HiDream-I1")
    sizes: list[tuple[float, int]] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: sizes.append((pipe.default_sample_size, pipe.transformer.max_seq)))
    draw(pipe, BOAT, call=call)
    assert (pipe.default_sample_size, pipe.transformer.max_seq) == (128, 16)
    assert [max_seq for _, max_seq in sizes] == [16] * 4 + [48] * 3
    assert sizes[-1][0] == pytest.approx((16 * 12) ** 0.5)


@pytest.mark.draws("text-to-image", GUIDED, switch="split guidance")
@pytest.mark.draws("text-to-image", GUIDED, switch="guidance until")
@pipelines(GUIDED, {"PixArt-Sigma"})
def test_guidance_runs_in_halves(name: str) -> None:
    """One after the other they are the doubled batch; the conditional one alone is a guidance scale of 1."""
    pipe, call = ready(name)
    call = call | {"callback_on_step_end" if takes(pipe, "callback_on_step_end") else "callback": lambda *found: found[-1]}
    batches: list[int] = []
    denoiser_of(pipe).register_forward_pre_hook(
        lambda _, args, named: batches.append(len(args[0] if args else named["hidden_states"])), with_kwargs=True
    )
    whole = draw(pipe, BOAT, call=call).stages[-1].latents
    assert set(batches) == {2}
    halves = draw(pipe, BOAT, call=call, split_guidance=True).stages[-1].latents
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-4)
    batches.clear()
    settings = replace(named_preset(pipe, "default").settings, guidance_until=0.5)
    draw(pipe, BOAT, call=call, preset=settings)
    assert batches == [2, 2, 2, 2, 2, 2, 1][: len(batches)]


@pytest.mark.draws("upscale", FURTHER, switch="prompt")
@pipelines(FURTHER, {"FLUX.2 Klein", "ERNIE-Image"})
def test_a_picture_is_enlarged(name: str) -> None:
    pipe, call = ready(name)
    height, width = target_of(pipe)
    image, how = picture_of((height // 2, width // 2)), {"height": height, "width": width, "steps": 4, "call": call}
    how |= {"lfm_cutoff": 0.5, "sg_cutoff": 0.5}  # of which the smallest latents have a pixel
    near, far = (scalediff.upscale(pipe, image, BOAT, restart=restart, generator=seeded(), **how) for restart in (0.25, 1.0))
    larger = image.resize((width, height), Image.Resampling.BICUBIC)
    with torch.no_grad():
        encoded = encode(pipe, pipe.image_processor.preprocess(larger, height=height, width=width))
    distance = [(one.stages[-1].latents - encoded).square().mean() for one in (near, far)]
    assert near.images[0].size == (width, height)
    assert distance[0] < distance[1]


def test_every_family_has_the_cascade_or_a_reason_why_not() -> None:
    for family in FAMILIES.values():
        assert [family.cascade is not None, bool(family.no_cascade), bool(family.refusal)].count(True) == 1, family.denoiser
