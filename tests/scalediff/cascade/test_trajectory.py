"""`anchor="trajectory"`: structure guidance towards what the base stage took for the clean picture at the same noise."""

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
from scalediff.cascade.latents import pack, unpack
from scalediff.cascade.schedule import Guidance
from scalediff.settings import Settings
from scalediff_kernels import low_pass
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built, picture

diffusers = pytest.importorskip("diffusers")

TRAJECTORY = Settings(steps=5, restart=0.6, guidance_scale=0.0, lfm_cutoff=0.5, sg_cutoff=0.5, anchor="trajectory")


@torch.no_grad()
def flux_by_hand(pipe: Any, arguments: dict[str, Any], anchored: list[int]) -> Tensor:
    """FLUX from 8 to 16 latents by 5 Euler steps, the last 3 run again, drawn to the base stage's estimates of these steps."""
    rng, steps, cutoff = seeded(), 5, 0.5
    mu = 0.5 + (16 - 4) * (1.15 - 0.5) / (64 - 4)
    even = np.linspace(1, 1 / steps, steps)
    sigmas = [*(np.exp(mu) / (np.exp(mu) + (1 / even - 1))).tolist(), 0.0]

    def velocity(x: Tensor, sigma: float) -> Tensor:
        size = x.shape[2], x.shape[3]
        tokens = pipe.transformer(
            hidden_states=pack(x), timestep=torch.tensor([sigma]), encoder_hidden_states=arguments["prompt_embeds"],
            pooled_projections=arguments["pooled_prompt_embeds"], txt_ids=torch.zeros(6, 3), img_ids=ids((size[0] // 2, size[1] // 2)),
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, size)

    x: Tensor = torch.randn(1, 4, 8, 8, generator=rng)
    taken: list[Tensor] = []
    for now, after in itertools.pairwise(sigmas):
        v = velocity(x, now)
        taken.append(x - now * v)
        x = x + (after - now) * v
    larger = F.interpolate(pipe.vae.decode(x / 0.4 + 0.1).sample, size=(32, 32), mode="bicubic")
    z_ru, z_lu = (pipe.vae.encode(larger).latent_dist.mean - 0.1) * 0.4, F.interpolate(x, size=(16, 16), mode="bicubic")
    reference = z_ru - low_pass(z_ru, cutoff=cutoff) + low_pass(z_lu, cutoff=cutoff)
    x = (1 - sigmas[2]) * reference + sigmas[2] * torch.randn(reference.shape, generator=rng)
    for anchor, (now, after) in zip(anchored, list(itertools.pairwise(sigmas))[2:], strict=True):
        clean = x - now * velocity(x, now)
        wanted = F.interpolate(taken[anchor], size=(16, 16), mode="bicubic")
        clean = clean + now * (low_pass(wanted, cutoff=cutoff) - low_pass(clean, cutoff=cutoff))
        x = clean + after * (x - clean) / now
    return x


def test_packed_latents_are_drawn_to_the_base_stage() -> None:
    pipe, arguments = built("FLUX")
    with scalediff.patch_model(pipe, window=WINDOW):
        result = scalediff.generate(pipe, None, height=32, width=32, call=arguments, generator=seeded(), preset=TRAJECTORY)
    with scalediff.patch_model(pipe.transformer, window=WINDOW):
        expected, shifted = (flux_by_hand(pipe, arguments, anchored) for anchored in ([2, 3, 4], [1, 2, 3]))
    torch.testing.assert_close(result.stages[-1].latents, expected, rtol=1e-4, atol=1e-4)
    assert (shifted - expected).abs().max() > 0.01


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_every_model_call_has_the_estimate_at_its_own_noise(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of different lengths; Heun calls the model twice a step but for the last."""
    pipe, arguments = built("SDXL")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    seen: list[tuple[Tensor, float, Tensor]] = []
    own_step = type(pipe.scheduler).step

    def spy(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((model_output, float(timestep), sample))
        return own_step(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", spy)
    handed: list[Guidance] = []

    def keep(*args: Any, **kwargs: Any) -> Guidance:
        handed.append(Guidance(*args, **kwargs))
        return handed[-1]

    monkeypatch.setattr("scalediff.cascade.stage.Guidance", keep)
    chosen = Settings(steps=4, restart=(0.75, 0.5), guidance_scale=2.0, lfm_cutoff=0.5, sg_cutoff=0.5, anchor="trajectory")
    scalediff.generate(pipe, None, height=32, width=32, call=arguments, generator=seeded(), preset=chosen)

    order = pipe.scheduler.order
    counts = [order * (steps - 1) + 1 for steps in (4, 3, 2)]
    assert len(seen) == sum(counts)
    base, stages = seen[: counts[0]], (seen[counts[0] : sum(counts[:2])], seen[-counts[2] :])
    sigma_of = dict(enumerate(pipe.scheduler.alphas_cumprod.double().rsqrt().square().sub(1).sqrt().tolist()))
    for stage, guidance in zip(stages, handed, strict=True):
        assert guidance.trajectory is not None
        assert len(guidance.trajectory) == len(stage)
        for (_, time, _), anchor, (output, base_time, sample) in zip(stage, guidance.trajectory, base[-len(stage) :], strict=True):
            assert time == base_time
            sigma = sigma_of[int(time)] if time == int(time) else float(np.interp(time, list(sigma_of), list(sigma_of.values())))
            preserved = scheduler.startswith("DPM")
            x0 = sample * (1 + sigma**2) ** 0.5 - sigma * output if preserved else sample - sigma * output
            torch.testing.assert_close(anchor, x0, rtol=5e-3, atol=5e-3)  # schedulers round their times, or interpolate between them


def test_without_structure_guidance_there_is_nothing_to_anchor() -> None:
    pipe, arguments = built("SDXL")
    how: dict[str, Any] = {"height": 16, "width": 16, "call": arguments, "steps": 2, "restart": 0.5, "sg": False, "lfm_cutoff": 0.5}
    anchored, plain = (
        scalediff.generate(pipe, None, generator=seeded(), preset=Settings(anchor=anchor), **how).stages[-1].latents
        for anchor in ("trajectory", "picture")
    )
    assert torch.equal(anchored, plain)


def test_a_picture_has_no_trajectory() -> None:
    pipe, arguments = built("SDXL")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("nothing may be drawn"))
    how: dict[str, Any] = {"height": 16, "width": 16, "call": arguments, "preset": TRAJECTORY}
    with pytest.raises(ValueError, match="anchor='trajectory' needs a base stage, which upscale does not have"):
        scalediff.upscale(pipe, picture(8, 8), None, **how)


def test_a_schedule_that_starts_again_has_other_calls() -> None:
    pipe, arguments = built("SDXL")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("nothing may be drawn"))
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    how: dict[str, Any] = {"height": 16, "width": 16, "call": arguments, "preset": TRAJECTORY}
    with pytest.raises(NotImplementedError, match="needs stages with the last model calls of the base stage, got PNDMScheduler"):
        scalediff.generate(pipe, None, **how)


def test_at_the_native_size_there_is_none_either() -> None:
    pipe, arguments = built("SDXL")
    how: dict[str, Any] = {"height": 8, "width": 8, "call": arguments, "steps": 2}
    anchored, plain = (
        scalediff.generate(pipe, None, generator=seeded(), preset=Settings(anchor=anchor), **how).stages[-1].latents
        for anchor in ("trajectory", "picture")
    )
    assert torch.equal(anchored, plain)
