"""The cascade on the real pipeline classes, small and random: FLUX by hand, and what every pipeline must keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw, ids
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.latents import pack, unpack
from scalediff.cascade.pipeline import native_size, preset, stage_sizes
from scalediff_kernels import low_pass
from tests.conftest import seeded

diffusers = pytest.importorskip("diffusers")

SDPA = F.scaled_dot_product_attention


def autoencoder(**more: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4, **blocks, **more,
        ).eval()  # fmt: skip


def prompts(draw: Draw, *, pooled: bool, negative: bool) -> dict[str, Tensor]:
    found = {"prompt_embeds": draw(1, 6, 32)} | ({"pooled_prompt_embeds": draw(1, 32)} if pooled else {})
    return found | ({f"negative_{name}": draw(*x.shape) for name, x in found.items()} if negative else {})


def flux() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    pipe = diffusers.FluxPipeline(transformer=ZOO["FLUX.1"].build(), vae=autoencoder(), scheduler=flow, **parts)
    return pipe, prompts(Draw(3), pooled=True, negative=False)


def sd3() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(transformer=ZOO["SD3"].build(), vae=autoencoder(), scheduler=flow, **parts)
    return pipe, prompts(Draw(3), pooled=True, negative=True)


def sdxl() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=ZOO["SDXL"].build(), vae=autoencoder(), scheduler=scheduler, add_watermarker=False, **parts
    )
    return pipe, prompts(Draw(3), pooled=True, negative=True)


def lumina2() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("text_encoder", "tokenizer"))
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = diffusers.Lumina2Pipeline(transformer=ZOO["Lumina 2"].build(), vae=autoencoder(), scheduler=flow, **parts)
    pipe.vae_scale_factor = 2  # the class says 8, of the VAE that it ships with
    pipe.image_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    masks = {"prompt_attention_mask": torch.tensor([[1] * 6]), "negative_prompt_attention_mask": torch.tensor([[1] * 3 + [0] * 3])}
    return pipe, prompts(Draw(3), pooled=False, negative=True) | masks


def lumina_next() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("text_encoder", "tokenizer"))
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    spec = ZOO["Lumina-Next"]
    pipe = diffusers.LuminaPipeline(transformer=spec.build(), vae=autoencoder(), scheduler=flow, **parts)
    pipe.vae_scale_factor = 2  # the class says 8, of the VAE that it ships with
    pipe.image_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    pipe.default_image_size = 16
    masks = {name: torch.ones(1, 6, dtype=torch.long) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return pipe, prompts(Draw(3), pooled=False, negative=True) | masks | {"proportional_attn": False}  # its rule fails at one token


def qwen() -> tuple[Any, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 2.5, 1.0],
        ).eval()  # fmt: skip
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    parts = dict.fromkeys(("text_encoder", "tokenizer"))
    pipe = diffusers.QwenImagePipeline(transformer=ZOO["Qwen-Image"].build(), vae=vae, scheduler=flow, **parts)
    masks = {name: torch.ones(1, 6, dtype=torch.bool) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    return pipe, prompts(Draw(3), pooled=False, negative=True) | masks


def z_image() -> tuple[Any, dict[str, Any]]:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    parts = dict.fromkeys(("text_encoder", "tokenizer"))
    pipe = diffusers.ZImagePipeline(transformer=ZOO["Z-Image"].build(), vae=autoencoder(), scheduler=flow, **parts)
    draw = Draw(3)
    return pipe, {"prompt_embeds": [draw(7, 32)], "negative_prompt_embeds": [draw(5, 32)]}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "FLUX": flux, "SD3": sd3, "SDXL": sdxl, "Lumina-Next": lumina_next, "Lumina 2": lumina2, "Qwen-Image": qwen, "Z-Image": z_image,
}  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, embeddings = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, embeddings


def call(pipe: Any, arguments: dict[str, Any], size: tuple[int, int], **more: Any) -> Any:
    given = {"num_inference_steps": 5, "output_type": "pt", "generator": seeded()} | more
    return pipe(**arguments, height=size[0], width=size[1], **given).images


@pytest.mark.composes("prompt embeddings", "cascade")
@pytest.mark.draws("text-to-image", PIPELINES, switch="prompt embeddings")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_patched_pipeline_runs_the_cascade(name: str) -> None:
    """Two stages above the native one: one seed is one picture, and the pipeline is left as it was."""
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW) as handle:
        native = native_size(pipe)
        target = 4 * native[0], 3 * native[1]
        assert [a * b for a, b in stage_sizes(pipe, *target)][-1] == target[0] * target[1]
        assert "runs the cascade above the native size" in str(handle.report)
        plain = call(pipe, arguments, native)
        calls: list[int] = []
        denoiser = pipe.unet if name == "SDXL" else pipe.transformer
        remover = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
        scheduler, attributes = pipe.scheduler, sorted(pipe.__dict__)
        first, second = (call(pipe, arguments, target) for _ in range(2))
        remover.remove()
        assert pipe.scheduler is scheduler
        assert sorted(pipe.__dict__) == attributes
        assert first.shape == (1, 3, *target)
        assert torch.equal(first, second)
        assert first.isfinite().all()
        stages, kept = len(stage_sizes(pipe, *target)), replace(preset(pipe), steps=5).stage_steps
        passes = len(calls) // 2
        assert passes in (5 + (stages - 1) * kept, 2 * (5 + (stages - 1) * kept))  # guidance may be a pass of its own
        handle.attention = "full"
        assert not torch.equal(call(pipe, arguments, target), first)
    assert torch.equal(call(pipe, arguments, native), plain)
    assert F.scaled_dot_product_attention is SDPA


@torch.no_grad()
def flux_by_hand(pipe: Any, arguments: dict[str, Any], picture: Tensor | None = None) -> Tensor:
    """FLUX from 8 to 16 latents by 5 Euler steps, the last 3 run again: no scheduler, no pipeline, no cascade of ours. A picture
    of 16 x 16 pixels may stand for the first 5."""
    rng, steps, kept, cutoff = seeded(), 5, 3, 0.25
    mu = 0.5 + (16 - 4) * (1.15 - 0.5) / (64 - 4)  # of the 16 tokens of the base, at every size
    even = np.linspace(1, 1 / steps, steps)
    sigmas = [*(np.exp(mu) / (np.exp(mu) + (1 / even - 1))).tolist(), 0.0]

    def denoise(x: Tensor, sigmas: list[float], reference: Tensor | None) -> Tensor:
        grid = x.shape[2] // 2, x.shape[3] // 2
        for now, after in itertools.pairwise(sigmas):
            v = pipe.transformer(
                hidden_states=pack(x), timestep=torch.tensor([now]), encoder_hidden_states=arguments["prompt_embeds"],
                pooled_projections=arguments["pooled_prompt_embeds"], txt_ids=torch.zeros(6, 3), img_ids=ids(grid), return_dict=False,
            )[0]  # fmt: skip
            v = unpack(v, tuple(x.shape[2:]))  # type: ignore[arg-type]
            if reference is not None:
                x0 = x - now * v
                x0 = x0 + now * (low_pass(reference, cutoff=cutoff) - low_pass(x0, cutoff=cutoff))
                v = (x - x0) / now
            x = x + (after - now) * v
        return x

    if picture is None:
        base = denoise(torch.randn(1, 4, 8, 8, generator=rng), sigmas, None)
        decoded = pipe.vae.decode(base / 0.4 + 0.1).sample
    else:
        base, decoded = (pipe.vae.encode(picture).latent_dist.mean - 0.1) * 0.4, picture
    z_ru = (pipe.vae.encode(F.interpolate(decoded, size=(32, 32), mode="bicubic")).latent_dist.mean - 0.1) * 0.4
    z_lu = F.interpolate(base, size=(16, 16), mode="bicubic")
    reference = z_ru - low_pass(z_ru, cutoff=cutoff) + low_pass(z_lu, cutoff=cutoff)
    tail = sigmas[steps - kept :]
    x = (1 - tail[0]) * reference + tail[0] * torch.randn(reference.shape, generator=rng)
    return denoise(x, tail, reference)


@pytest.mark.draws("text-to-image", ["FLUX"], switch="loop by hand")
def test_flux_is_the_hand_written_loop() -> None:
    pipe, arguments = built("FLUX")
    with scalediff.patch_model(pipe, window=WINDOW):
        packed = call(pipe, arguments, (32, 32), output_type="latent", guidance_scale=0.0)
    with scalediff.patch_model(pipe.transformer, window=WINDOW):
        expected = flux_by_hand(pipe, arguments)
    torch.testing.assert_close(unpack(packed, (16, 16)), expected, rtol=1e-4, atol=1e-4)
    rougher = call(pipe, arguments, (32, 32), output_type="latent", guidance_scale=0.0)
    assert (unpack(rougher, (16, 16)) - expected).abs().max() > 0.1


@pytest.mark.draws("upscale", ["FLUX"], switch="loop by hand")
def test_upscale_is_the_hand_written_loop_from_a_picture() -> None:
    pipe, arguments = built("FLUX")
    image = picture()
    tensor = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    how = {"call": arguments, "steps": 5, "restart": 0.5, "guidance_scale": 0.0}
    with scalediff.patch_model(pipe, window=WINDOW):
        scheduler = pipe.scheduler
        result = scalediff.upscale(pipe, image, None, height=32, width=32, generator=seeded(), **how)
        assert pipe.scheduler is scheduler
    with scalediff.patch_model(pipe.transformer, window=WINDOW):
        expected = flux_by_hand(pipe, arguments, tensor)
    assert [(stage.height, stage.width, stage.steps) for stage in result.stages] == [(32, 32, 3)]
    torch.testing.assert_close(result.stages[-1].latents, expected, rtol=1e-4, atol=1e-4)


def test_lumina_next_neither_stretches_positions_nor_sharpens_attention_in_windows() -> None:
    """Above the trained size its pipeline does both, for attention over the whole picture."""
    pipe, arguments = built("Lumina-Next")
    seen: list[tuple[Tensor, int]] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["image_rotary_emb"], kwargs["cross_attention_kwargs"]["base_sequence_length"]))

    remover = pipe.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    pipe.default_image_size, arguments["proportional_attn"] = 64, True
    with scalediff.patch_model(pipe, window=(16, 16)) as handle:
        call(pipe, arguments, (128, 128))
        assert all(torch.equal(rotary, seen[0][0]) for rotary, _ in seen)
        assert pipe.default_image_size == 64
        assert (seen[0][1], seen[-1][1]) == (4**2, 8**2)  # by the pipeline's rule, 16 pixels a token
        handle.attention = "full"
        seen.clear()
        call(pipe, arguments, (128, 128))
        assert not torch.equal(seen[-1][0], seen[0][0])
    remover.remove()


def picture(height: int = 16, width: int = 16) -> Any:
    from PIL import Image

    values = torch.randint(0, 256, (height, width, 3), generator=seeded(5), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.mark.draws("upscale", PIPELINES, switch="prompt embeddings")
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_upscales(name: str) -> None:
    """A picture below the native area and not of the model's multiples: the first stage is the native one."""
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        side = native_size(pipe)[0]
        image = picture(side - 1, side - 1)
        how = {"height": 2 * side, "width": 2 * side, "call": arguments, "steps": 4, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
        first, second = (scalediff.upscale(pipe, image, None, generator=seeded(), **how) for _ in range(2))
    assert [stage.height for stage in first.stages] == [side, 2 * side]
    assert first.images[0].size == (2 * side, 2 * side)
    assert torch.equal(first.stages[-1].latents, second.stages[-1].latents)


def test_pictures_that_cannot_be_upscaled_are_refused() -> None:
    pipe, arguments = built("FLUX")
    with scalediff.patch_model(pipe, window=WINDOW):
        with pytest.raises(ValueError, match=r"the target must have the aspect ratio of the picture, 16 x 16, got height=64, width=32"):
            scalediff.upscale(pipe, picture(), None, height=64, width=32, call=arguments)
        with pytest.raises(ValueError, match=r"the target must be larger than the picture, 40 x 40, got height=32, width=32"):
            scalediff.upscale(pipe, picture(40, 40), None, height=32, width=32, call=arguments)
        with pytest.raises(ValueError, match=r"all pictures must have the same size, got \[\(16, 16\), \(8, 8\)\]"):
            scalediff.upscale(pipe, [picture(), picture(8, 8)], None, height=32, width=32, call=arguments)
        with pytest.raises(
            ValueError, match="call must not hold arguments of generate or upscale, or those that each stage sets, got latents"
        ):
            scalediff.generate(pipe, None, height=32, width=32, call={"latents": None})


def test_generate_takes_further_arguments_of_the_call() -> None:
    pipe, arguments = built("SD3")
    with scalediff.patch_model(pipe, window=WINDOW):
        result = scalediff.generate(pipe, None, height=32, width=32, call=arguments, generator=seeded(), steps=5)
        expected = call(pipe, arguments, (32, 32), output_type="latent", guidance_scale=result.settings.guidance_scale)
    assert torch.equal(result.stages[-1].latents, expected)


def test_flux_presets_are_those_of_its_checkpoints() -> None:
    """dev has an embedded guidance scale, schnell has none."""
    pipe, _ = built("FLUX")
    assert (preset(pipe).steps, preset(pipe).stage_steps) == (4, 2)
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    dev = preset(pipe)
    assert (dev.steps, dev.stage_steps, dev.guidance_scale, dev.lfm_cutoff) == (30, 18, 3.5, 0.25)


def test_packing_is_that_of_the_pipeline() -> None:
    x = Draw()(2, 4, 6, 8)
    assert torch.equal(pack(x), diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), (6, 8)), x)


@pytest.mark.parametrize("name", ["FLUX", "SD3"])
def test_an_interrupted_run_returns_what_there_is(name: str) -> None:
    """diffusers' flag, set by a callback in the base stage: its picture is decoded by the pipeline, at its own size."""
    pipe, arguments = built(name)

    def stop(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        pictures = call(pipe, arguments, (2 * native[0], 2 * native[1]), callback_on_step_end=stop)
        assert pictures.shape == (1, 3, *native)


def test_qwen_is_guided_without_a_negative_prompt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipeline does not guide without one; a space stands for none."""
    pipe, _ = built("Qwen-Image")
    asked: list[Any] = []

    def encode_prompt(prompt: Any = None, prompt_embeds: Any = None, prompt_embeds_mask: Any = None, **_: Any) -> tuple[Tensor, Any]:
        asked.append(prompt)
        return Draw(len(asked))(1, 6, 32), None

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    with scalediff.patch_model(pipe, window=WINDOW):
        scalediff.generate(pipe, "a moon", height=32, width=32, steps=2, generator=seeded())
    assert asked == ["a moon", " "] * 2


def test_an_autoencoder_is_a_module_like_any_other() -> None:
    """Its attention sees the latents at both ends, whatever calls it."""
    vae = autoencoder()
    latents = Draw()(1, 4, 12, 10)
    with torch.no_grad():
        plain = vae.decode(latents).sample
        with scalediff.patch_model(vae.decoder, patch_size=1, window=WINDOW) as decoder:
            with scalediff.patch_model(vae.encoder, patch_size=2, window=WINDOW) as encoder:
                patched = vae.decode(latents).sample
                vae.encode(plain)
            assert [row.module for row in encoder.report.patched] == ["mid_block.attentions.0"]
        assert [row.module for row in decoder.report.patched] == ["mid_block.attentions.0"]
        assert (patched - plain).abs().max() > 0.01
        assert torch.equal(vae.decode(latents).sample, plain)
