"""The cascade: a hand-written loop gives the same picture, one seed gives one picture, and the pipeline is left as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from scalediff.cascade.checks import check_run
from scalediff.cascade.pipeline import native_size, preset, stage_sizes
from scalediff.cascade.results import Stage
from scalediff.draw import generate
from scalediff_kernels import low_pass
from tests.conftest import seeded

PROMPT = "a full moon over snowy mountains at night"
FAST = {"steps": 2, "restart": 0.5}


def pixels(image: Any) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def latents_of(result: Any) -> Tensor:
    latents: Tensor = result.stages[-1].latents
    return latents


@torch.no_grad()
def hand_written(pipe: Any, *, npa: bool) -> Tensor:
    """Base at 64, one stage to 128 by 4 DDIM steps, the last 2 run: the method spelled out, no scheduler, no hook of ours."""
    rng, guidance = seeded(), 3.0
    abar = pipe.scheduler.alphas_cumprod
    timesteps = [1000 - 1 - round(i * 1000 / 4) for i in range(4)]
    text = torch.cat([pipe.text_encoder(pipe.tokenizer(p, padding="max_length", return_tensors="pt").input_ids)[0] for p in ("", PROMPT)])

    def ddim(x: Tensor, start: int, reference: Tensor | None) -> Tensor:
        for t in timesteps[start:]:
            v_empty, v_text = pipe.unet(torch.cat([x, x]), t, text).sample.chunk(2)
            v = v_empty + guidance * (v_text - v_empty)
            a, s = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
            x0, eps = a * x - s * v, a * v + s * x
            if reference is not None:
                gamma = float((1 - abar[t]) / (1 - abar[timesteps[start]]))
                x0 = x0 + gamma * (low_pass(reference, cutoff=0.25) - low_pass(x0, cutoff=0.25))
                eps = (x - a * x0) / s
            after = t - 1000 // 4
            a_next = abar[after] if after >= 0 else torch.tensor(1.0)
            x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
        return x

    base = ddim(torch.randn(1, 4, 16, 16, generator=rng), 0, None)
    scale = pipe.vae.config.scaling_factor
    rgb = F.interpolate(pipe.vae.decode(base / scale).sample, size=(128, 128), mode="bicubic")
    z_ru = pipe.vae.encode(rgb).latent_dist.mean * scale
    z_lu = F.interpolate(base, size=(32, 32), mode="bicubic")
    reference = z_ru - low_pass(z_ru, cutoff=0.25) + low_pass(z_lu, cutoff=0.25)
    start = abar[timesteps[2]]
    x = start**0.5 * reference + (1 - start) ** 0.5 * torch.randn(reference.shape, generator=rng)
    if not npa:
        return ddim(x, 2, reference)
    with scalediff.patch_model(pipe.unet):
        return ddim(x, 2, reference)


@pytest.mark.parametrize("attention", ["npa", "full"])
def test_cascade_is_the_hand_written_loop(demo: Any, attention: str) -> None:
    result = generate(
        demo,
        PROMPT,
        height=128,
        width=128,
        generator=seeded(),
        attention=attention,  # type: ignore[arg-type]
        guidance_scale=3.0,
        lfm_cutoff=0.25,
        sg_cutoff=0.25,
        steps=4,
        restart=0.5,
    )
    expected = hand_written(demo, npa=attention == "npa")
    # fp32 both, the same network calls; 8 of them in sequence with guidance 3 amplify single roundings.
    torch.testing.assert_close(latents_of(result), expected, rtol=1e-3, atol=1e-3)


def test_one_seed_is_one_picture(demo: Any) -> None:
    first, again, other = (
        generate(demo, PROMPT, height=96, width=96, generator=seeded(seed), **FAST)  # type: ignore[arg-type]
        for seed in (3, 3, 4)
    )
    assert torch.equal(latents_of(first), latents_of(again))
    assert torch.equal(pixels(first.images[0]), pixels(again.images[0]))
    assert not torch.equal(latents_of(first), latents_of(other))


def test_without_a_generator_every_run_differs_and_the_global_one_is_untouched(demo: Any) -> None:
    state = torch.get_rng_state()
    a, b = (generate(demo, PROMPT, height=128, width=128, steps=2, restart=0.5) for _ in range(2))
    assert not torch.equal(latents_of(a), latents_of(b))
    assert torch.equal(torch.get_rng_state(), state)


def test_patched_pipeline_call_is_generate(demo: Any) -> None:
    settings = {"steps": 4, "guidance_scale": 3.0}
    expected = generate(demo, PROMPT, height=128, width=128, generator=seeded(), **settings)  # type: ignore[arg-type]
    with scalediff.patch_model(demo):
        out = demo(PROMPT, height=128, width=128, num_inference_steps=4, guidance_scale=3.0, generator=seeded())
        as_tuple = demo(
            PROMPT, 128, 128, num_inference_steps=4, guidance_scale=3.0, generator=seeded(), output_type="latent", return_dict=False
        )
    assert type(out).__name__ == "StableDiffusionPipelineOutput"
    assert out.images[0].size == (128, 128)
    assert torch.equal(pixels(out.images[0]), pixels(expected.images[0]))
    assert torch.equal(as_tuple[0], latents_of(expected))


def test_patched_pipeline_at_native_size_is_the_pipeline(demo: Any) -> None:
    def draw() -> Tensor:
        images: Tensor = demo(PROMPT, num_inference_steps=3, generator=seeded(), output_type="pt").images
        return images

    before = draw()
    with scalediff.patch_model(demo):
        assert torch.equal(draw(), before)
    assert torch.equal(draw(), before)


def test_a_side_that_a_patched_call_leaves_out_is_the_pipelines_own_and_not_the_windows(demo: Any) -> None:
    with scalediff.patch_model(demo, window=(8, 8)):
        sizes = [demo(PROMPT, num_inference_steps=1, **side).images[0].size for side in ({"height": 128}, {"width": 96}, {})]
    assert sizes == [(64, 128), (96, 64), (64, 64)]


def test_stages_are_reported_as_they_end(demo: Any) -> None:
    seen: list[Stage] = []
    result = generate(demo, PROMPT, height=256, width=192, generator=seeded(), on_stage=seen.append, **FAST)  # type: ignore[arg-type]
    assert [(s.height, s.width) for s in seen] == stage_sizes(demo, 256, 192) == [(72, 56), (144, 112), (256, 192)]
    assert [s.steps for s in seen] == [2, 1, 1]
    assert [s.index for s in seen] == [1, 2, 3]
    assert result.stages == seen
    assert all(s.images[0].size == (s.width, s.height) and s.latents.shape[-2:] == (s.height // 4, s.width // 4) for s in seen)
    assert result.images[0] is seen[-1].images[0]
    assert all(s.seconds > 0 for s in seen)


def test_every_switch_changes_the_picture_and_only_above_native(demo: Any) -> None:
    def draw(**switch: Any) -> Any:
        return generate(demo, PROMPT, height=96, width=96, generator=seeded(), **{**FAST, **switch})

    default = draw()
    for switch in ({"attention": "full"}, {"lfm": False}, {"sg": False}, {"lfm_cutoff": 0.5}, {"sg_cutoff": 0.5}, {"restart": 1.0}):
        changed = draw(**switch)
        assert torch.equal(changed.stages[0].latents, default.stages[0].latents), switch
        assert not torch.equal(latents_of(changed), latents_of(default)), switch


def test_batches_with_a_generator_each(demo: Any) -> None:
    prompts = [PROMPT, "the sun over green hills at noon"]
    both = generate(demo, prompts, height=96, width=96, generator=[seeded(1), seeded(2)], **FAST)  # type: ignore[arg-type]
    assert len(both.images) == 2
    for i, prompt in enumerate(prompts):
        alone = generate(demo, prompt, height=96, width=96, generator=seeded(i + 1), **FAST)  # type: ignore[arg-type]
        torch.testing.assert_close(latents_of(both)[i : i + 1], latents_of(alone), rtol=1e-3, atol=1e-3)


def test_the_pipeline_is_left_as_it_was(demo: Any) -> None:
    demo(PROMPT, num_inference_steps=1, generator=seeded())  # the pipeline's own call leaves attributes of its own
    scheduler, cls, config = demo.scheduler, type(demo), dict(demo.config)
    attributes, hooks = dict(demo.__dict__), len(demo.unet._forward_hooks)
    for bar in (demo._progress_bar_config, None):
        if bar is None:
            del demo._progress_bar_config, attributes["_progress_bar_config"]
        generate(demo, PROMPT, height=128, width=128, generator=seeded(), steps=2, restart=0.5)
        assert demo.scheduler is scheduler
        assert type(demo) is cls
        assert dict(demo.config) == config
        assert demo.__dict__.keys() == attributes.keys()
        assert demo.__dict__.get("_progress_bar_config") == bar
        assert len(demo.unet._forward_hooks) == hooks
    demo.set_progress_bar_config(disable=True)


def test_the_scheduler_comes_back_after_an_error(demo: Any) -> None:
    scheduler = demo.scheduler

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if tensors["latents"].shape[-1] == 32:
            raise KeyboardInterrupt
        return {}

    with scalediff.patch_model(demo) as handle:
        with pytest.raises(KeyboardInterrupt):
            demo(PROMPT, height=128, width=128, num_inference_steps=2, generator=seeded(), callback_on_step_end=stop)
        assert demo.scheduler is scheduler
        assert handle.attention == "npa"


def test_callbacks_are_called_in_every_stage(demo: Any) -> None:
    sizes = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes.append(tensors["latents"].shape[-1])
        return {}

    with scalediff.patch_model(demo):
        demo(PROMPT, height=128, width=128, num_inference_steps=10, generator=seeded(), callback_on_step_end=note)
    assert sizes == [16] * 10 + [32] * replace(preset(demo), steps=10).stage_steps


@pytest.mark.parametrize("stop_at", [16, 32])
def test_the_interrupt_flag_ends_the_cascade_with_what_there_is(demo: Any, stop_at: int) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if tensors["latents"].shape[-1] == stop_at:
            pipe._interrupt = True
        return {}

    with scalediff.patch_model(demo):
        out = demo(PROMPT, height=256, width=256, num_inference_steps=3, generator=seeded(), callback_on_step_end=stop)
    assert out.images[0].size == (4 * stop_at, 4 * stop_at)


def test_euler_and_multistep_schedulers_draw_too(demo: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    own = demo.scheduler
    try:
        demo.scheduler = diffusers.PNDMScheduler.from_config(own.config)
        with pytest.raises(NotImplementedError, match="supports PNDMScheduler without Runge-Kutta steps, got skip_prk_steps=False"):
            generate(demo, PROMPT, height=128, width=128, on_stage=lambda stage: pytest.fail("nothing may be drawn"))
        for name, more in (
            ("EulerDiscreteScheduler", {}),
            ("DPMSolverMultistepScheduler", {}),
            ("PNDMScheduler", {"skip_prk_steps": True}),
        ):
            demo.scheduler = getattr(diffusers, name).from_config(own.config, **more)
            result = generate(demo, PROMPT, height=128, width=128, generator=seeded(), **FAST)  # type: ignore[arg-type]
            assert latents_of(result).isfinite().all()
    finally:
        demo.scheduler = own


def test_a_patched_call_follows_its_handle(demo: Any) -> None:
    settings = {"steps": 4, "guidance_scale": 3.0}
    expected = generate(demo, PROMPT, height=128, width=128, generator=seeded(), attention="full", **settings)  # type: ignore[arg-type]
    with scalediff.patch_model(demo) as handle:
        handle.attention = "full"
        out = demo(PROMPT, height=128, width=128, num_inference_steps=4, guidance_scale=3.0, generator=seeded())
        assert handle.attention == "full"
    assert torch.equal(pixels(out.images[0]), pixels(expected.images[0]))


def test_a_small_picture_with_one_long_side_is_the_pipelines_own(demo: Any) -> None:
    def draw() -> Tensor:
        images: Tensor = demo(PROMPT, height=32, width=96, num_inference_steps=2, generator=seeded(), output_type="pt").images
        return images

    before = draw()
    with scalediff.patch_model(demo):
        assert torch.equal(draw(), before)


def test_the_safety_checker_sees_copies(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It blackens what it is given; the next stage must start from the picture all the same."""

    def blacken(image: Tensor, device: Any, dtype: Any) -> tuple[Tensor, list[bool]]:
        return image.zero_(), [True]

    free = generate(demo, PROMPT, height=128, width=128, generator=seeded(), steps=2, restart=0.5)
    monkeypatch.setattr(demo, "safety_checker", object())
    monkeypatch.setattr(demo, "run_safety_checker", blacken)
    checked = generate(demo, PROMPT, height=128, width=128, generator=seeded(), steps=2, restart=0.5)
    assert torch.equal(latents_of(checked), latents_of(free))
    assert pixels(checked.images[0]).max() == 0


def test_pipelines_that_edit_without_a_strength_keep_their_call(demo: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.StableDiffusionInstructPix2PixPipeline(**demo.components, requires_safety_checker=False)
    cls = type(other)
    with pytest.raises(TypeError, match=r"needs a text-to-image pipeline, got StableDiffusionInstructPix2PixPipeline"):
        generate(other, PROMPT, height=128, width=128)
    with scalediff.patch_model(other) as handle:
        assert type(other) is cls
        assert "is not a text-to-image pipeline, and has no strength: its call is unchanged" in str(handle.report)


def test_stable_diffusion_xl(demo: Any) -> None:
    """A small one of random weights: two text encoders, size conditioning, attention at its lower levels alone."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(demo.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=16, eos_token_id=demo.tokenizer.eos_token_id,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=8, attention_head_dim=(1, 2, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=demo.vae, unet=unet, text_encoder=transformers.CLIPTextModel(text).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text).eval(), tokenizer=demo.tokenizer, tokenizer_2=demo.tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with scalediff.patch_model(pipe) as handle:
        assert {row.window for row in handle.report.patched} == {(8, 8), (4, 4)}
        out = pipe(PROMPT, height=128, width=192, num_inference_steps=4, generator=seeded(), output_type="latent").images
    expected = generate(pipe, PROMPT, height=128, width=192, steps=4, generator=seeded())
    assert out.shape == (1, 4, 32, 48)
    assert torch.equal(out, latents_of(expected))


def test_bad_input_is_named(demo: Any) -> None:
    assert native_size(demo) == (64, 64)
    with pytest.raises(ValueError, match=r"multiples of 8, got height=130, width=128"):
        generate(demo, PROMPT, height=130, width=128)
    with pytest.raises(ValueError, match=r"at least the model's native 64 x 64, got height=32"):
        generate(demo, PROMPT, height=32, width=32)
    with pytest.raises(ValueError, match=r"restart must lie in \(0, 1\]"):
        generate(demo, PROMPT, height=128, width=128, restart=0)
    with pytest.raises(ValueError, match=r"at least one coarse pixel, got cutoff=0.01"):
        generate(demo, PROMPT, height=128, width=128, lfm_cutoff=0.01)
    with (
        pytest.raises(ValueError, match=r"latents must have the size of the base stage, 16 x 16, got.*32, 32"),
        scalediff.patch_model(demo),
    ):
        demo(PROMPT, height=128, width=128, latents=torch.zeros(1, 4, 32, 32))
    custom = {"timesteps": [500, 1]}
    with pytest.raises(ValueError, match=r"steps must be the length of the custom timesteps or sigmas, 2, got steps=3"):
        generate(demo, PROMPT, height=128, width=128, steps=3, call=custom)
    with pytest.raises(ValueError, match=r"run to the end, got denoising_end=0.5"), scalediff.patch_model(demo):
        check_run(demo, {"denoising_end": 0.5}, [(64, 64), (128, 128)], preset(demo), restarts=1)
    with pytest.raises(TypeError, match=r"needs a text-to-image pipeline, got UNet2DConditionModel"):
        generate(demo.unet, PROMPT, height=128, width=128)
    with pytest.raises(TypeError, match=r"nn.Module or a diffusers pipeline with a unet or transformer, got str"):
        generate("demo", PROMPT, height=128, width=128)
