"""MultiDiffusion: the published definition, view by view, gives the same picture; the pipeline is given back as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import scalediff
from bench.models.inputs import ids
from bench.models.zoo import WINDOW
from scalediff.cascade.latents import pack, unpack
from scalediff.cascade.pipeline import latent_size, native_size, preset
from scalediff.cascade.results import Stage
from scalediff.methods import METHODS, MultiDiffusion, multidiffusion, running
from scalediff.methods.multidiffusion import SCHEDULERS
from scalediff.methods.views import average
from scalediff.patching.networks import original_call
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

PROMPT = "a full moon over snowy mountains at night"
CUT = ["FLUX", "SD3", "SDXL", "Lumina-Next", "Lumina 2"]
FREE = {"Lumina 2": {"cfg_normalization": False}}  # arguments that make a pipeline's guidance linear
Model = Callable[[Tensor, Tensor], Tensor]  # guided output for the latents of a view, at a timestep


def run(
    pipe: Any, size: tuple[int, int], arguments: dict[str, Any], options: MultiDiffusion | None = None, *, steps: int = 4, **more: Any
) -> Stage:
    settings = replace(preset(pipe), steps=steps, guidance_scale=3.0)
    given = {"generator": seeded(), **arguments}
    (stage,) = multidiffusion(pipe, given, size, settings, options or MultiDiffusion(), **more)
    return stage


@torch.no_grad()
def by_definition(model: Model, scheduler: Any, latents: Tensor, *, window: int, stride: int) -> Tensor:
    """Every view steps with a scheduler of its own; value / count. In fp64."""
    y, x = latents.shape[-2:]
    where = [
        (min(i, y - window), min(j, x - window))
        for i in range(0, y - window + stride, stride)
        for j in range(0, x - window + stride, stride)
    ]
    schedulers = [copy.deepcopy(scheduler) for _ in where]
    latents = latents.double() * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        value, count = torch.zeros_like(latents), torch.zeros_like(latents)
        for own, (i, j) in zip(schedulers, where, strict=True):
            view = latents[..., i : i + window, j : j + window]
            scaled = own.scale_model_input(view, t) if hasattr(own, "scale_model_input") else view
            value[..., i : i + window, j : j + window] += own.step(model(scaled, t), t, view, return_dict=False)[0]
            count[..., i : i + window, j : j + window] += 1
        latents = value / count
    return latents


def laid_out(scheduler: Any, steps: int, **more: Any) -> Any:
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps, **more)
    return own


def demo_model(pipe: Any) -> Model:
    unet = copy.deepcopy(pipe.unet).double()
    ids = [pipe.tokenizer(p, padding="max_length", return_tensors="pt").input_ids for p in ("", PROMPT)]
    text = torch.cat([pipe.text_encoder(one)[0] for one in ids]).double()

    def model(x: Tensor, t: Tensor) -> Tensor:
        empty, named = unet(torch.cat([x, x]), t, text).sample.chunk(2)
        guided: Tensor = empty + 3.0 * (named - empty)
        return guided

    return model


@pytest.mark.parametrize(
    ("size", "stride", "view_batch"),
    [
        ((72, 104), 6, 4),
        pytest.param((72, 104), None, 1, marks=pytest.mark.slow),
        pytest.param((128, 128), None, 1, marks=pytest.mark.slow),
        pytest.param((128, 128), 6, 4, marks=pytest.mark.slow),
    ],
)
def test_the_embedded_model_is_the_published_loop(demo: Any, size: tuple[int, int], stride: int | None, view_batch: int) -> None:
    stage = run(demo, size, {"prompt": PROMPT}, MultiDiffusion(stride=stride, view_batch=view_batch))
    noise = torch.randn(1, 4, size[0] // 4, size[1] // 4, generator=seeded())
    expected = by_definition(demo_model(demo), laid_out(demo.scheduler, 4), noise, window=16, stride=stride or 8)
    torch.testing.assert_close(stage.latents.double(), expected, rtol=1e-4, atol=1e-4)
    assert (stage.height, stage.width, stage.steps, stage.index, stage.of) == (*size, 4, 1, 1)
    assert stage.images[0].size == (size[1], size[0])


def sdxl_model(pipe: Any, arguments: dict[str, Any], size: tuple[int, int]) -> Model:
    unet = copy.deepcopy(pipe.unet).double()
    text, pooled = (
        torch.cat([arguments[f"negative_{name}"], arguments[name]]).double() for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    times = torch.tensor([[*size, 0.0, 0.0, *size]] * 2).double()

    def model(x: Tensor, t: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": times}
        empty, named = unet(torch.cat([x, x]), t, text, added_cond_kwargs=added).sample.chunk(2)
        guided: Tensor = empty + 3.0 * (named - empty)
        return guided

    return model


def of_class(name: str) -> Any:
    flow = name.startswith("FlowMatch")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    clips = {"clip_sample": False} if name == "DDIMScheduler" else {}
    return getattr(diffusers, name)(**({} if flow else {**betas, **clips}))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of DEIS in diffusers
@pytest.mark.parametrize("name", sorted(name for name in SCHEDULERS if not name.startswith("FlowMatch")))
def test_averaging_outputs_is_averaging_steps_of_the_schedulers_named(name: str) -> None:
    """Several steps of each, with a history of its own for every view."""
    pipe, arguments = built("SDXL")
    pipe.scheduler, size = of_class(name), (16, 8)
    with scalediff.patch_model(pipe, window=WINDOW):
        stage = run(pipe, size, arguments, MultiDiffusion(view_batch=2), steps=5)
    noise = torch.randn(1, 4, 8, 4, generator=seeded())
    expected = by_definition(sdxl_model(pipe, arguments, size), laid_out(pipe.scheduler, 5), noise, window=4, stride=2)
    scale = expected.abs().max()
    torch.testing.assert_close(stage.latents.double() / scale, expected / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_sd3_is_the_published_loop(name: str) -> None:
    """Its positions lie around the centre of a table: those of a view are a native picture's."""
    pipe, arguments = built("SD3")
    pipe.scheduler = of_class(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        stage = run(pipe, (32, 48), arguments)
    transformer = copy.deepcopy(pipe.transformer).double()
    text, pooled = (
        torch.cat([arguments[f"negative_{name}"], arguments[name]]).double() for name in ("prompt_embeds", "pooled_prompt_embeds")
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = transformer(torch.cat([x, x]), text, pooled, t.expand(2).double(), return_dict=False)[0]
        guided: Tensor = out[:1] + 3.0 * (out[1:] - out[:1])
        return guided

    noise = torch.randn(1, 4, 16, 24, generator=seeded())
    expected = by_definition(model, laid_out(pipe.scheduler, 4), noise, window=8, stride=4)
    torch.testing.assert_close(stage.latents.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("view_batch", [1, 2])
def test_flux_is_the_published_loop_on_the_schedule_of_a_window(view_batch: int) -> None:
    pipe, arguments = built("FLUX")
    seen: list[Tensor] = []
    remover = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["img_ids"]), with_kwargs=True)
    with scalediff.patch_model(pipe, window=WINDOW):
        stage = run(pipe, (32, 48), arguments, MultiDiffusion(view_batch=view_batch))
    remover.remove()
    assert len(seen) == 4 * math.ceil(3 * 5 / view_batch)
    assert all(torch.equal(table, ids(WINDOW)) for table in seen)
    transformer = copy.deepcopy(pipe.transformer).double()
    text, pooled = (arguments[name].double() for name in ("prompt_embeds", "pooled_prompt_embeds"))

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = transformer(
            pack(x), text, pooled, (t.expand(1) / 1000).double(), img_ids=ids(WINDOW), txt_ids=torch.zeros(6, 3), return_dict=False
        )[0]  # fmt: skip
        return unpack(out, (8, 8))

    sigmas = torch.linspace(1, 1 / 4, 4).numpy()
    scheduler = laid_out(pipe.scheduler, None, sigmas=sigmas, mu=0.5 + (16 - 4) * (1.15 - 0.5) / (64 - 4))  # type: ignore[arg-type]
    noise = torch.randn(1, 4, 16, 24, generator=seeded())
    expected = by_definition(model, scheduler, noise, window=8, stride=4)
    torch.testing.assert_close(stage.latents.double(), expected, rtol=1e-3, atol=1e-3)


def test_lumina_next_sees_every_view_as_a_native_picture() -> None:
    """Neither are positions stretched nor is attention sharpened, by the pipeline's rules for large pictures."""
    pipe, arguments = built("Lumina-Next")
    pipe.default_image_size = 64  # 16 pixels a token: then the native picture has 4 x 4
    seen: list[tuple[Tensor, Any]] = []
    remover = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["image_rotary_emb"], kwargs["cross_attention_kwargs"])), with_kwargs=True
    )
    arguments["proportional_attn"] = True
    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        original_call(pipe)(pipe, **arguments, height=64, width=64, num_inference_steps=2, output_type="latent", generator=seeded())
        of_the_pipeline = seen[0]
        seen.clear()
        run(pipe, (2 * native[0], 2 * native[1]), arguments)
    remover.remove()
    assert pipe.default_image_size == 64
    assert all(torch.equal(rotary, of_the_pipeline[0]) and how == of_the_pipeline[1] for rotary, how in seen)


@pytest.mark.parametrize("name", CUT)
def test_at_native_size_it_is_the_pipelines_own_picture(name: str) -> None:
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        stage = run(pipe, native, arguments)
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "generator": seeded()}
        own = pipe(**arguments, height=native[0], width=native[1], **how).images
    assert torch.equal(stage.latents, unpack(own, (8, 8)) if name == "FLUX" else own)


@pytest.mark.parametrize("name", CUT)
def test_a_view_as_large_as_the_picture_costs_no_bit(name: str) -> None:
    """Cutting, joining and averaging one view."""
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, **arguments}
        own = running.generate_latents(pipe, {**how, "generator": seeded()}, native)
        grid = latent_size(pipe, native)

        def compute(denoise: Any) -> Tensor:
            return average(denoise([denoise.latents]), [(0, 0)], grid)

        with running.replace_denoiser(pipe, compute, size=grid, view_batch=1, method="this"):
            assert torch.equal(running.generate_latents(pipe, {**how, "generator": seeded()}, native), own)


@pytest.mark.parametrize("name", CUT)
def test_views_see_nothing_but_themselves_and_come_alone_or_together(name: str) -> None:
    """The first of two halves does not change with the second one's noise; batches of views change roundings at most."""
    pipe, arguments = built(name)
    arguments |= FREE.get(name, {})
    with scalediff.patch_model(pipe, window=WINDOW):
        native = native_size(pipe)
        y, x = native[0] // 2, native[1] // 2
        noise = torch.randn(1, 4, y, 2 * x, generator=seeded())
        other = torch.cat([noise[..., :x], torch.randn(1, 4, y, x, generator=seeded(1))], dim=-1)
        size, options = (native[0], 2 * native[1]), MultiDiffusion(stride=min(x, y))
        given = [arguments | {"latents": pack(one) if name == "FLUX" else one} for one in (noise, other)]
        first, second = (run(pipe, size, one, options).latents for one in given)
        together = run(pipe, size, given[0], replace(options, view_batch=5)).latents
    assert torch.equal(first[..., :x], second[..., :x])
    assert not torch.equal(first[..., x:], second[..., x:])
    torch.testing.assert_close(together, first, rtol=1e-3, atol=1e-3)


def test_prompts_in_a_batch_are_drawn_as_alone(demo: Any) -> None:
    prompts = [PROMPT, "a sun over hills at noon"]
    both = run(demo, (96, 64), {"prompt": prompts, "generator": [seeded(0), seeded(1)]}, MultiDiffusion(view_batch=3), steps=2).latents
    for i, prompt in enumerate(prompts):
        alone = run(demo, (96, 64), {"prompt": prompt, "generator": seeded(i)}, steps=2).latents
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [pytest.param("torch.compile", marks=pytest.mark.slow), "in place"])
def test_compiled_models_see_views(how: str) -> None:
    """A wrapper around the denoiser, and a denoiser that is compiled itself."""
    pipe, arguments = built("SD3")
    expected = run(pipe, (32, 32), arguments).latents
    if how == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    kind = type(pipe.transformer)
    torch.testing.assert_close(run(pipe, (32, 32), arguments).latents, expected, rtol=1e-4, atol=1e-4)
    assert type(pipe.transformer) is kind


@pytest.mark.parametrize("name", ["FLUX", "SD3", "SDXL"])
def test_it_runs_in_half_precision(name: str) -> None:
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        size = 2 * native_size(pipe)[0], 3 * native_size(pipe)[1]
        exact = run(pipe, size, arguments, steps=2).latents
        half = run(pipe.to(torch.bfloat16), size, {name: x.bfloat16() for name, x in arguments.items()}, steps=2).latents
    assert half.dtype == torch.bfloat16
    assert (half - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize(("name", "patched"), [("FLUX", True), ("SDXL", True), ("SDXL", False), ("Lumina-Next", False)])
def test_the_pipeline_is_given_back_as_it_was(name: str, patched: bool) -> None:
    """Also after an exception in the middle of a step; the global generator is not used."""
    pipe, arguments = built(name)
    denoiser = pipe.unet if name == "SDXL" else pipe.transformer
    handle = scalediff.patch_model(pipe, window=WINDOW) if patched else None
    native = native_size(pipe)
    size = 2 * native[0], native[1]
    run(pipe, native, arguments)  # the pipelines keep their arguments

    def state() -> Any:
        own = state_of(denoiser), pipe.scheduler, sorted(pipe.__dict__), dict(pipe._progress_bar_config), torch.get_rng_state().tolist()
        assert handle is None or handle.attention == "npa"
        return *own, getattr(pipe, "default_image_size", None)

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("in the middle")

    before, calls = state(), []
    run(pipe, size, {**arguments, "generator": None}, progress=False)
    assert state() == before
    remover = denoiser.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, size, arguments, progress=True)
    remover.remove()
    assert state() == before


def test_the_stage_is_reported(demo: Any) -> None:
    seen: list[Stage] = []
    stage = run(demo, (96, 64), {"prompt": PROMPT}, on_stage=seen.append)
    assert seen == [stage]
    assert stage.seconds > 0
    assert METHODS["multidiffusion"] == (MultiDiffusion, multidiffusion, True)
