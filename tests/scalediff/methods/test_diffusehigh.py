"""DiffuseHigh: the published loop, written by hand in fp64 with pywt's wavelet, gives the same picture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import native_size, preset
from scalediff.cascade.results import Stage
from scalediff.methods import DiffuseHigh
from scalediff.methods.diffusehigh import diffusehigh, plan
from scalediff.methods.restarts import tail_steps
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")
pywt = pytest.importorskip("pywt")

STEPS, GUIDANCE = 6, 3.0
SLOW = ("SD3", "Lumina 2", "Qwen-Image", "Z-Image")
Model = Callable[[Tensor, Tensor, float], Tensor]  # scaled latents, timestep and guidance scale -> guided epsilon


def run(
    pipe: Any, size: tuple[int, int], arguments: dict[str, Any], options: DiffuseHigh | None = None, *, steps: int = STEPS, **more: Any
) -> list[Stage]:
    settings = replace(preset(pipe), steps=steps, guidance_scale=GUIDANCE)
    return diffusehigh(pipe, {"generator": seeded(), **arguments}, size, settings, options or DiffuseHigh(), **more)


@torch.no_grad()
def by_hand(model: Model, vae: Any, scheduler: Any, sizes: list[tuple[int, int]], *, scale: float, tail: int, guided: int) -> list[Tensor]:
    """Every stage in fp64 with Euler's step in its x0 form, pictures in [0, 1]."""
    rng = seeded()
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    sigmas, times, factor = scheduler.sigmas.double(), scheduler.timesteps, float(vae.config.scaling_factor)
    shift = float(vae.config.shift_factor)

    def decode(z: Tensor) -> Tensor:
        picture: Tensor = vae.decode(z / factor + shift).sample
        return (picture / 2 + 0.5).clamp(0, 1)

    def encode(picture: Tensor) -> Tensor:
        z: Tensor = (vae.encode(2 * picture - 1).latent_dist.mean - shift) * factor
        return z

    def denoise(x: Tensor, first: int, w: float, fix: Callable[[int, Tensor], Tensor]) -> Tensor:
        for i in range(first, STEPS):
            eps = model(x / math.sqrt(sigmas[i] ** 2 + 1), times[i], w)
            x0 = fix(i - first, x - sigmas[i] * eps)
            x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    z = torch.randn(1, 4, *(side // 2 for side in sizes[0]), generator=rng).double() * float(scheduler.init_noise_sigma)
    found = [denoise(z, 0, GUIDANCE, lambda i, x0: x0)]
    for size in sizes[1:]:
        g = F.interpolate(decode(found[-1]), size=size, mode="bicubic")
        std = 0.1 + 1.9 * float(torch.rand((), generator=rng))
        e = math.exp(-1 / (2 * std**2))
        kernel = torch.tensor([[e * e, e, e * e], [e, 1, e], [e * e, e, e * e]], dtype=torch.float64)
        blurred = F.conv2d(F.pad(g, (1, 1, 1, 1), mode="reflect"), (kernel / kernel.sum()).expand(3, 1, 3, 3), groups=3)
        g = 2 * g - blurred
        band, _ = pywt.dwt2(g.numpy(), "db4", mode="symmetric")

        def fix(i: int, x0: Tensor, band: Any = band, size: tuple[int, int] = size) -> Tensor:
            if i >= guided:
                return x0
            _, details = pywt.dwt2(decode(x0).numpy(), "db4", mode="symmetric")
            picture: np.ndarray[Any, Any] = pywt.idwt2((band, details), "db4", mode="symmetric")[..., : size[0], : size[1]]
            return encode(torch.from_numpy(picture))

        noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=rng).double()
        found.append(denoise(encode(g) + sigmas[STEPS - tail] * noise, STEPS - tail, scale, fix))
    return found


@pytest.mark.parametrize(
    ("options", "scale", "tail", "guided"),
    [
        (DiffuseHigh(), 10.0, 2, 1),
        pytest.param(DiffuseHigh(restart=0.5, guided=0.8, guidance_scale=4.0), 4.0, 3, 2, marks=pytest.mark.slow),
    ],
)
def test_sdxl_is_the_published_loop(options: DiffuseHigh, scale: float, tail: int, guided: int) -> None:
    """Three stages, an odd number of latents; the size conditioning is the base's throughout, guidance above it the authors'."""
    pipe, arguments = built("SDXL")
    pipe.unet.register_to_config(sample_size=8)
    stages = run(pipe, (32, 32), arguments, options)
    sizes = [(stage.height, stage.width) for stage in stages]
    assert sizes == [(16, 16), (24, 24), (32, 32)]
    assert [stage.steps for stage in stages] == [STEPS, tail, tail]
    unet, vae = copy.deepcopy(pipe.unet).double(), copy.deepcopy(pipe.vae).double()
    text, pooled = (
        torch.cat([arguments[f"negative_{part}"], arguments[part]]).double() for part in ("prompt_embeds", "pooled_prompt_embeds")
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2).double()}

    def model(x: Tensor, t: Tensor, w: float) -> Tensor:
        empty, named = unet(torch.cat([x, x]), t, text, added_cond_kwargs=added).sample.chunk(2)
        return empty + w * (named - empty)  # type: ignore[no-any-return]

    expected = by_hand(model, vae, pipe.scheduler, sizes, scale=scale, tail=tail, guided=guided)
    for stage, latents in zip(stages, expected, strict=True):
        size = latents.abs().max()
        torch.testing.assert_close(stage.latents.double() / size, latents / size, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["FLUX", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_runs_on_flow_models_and_gives_the_pipeline_back(name: str) -> None:
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW) as handle:
        native = native_size(pipe)
        run(pipe, native, arguments)  # the pipelines keep their arguments
        before = state_of(pipe.transformer), pipe.scheduler, torch.get_rng_state().tolist()
        stages = run(pipe, (2 * native[0], 2 * native[1]), arguments)
        assert (state_of(pipe.transformer), pipe.scheduler, torch.get_rng_state().tolist()) == before
        assert handle.attention == "npa"
    assert len(stages) == 3
    assert all(stage.latents.isfinite().all() for stage in stages)


def test_sizes_are_the_authors() -> None:
    pipe, _ = built("SDXL")
    pipe.unet.register_to_config(sample_size=512)  # at 2 pixels a latent: 1024 pixels
    sides = {side: [size[0] for size in plan(pipe, side, side)] for side in (1024, 1536, 2048, 3072, 4096)}
    assert sides[4096] == [1024, 2048, 3072, 4096]
    assert sides[2048] == [1024, 1536, 2048]
    assert (sides[1024], sides[1536], sides[3072]) == ([1024], [1024, 1536], [1024, 2048, 3072])
    assert (tail_steps(50, 0.3), round(15 * DiffuseHigh().guided)) == (15, 5)


@pytest.mark.slow
def test_one_seed_is_one_picture_and_prompts_in_a_batch_do_not_meet(demo: Any) -> None:
    prompts, how = ["a full moon", "a sun over hills at noon"], {"options": DiffuseHigh(restart=1.0, guided=0.5), "steps": 2}
    both = run(demo, (72, 64), {"prompt": prompts, "generator": [seeded(0), seeded(1)]}, **how)[-1].latents  # type: ignore[arg-type]
    for i, prompt in enumerate(prompts):
        alone = run(demo, (72, 64), {"prompt": prompt, "generator": seeded(i)}, **how)[-1].latents  # type: ignore[arg-type]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_at_native_size_and_interrupted_only_the_base_is_drawn(demo: Any) -> None:
    own = demo("a moon", num_inference_steps=2, guidance_scale=GUIDANCE, generator=seeded(), output_type="latent").images
    (stage,) = run(demo, (64, 64), {"prompt": "a moon"}, steps=2)
    assert torch.equal(stage.latents, own)

    def stop(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    seen: list[Stage] = []
    stages = run(demo, (128, 128), {"prompt": "a moon", "callback_on_step_end": stop}, steps=2, on_stage=seen.append)
    assert [(stage.height, stage.of) for stage in stages] == [(64, 3)]
    assert seen == stages


def test_what_it_cannot_run_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"restart": 0.0}, r"restart must lie in \(0, 1\], got restart=0.0"),
        ({"guided": 1.5}, r"guided must lie in \[0, 1\], got guided=1.5"),
        ({"sharpness": -1}, "sharpness must not be negative, got sharpness=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffuseHigh(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"phases set their own schedule, got timesteps=\[1\]"):
        run(demo, (128, 128), {"prompt": "", "timesteps": [1]})
    monkeypatch.setattr(demo, "scheduler", diffusers.TCDScheduler())
    with pytest.raises(NotImplementedError, match="high-resolution stages support the schedulers"):
        run(demo, (128, 128), {"prompt": ""})
