"""DemoFusion: the published loop, written by hand in fp64, gives the same picture; the pipeline is given back as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import native_size, preset
from scalediff.cascade.results import Stage
from scalediff.methods import METHODS, DemoFusion, demofusion
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

PROMPT = "a full moon over snowy mountains at night"
STEPS, GUIDANCE = 2, 3.0
# Guided output for latents at a timestep; (top, left) of a view in pixels.
Model = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def run(pipe: Any, size: tuple[int, int], arguments: dict[str, Any], options: DemoFusion | None = None, **more: Any) -> list[Stage]:
    settings = replace(preset(pipe), steps=STEPS, guidance_scale=GUIDANCE)
    return demofusion(pipe, {"generator": seeded(), **arguments}, size, settings, options or DemoFusion(), **more)


@torch.no_grad()
def by_hand(
    model: Callable[[int], Model], scheduler: Any, sizes: list[tuple[int, int]], options: DemoFusion, *, window: int
) -> list[Tensor]:
    """Every phase in fp64: each view and each dilated sample steps by itself. `model` is for a phase; sizes are in latents."""
    rng = seeded()
    stride = options.stride or window // 2
    r = (window - stride) // 4
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)

    def step(out: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """A step that leaves no trace."""
        after: Tensor = copy.deepcopy(scheduler).step(out, t, x, return_dict=False)[0]
        return after

    def starts(length: int) -> list[int]:
        return [min(i, length - window) for i in range(0, length - window + stride, stride)]

    def moved(start: int, length: int) -> int:
        ends = start == 0, start + window == length
        low, high = {(True, True): (0, 0), (True, False): (-r, 0), (False, True): (0, r), (False, False): (-r, r)}[ends]
        return start + r + int(torch.randint(low, high + 1, (), generator=jitter))

    def local(run_model: Model, x: Tensor, t: Tensor) -> Tensor:
        y, w = x.shape[-2:]
        canvas = torch.zeros(1, 4, y + 2 * r, w + 2 * r).double()
        canvas[..., r : r + y, r : r + w] = x
        value, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for i, j in [(moved(i, y), moved(j, w)) for i in starts(y) for j in starts(w)]:
            view = canvas[..., i : i + window, j : j + window]
            value[..., i : i + window, j : j + window] += step(run_model(view, t, (i, j)), t, view)
            count[..., i : i + window, j : j + window] += 1
        return (value / count)[..., r : r + y, r : r + w]

    def dilated(run_model: Model, x: Tensor, t: Tensor, s: int, std: float) -> Tensor:
        y, w = x.shape[-2:]
        up, left = -y % s, -w % s
        x = F.pad(x, (left, 0, up, 0))
        taps = torch.tensor([[math.exp(-(i * i + j * j) / (2 * std * std)) for j in range(1 - s, s)] for i in range(1 - s, s)]).double()
        blurred = F.conv2d(x, (taps / taps.sum()).expand(4, 1, -1, -1), padding=s - 1, groups=4)
        blurred = (blurred - blurred.mean()) / blurred.std() * x.std() + x.mean()
        after = torch.zeros_like(x)
        for i in range(s):
            for j in range(s):
                after[..., i::s, j::s] = step(run_model(blurred[..., i::s, j::s], t, (0, 0)), t, x[..., i::s, j::s])
        return after[..., up:, left:]

    z = torch.randn(1, 4, *sizes[0], generator=rng).double() * scheduler.init_noise_sigma
    jitter = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=rng)))
    scaled_by = copy.deepcopy(scheduler)
    for t in scheduler.timesteps:
        z = scaled_by.step(model(1)(z, t, (0, 0)), t, z, return_dict=False)[0]
    base, found = z, [z]
    for s, size in enumerate(sizes[1:], start=2):
        above = F.interpolate(z, size=size, mode="bicubic")
        noise = torch.randn(1, 4, *size, generator=rng).double()
        x = copy.deepcopy(scheduler).add_noise(above, noise, scheduler.timesteps[:1])
        for t in scheduler.timesteps:
            f = 0.5 * (1 + math.cos(math.pi * (1000 - float(t)) / 1000))
            c1, c2, c3 = f ** options.cosine_scale[0], f ** options.cosine_scale[1], 0.99 * f ** options.cosine_scale[2] + 0.01
            x = (1 - c1) * x + c1 * copy.deepcopy(scheduler).add_noise(above, noise, t[None])
            x = (1 - c2) * local(model(s), x, t) + c2 * dilated(model(s), x, t, s, options.blur_std * c3)
        z = (x - x.mean()) / x.std() * base.std() + base.mean()
        found.append(z)
    return found


def demo_model(pipe: Any) -> Model:
    unet = copy.deepcopy(pipe.unet).double()
    ids = [pipe.tokenizer(p, padding="max_length", return_tensors="pt").input_ids for p in ("", PROMPT)]
    text = torch.cat([pipe.text_encoder(one)[0] for one in ids]).double()

    def model(x: Tensor, t: Tensor, corner: tuple[int, int]) -> Tensor:
        empty, named = unet(torch.cat([x, x]), t, text).sample.chunk(2)
        guided: Tensor = empty + GUIDANCE * (named - empty)
        return guided

    return model


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param((128, 128), DemoFusion(), marks=pytest.mark.slow),
        ((80, 64), DemoFusion(stride=9, view_batch=4, cosine_scale=(2.0, 0.5, 1.5), blur_std=0.8)),
    ],
)
def test_the_embedded_model_is_the_published_loop(demo: Any, size: tuple[int, int], options: DemoFusion) -> None:
    stages = run(demo, size, {"prompt": PROMPT}, options)
    sizes = [(stage.height // 4, stage.width // 4) for stage in stages]
    model = demo_model(demo)
    expected = by_hand(lambda phase: model, demo.scheduler, sizes, options, window=16)
    for stage, latents in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.latents.double(), latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "phases", "options"),
    [
        ("DDIMScheduler", (40, 32), 3, DemoFusion(stride=3, view_batch=4, cosine_scale=(2.0, 0.5, 1.5), blur_std=0.8)),
        ("EulerDiscreteScheduler", (32, 24), 2, DemoFusion()),
    ],
)
def test_sdxl_is_the_published_loop_and_told_where_its_views_are_cropped(
    name: str, size: tuple[int, int], phases: int, options: DemoFusion
) -> None:
    """Euler scales what the denoiser is given; views have the corners of their crops in pixels, and every phase the final size."""
    pipe, arguments = built("SDXL")
    clips = {"clip_sample": False} if name == "DDIMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **clips)
    pipe.unet.register_to_config(sample_size=8)  # large enough for views to be moved
    unet = copy.deepcopy(pipe.unet).double()
    text, pooled = (
        torch.cat([arguments[f"negative_{part}"], arguments[part]]).double() for part in ("prompt_embeds", "pooled_prompt_embeds")
    )
    stages = run(pipe, size, arguments, options)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)

    def phase(s: int) -> Model:
        def model(x: Tensor, t: Tensor, corner: tuple[int, int]) -> Tensor:
            x = copy.deepcopy(scheduler).scale_model_input(x, t)
            times = torch.tensor([[*size, 2 * corner[0], 2 * corner[1], *size]] * 2)
            added = {"text_embeds": pooled, "time_ids": times.double()}
            empty, named = unet(torch.cat([x, x]), t, text, added_cond_kwargs=added).sample.chunk(2)
            guided: Tensor = empty + GUIDANCE * (named - empty)
            return guided

        return model

    sizes = [(stage.latents.shape[-2], stage.latents.shape[-1]) for stage in stages]
    expected = by_hand(phase, pipe.scheduler, sizes, options, window=8)
    assert len(stages) == phases
    for stage, latents in zip(stages, expected, strict=True):
        scale = latents.abs().max()
        torch.testing.assert_close(stage.latents.double() / scale, latents / scale, rtol=1e-3, atol=1e-3)


def test_every_phase_keeps_the_statistics_of_the_first(demo: Any) -> None:
    stages = run(demo, (136, 128), {"prompt": PROMPT})
    assert [(stage.height, stage.index, stage.of, stage.steps) for stage in stages] == [
        (64, 1, 3, STEPS), (128, 2, 3, STEPS), (136, 3, 3, STEPS),
    ]  # fmt: skip
    for stage in stages[1:]:
        torch.testing.assert_close(stage.latents.mean(), stages[0].latents.mean())
        torch.testing.assert_close(stage.latents.std(), stages[0].latents.std())


def test_at_native_size_it_is_the_pipelines_own_picture(demo: Any) -> None:
    (stage,) = run(demo, (64, 64), {"prompt": PROMPT})
    own = demo(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeded(), output_type="latent").images
    assert torch.equal(stage.latents, own)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_it_runs_in_half_precision(name: str) -> None:
    pipe, arguments = built("SDXL")
    clips = {"clip_sample": False} if name == "DDIMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **clips)
    size = 2 * native_size(pipe)[0], 3 * native_size(pipe)[1]
    exact = run(pipe, size, arguments)[-1].latents
    half = run(pipe.to(torch.bfloat16), size, {name: x.bfloat16() for name, x in arguments.items()})[-1].latents
    assert half.dtype == torch.bfloat16
    assert (half - exact).std() < 0.1 * exact.std()


def test_one_seed_is_one_picture_and_jitter_is_of_it(demo: Any) -> None:
    first, again, other, still = (
        run(demo, (96, 64), {"prompt": PROMPT, "generator": seeded(seed)}, DemoFusion(jitter=jitter))[-1].latents
        for seed, jitter in ((3, True), (3, True), (4, True), (3, False))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, still)


def test_prompts_in_a_batch_do_not_meet(demo: Any) -> None:
    prompts, options = [PROMPT, "a sun over hills at noon"], DemoFusion(jitter=False)
    both = run(demo, (96, 64), {"prompt": prompts, "generator": [seeded(0), seeded(1)]}, options)[-1].latents
    for i, prompt in enumerate(prompts):
        alone = run(demo, (96, 64), {"prompt": prompt, "generator": seeded(i)}, options)[-1].latents
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("patched", [False, True])
def test_the_pipeline_is_given_back_as_it_was(patched: bool) -> None:
    """Also after an exception in the middle of a step; the global generator is not used."""
    pipe, arguments = built("SDXL")
    handle = scalediff.patch_model(pipe, window=WINDOW) if patched else None
    native = native_size(pipe)
    run(pipe, native, arguments)  # the pipelines keep their arguments

    def state() -> Any:
        assert handle is None or handle.attention == "npa"
        return state_of(pipe.unet), pipe.scheduler, sorted(pipe.__dict__), dict(pipe._progress_bar_config), torch.get_rng_state().tolist()

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == STEPS + 3:  # in the second phase
            raise RuntimeError("in the middle")

    before, calls = state(), list[int]()
    size = 2 * native[0], 2 * native[1]
    plain = run(pipe, size, arguments, progress=False)[-1].latents
    run(pipe, size, {**arguments, "generator": None})
    assert state() == before
    remover = pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, size, arguments, progress=True)
    remover.remove()
    assert state() == before
    if handle is not None:
        handle.remove()
        assert torch.equal(run(pipe, size, arguments)[-1].latents, plain)  # a patch makes no difference


def test_phases_are_reported_as_they_end_and_an_interrupted_run_stops(demo: Any) -> None:
    seen: list[Stage] = []
    assert run(demo, (80, 64), {"prompt": PROMPT}, on_stage=seen.append) == seen
    assert METHODS["demofusion"] == (DemoFusion, demofusion, True)

    def stop(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    stages = run(demo, (128, 128), {"prompt": PROMPT, "callback_on_step_end": stop})
    assert [(stage.height, stage.of) for stage in stages] == [(64, 2)]


def test_what_it_cannot_run_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cosine_scale must be three non-negative exponents, got cosine_scale=\(1.0, -1.0, 1.0\)"):
        DemoFusion(cosine_scale=(1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"blur_std must be positive, got blur_std=0"):
        DemoFusion(blur_std=0)
    with pytest.raises(ValueError, match=r"stride must be at least 1 latent, got stride=0"):
        DemoFusion(stride=0)
    monkeypatch.setattr(demo.unet, "forward", lambda *_, **__: pytest.fail("the first phase was drawn"))
    with pytest.raises(ValueError, match="stride must be at most the window's 16 latents"):
        run(demo, (128, 128), {"prompt": PROMPT}, DemoFusion(stride=17))
    with pytest.raises(ValueError, match=r"phases set their own schedule, got timesteps=\[1\]"):
        run(demo, (128, 128), {"prompt": PROMPT, "timesteps": [1]})
    pipe, arguments = built("SD3")
    not_a_unet = pytest.raises(NotImplementedError, match="DemoFusion needs a U-Net, got SD3Transformer2DModel")
    with scalediff.patch_model(pipe, window=WINDOW), not_a_unet:
        run(pipe, (32, 32), arguments)
    monkeypatch.setattr(demo, "scheduler", diffusers.DPMSolverMultistepScheduler())
    with pytest.raises(NotImplementedError, match="DDIMScheduler, EulerDiscreteScheduler, got DPMSolverMultistepScheduler"):
        run(demo, (128, 128), {"prompt": PROMPT})
