"""HiFlow: the published loop, written by hand in fp64, gives the same picture on FLUX.1 and on another flow model."""

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
from bench.models.inputs import ids
from bench.models.zoo import WINDOW
from scalediff.cascade.latents import pack, unpack
from scalediff.cascade.pipeline import native_size, preset
from scalediff.cascade.results import Stage
from scalediff.methods import DiffuseHigh, HiFlow
from scalediff.methods.flux_extrapolation import Extrapolation
from scalediff.methods.hiflow import hiflow
from scalediff.methods.restarts import tail_steps
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

STEPS, GUIDANCE = 9, 3.0
Model = Callable[[Tensor, float, int, int], Tensor]  # latents, sigma, number of the stage, of the step in it -> guided velocity


def run(pipe: Any, size: tuple[int, int], arguments: dict[str, Any], options: HiFlow | None = None, **more: Any) -> list[Stage]:
    settings = replace(preset(pipe), steps=STEPS, guidance_scale=GUIDANCE)
    return hiflow(pipe, {"generator": seeded(), **arguments}, size, settings, options or HiFlow(), **more)


@torch.no_grad()
def by_hand(
    model: Model, vae: Any, sigmas: list[float], sides: list[int], tails: list[int], alphas: list[float], betas: list[float], cutoff: float
) -> list[Tensor]:
    """Every stage in fp64; sides are in latents, of 2 pixels each."""
    rng = seeded()

    def low_pass(x: Tensor) -> Tensor:
        f = torch.fft.fftshift(torch.fft.fftfreq(x.shape[-1])).double() * 2
        mask = 1 / (1 + ((f[:, None] ** 2 + f[None, :] ** 2) / cutoff**2) ** 4)
        return torch.fft.ifft2(torch.fft.ifftshift(torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) * mask, dim=(-2, -1))).real

    x = torch.randn(1, 4, sides[0], sides[0], generator=rng).double()
    stored: dict[float, Tensor] = {}
    for i in range(STEPS):
        v = model(x, sigmas[i], 0, i)
        stored[sigmas[i]] = x - sigmas[i] * v
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    found = [x]
    for stage, (side, n, alpha, beta) in enumerate(zip(sides[1:], tails, alphas, betas, strict=True), start=1):
        g = (vae.decode(found[-1] / 0.4 + 0.1).sample / 2 + 0.5).clamp(0, 1)
        g = F.interpolate(g, size=(2 * side, 2 * side), mode="bicubic")
        std = 0.1 + 1.9 * float(torch.rand((), generator=rng))
        e = math.exp(-1 / (2 * std**2))
        kernel = torch.tensor([[e * e, e, e * e], [e, 1, e], [e * e, e, e * e]], dtype=torch.float64)
        g = 2 * g - F.conv2d(F.pad(g, (1, 1, 1, 1), mode="reflect"), (kernel / kernel.sum()).expand(3, 1, 3, 3), groups=3)
        clean, first = (vae.encode(2 * g - 1).latent_dist.mean - 0.1) * 0.4, STEPS - n
        noise = torch.randn(1, 4, side, side, generator=rng).double()
        x = sigmas[first] * noise + (1 - sigmas[first]) * clean
        own: dict[float, Tensor] = {}
        v_prev = ref_prev = None
        for i in range(n):
            sigma = sigmas[first + i]
            x0 = x - sigma * model(x, sigma, stage, i)
            ref = F.interpolate(stored[sigma], size=(side, side), mode="bicubic")
            x0 = x0 + alpha * (n - i) / n * low_pass(ref - x0)
            v, v_ref = (x - x0) / sigma, (x - ref) / sigma
            if v_prev is not None and ref_prev is not None:
                v = v + beta * (n - i) / n * (v_prev + v_ref - ref_prev - v)
            v_prev, ref_prev = v, v_ref
            own[sigma] = x - sigma * v
            x = x + (sigmas[first + i + 1] - sigma) * v
        stored |= own
        found.append(x)
    return found


def close(stages: list[Stage], expected: list[Tensor]) -> None:
    for stage, latents in zip(stages, expected, strict=True):
        size = latents.abs().max()
        torch.testing.assert_close(stage.latents.double() / size, latents / size, rtol=1e-3, atol=1e-3)


def shifted_schedule(shift: float, n: int = STEPS) -> list[float]:
    """What a static shift makes of evenly spaced sigmas."""
    sigmas = [1 - i / n for i in range(n)]
    return [*(shift * s / (1 + (shift - 1) * s) for s in sigmas), 0.0]


def flux_model(pipe: Any, arguments: dict[str, Any], *, published: bool) -> Model:
    """FLUX.1 with the changes of positions, attention and token grid made in other ways than in the library."""
    plain = copy.deepcopy(pipe.transformer).double()
    longer = copy.deepcopy(plain)
    longer.pos_embed.theta *= 10
    text, pooled = (arguments[name].double() for name in ("prompt_embeds", "pooled_prompt_embeds"))
    native, guidance = 16, (GUIDANCE, 4.5, 6.0) if published else (GUIDANCE,) * 3

    def run_model(transformer: Any, x: Tensor, sigma: float, w: float) -> Tensor:
        rows = x.shape[-1] // 2
        scales = {"guidance": torch.tensor([w]).double()} if transformer.config.guidance_embeds else {}
        positions = {"img_ids": ids((rows, rows)), "txt_ids": torch.zeros(6, 3)}
        out = transformer(pack(x), text, pooled, torch.tensor([sigma]).double(), **positions, **scales, return_dict=False)[0]
        return unpack(out, (2 * rows, 2 * rows))

    def model(x: Tensor, sigma: float, stage: int, step: int) -> Tensor:
        if stage == 0 or not published:
            return run_model(plain, x, sigma, guidance[stage])
        padded = step % 2 == 0
        given = F.pad(x, (1, 1, 1, 1)) if padded else x
        sharper = copy.deepcopy(longer)
        factor = math.sqrt(math.log((given.shape[-1] // 2) ** 2 + 6, native + 6))
        for module in sharper.modules():
            for norm in (getattr(module, "norm_q", None), getattr(module, "norm_added_q", None)):
                if norm is not None:
                    norm.weight.data *= factor
        out = run_model(sharper, given, sigma, guidance[stage])
        return out[..., 1:-1, 1:-1] if padded else out

    return model


@pytest.mark.parametrize("published", [True, False])
def test_flux_is_the_published_loop(published: bool) -> None:
    """With the authors' options in two stages, and without the changes of the model and with others in one."""
    pipe, arguments = built("FLUX")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    if published:  # FLUX.1-dev takes the guidance scale as an input
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe.register_modules(
                transformer=type(pipe.transformer).from_config({**pipe.transformer.config, "guidance_embeds": True}).eval()
            )
    off = {"rope_scale": 1.0, "proportional": False, "shift_patches": False, "guidance_scale": GUIDANCE}
    options = HiFlow() if published else HiFlow(restart=0.5, alpha=0.6, beta=0.3, cutoff=0.4, **off)  # type: ignore[arg-type]
    with scalediff.patch_model(pipe, window=WINDOW):
        stages = run(pipe, (64, 64) if published else (32, 32), arguments, options)
    tails = [5, 3] if published else [4]
    assert [stage.steps for stage in stages] == [STEPS, *tails]
    model = flux_model(pipe, arguments, published=published)
    how: dict[str, Any] = {"alphas": [1.0, 0.25], "betas": [0.5, 0.5], "cutoff": 0.2}
    how = how if published else {"alphas": [0.6], "betas": [0.3], "cutoff": 0.4}
    sides = [stage.latents.shape[-1] for stage in stages]
    close(stages, by_hand(model, copy.deepcopy(pipe.vae).double(), shifted_schedule(3.0), sides, tails, **how))


def test_sd3_is_the_published_loop() -> None:
    """Classifier-free guidance at the run's own scale; its scheduler ends evenly spaced timesteps in another way."""
    pipe, arguments = built("SD3")
    with scalediff.patch_model(pipe, window=WINDOW):
        stages = run(pipe, (32, 32), arguments)
    transformer, scheduler = copy.deepcopy(pipe.transformer).double(), copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    text, pooled = (
        torch.cat([arguments[f"negative_{name}"], arguments[name]]).double() for name in ("prompt_embeds", "pooled_prompt_embeds")
    )

    def model(x: Tensor, sigma: float, stage: int, step: int) -> Tensor:
        t = torch.tensor([1000 * sigma] * 2).double()
        empty, named = transformer(torch.cat([x, x]), text, pooled, t, return_dict=False)[0].chunk(2)
        return empty + GUIDANCE * (named - empty)  # type: ignore[no-any-return]

    sides = [stage.latents.shape[-1] for stage in stages]
    sigmas = scheduler.sigmas.double().tolist()
    close(stages, by_hand(model, copy.deepcopy(pipe.vae).double(), sigmas, sides, [5], alphas=[1.0], betas=[0.5], cutoff=0.2))


def test_the_pipeline_is_given_back_as_it_was() -> None:
    """Also after an error in the middle of a changed stage."""
    pipe, arguments = built("FLUX")

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == STEPS + 2:
            raise RuntimeError("in the middle")

    with scalediff.patch_model(pipe, window=WINDOW):
        native, calls = native_size(pipe), list[int]()
        (own,) = run(pipe, native, arguments)
        before = state_of(pipe.transformer), pipe.scheduler, pipe.transformer.pos_embed.theta, torch.get_rng_state().tolist()
        stages = run(pipe, (32, 32), arguments, HiFlow(dynamic_shifting=True))
        assert torch.equal(stages[0].latents, own.latents)
        assert (state_of(pipe.transformer), pipe.scheduler, pipe.transformer.pos_embed.theta, torch.get_rng_state().tolist()) == before
        remover = pipe.transformer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            run(pipe, (32, 32), arguments)
        remover.remove()
        assert (state_of(pipe.transformer), pipe.scheduler, pipe.transformer.pos_embed.theta, torch.get_rng_state().tolist()) == before


def test_the_authors_steps() -> None:
    assert [tail_steps(30, share) for share in HiFlow().restart] == [16, 10]  # type: ignore[union-attr]
    assert DiffuseHigh().restart == 0.3


def test_what_it_cannot_run_is_refused(demo: Any) -> None:
    with pytest.raises(NotImplementedError, match="HiFlow needs a flow model with FlowMatchEulerDiscreteScheduler, got DDIMScheduler"):
        run(demo, (128, 128), {"prompt": ""})
    pipe, arguments = built("SD3")
    message = "shift_patches changes the positions or attention of FLUX.1, got SD3Transformer2DModel"
    with scalediff.patch_model(pipe, window=WINDOW), pytest.raises(NotImplementedError, match=message):
        run(pipe, (32, 32), arguments, HiFlow(shift_patches=True))
    changed = Extrapolation((8, 8), rope_scale=1.0, native_tokens=None, shift_patches=True)
    with pytest.raises(NotImplementedError, match="shift_patches does not support a ControlNet, which has tokens of its own; turn it off"):
        changed._run(lambda: None, {"controlnet_block_samples": [torch.zeros(1)]}, step=0)
    for changes, message in (
        ({"restart": (0.5, 0.0)}, r"restart must lie in \(0, 1\], got restart=0.0"),
        ({"alpha": ()}, r"alpha must be a number, or one number for each stage, got alpha=\(\)"),
        ({"cutoff": 0}, "cutoff must be positive, got cutoff=0"),
        ({"sharpness": -1}, "sharpness must not be negative, got sharpness=-1"),
        ({"rope_scale": 0}, "rope_scale must be positive, got rope_scale=0"),
    ):
        with pytest.raises(ValueError, match=message):
            HiFlow(**changes)  # type: ignore[arg-type]
