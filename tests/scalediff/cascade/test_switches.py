"""The switches of a run against the method written by hand, and settings that are one for each stage.

Legend: abar share of the signal, x = sqrt(abar) x0 + sqrt(1 - abar) eps; sigma noise of a flow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import preset
from scalediff.cascade.schedule import Guidance, guided_scheduler
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings
from scalediff_kernels import low_pass
from scalediff_kernels.lowpass.geometry import Kind
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built, picture

diffusers = pytest.importorskip("diffusers")

PROMPT = "a full moon over snowy mountains at night"
STEPS, KEPT = 10, 4


def noise(seed: int, size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(1, 4, *size, generator=seeded(seed), dtype=torch.float64)


# One step, in float64


@pytest.mark.parametrize("kind", ["resize", "gaussian", "butterworth"])
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_every_call_is_guided_with_its_own_cutoff_and_anchor(
    name: str, trajectory: bool, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 0.75 at the first call to 0.25 at the last, by the same amount each; Heun has more calls than steps."""
    base, received = getattr(diffusers, name)(), []
    own_step = type(base).step

    def spy(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(model_output)
        return own_step(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(base), "step", spy)
    calls = base.order * (KEPT - 1) + 1
    anchors = [noise(10 + i, (6, 8)) for i in range(calls)] if trajectory else None
    guidance = Guidance(noise(1), 0.25, start=0.75, kind=kind, trajectory=anchors)
    guided = guided_scheduler(base, steps=STEPS, last_steps=KEPT, guidance=guidance)
    guided.set_timesteps(KEPT)
    sigmas = [float(s) for s in guided.sigmas] if hasattr(guided, "sigmas") else []
    restart, x = None, noise(0)
    assert len(guided.timesteps) == calls
    for i, t in enumerate(guided.timesteps):
        if name.startswith("FlowMatch"):
            gamma, of_x, of_output = sigmas[i], 1.0, -sigmas[i]
        else:
            abar = 1 / (1 + sigmas[i] ** 2) if sigmas else float(base.alphas_cumprod[t])
            restart = restart or abar
            gamma, ratio = (1 - abar) / (1 - restart), ((1 - abar) / abar) ** 0.5
            of_x, of_output = (1.0 if sigmas else abar**-0.5), -ratio
        output = noise(100 + i)
        if hasattr(guided, "scale_model_input"):
            guided.scale_model_input(x, t)
        before, x = x, guided.step(output, t, x, return_dict=False)[0].double()
        anchor = noise(1) if anchors is None else F.interpolate(anchors[i], size=(12, 16), mode="bicubic")
        cutoff = 0.75 - 0.5 * i / (calls - 1)
        x0 = of_x * before + of_output * output
        wanted = x0 + gamma * (low_pass(anchor, cutoff=cutoff, kind=kind) - low_pass(x0, cutoff=cutoff, kind=kind))
        torch.testing.assert_close(of_x * before + of_output * received[-1], wanted, rtol=1e-6, atol=1e-6)
        assert i or (wanted - x0).abs().max() > 0.1  # at the restart, gamma is largest


def test_a_stage_of_one_call_has_the_last_cutoff() -> None:
    step = Guidance(noise(1), 0.25, start=0.75).step(0, 1, "epsilon")
    assert step.cutoff == 0.25


# The whole run


@dataclass(frozen=True)
class Run:
    """Base at 64 and one stage to 96 by 4 DDIM steps, of which the stage runs 3."""

    filter: Kind = "resize"
    lfm_cutoff: float = 0.25
    sg_cutoff: float = 0.25
    sg_cutoff_start: float | None = None
    anchor: str = "picture"
    guidance_until: float = 1.0
    lfm: bool = True
    sg: bool = True

    @property
    def settings(self) -> Settings:
        return Settings(steps=4, restart=0.75, guidance_scale=3.0, attention="full", **vars(self))

    @torch.no_grad()
    def by_hand(self, pipe: Any) -> Tensor:
        rng, scale, last_steps = seeded(), pipe.vae.config.scaling_factor, 3
        abar, times = pipe.scheduler.alphas_cumprod.double(), [999, 749, 499, 249]
        texts = [pipe.text_encoder(pipe.tokenizer(p, padding="max_length", return_tensors="pt").input_ids)[0] for p in ("", PROMPT)]
        taken: list[Tensor] = []  # what the base stage took for the clean latents

        def smooth(x: Tensor, cutoff: float) -> Tensor:
            return low_pass(x, cutoff=cutoff, kind=self.filter)

        def ddim(x: Tensor, times: list[int], reference: Tensor | None) -> Tensor:
            for i, t in enumerate(times):
                v = pipe.unet(x, t, texts[1]).sample
                if reference is None or i < self.guidance_until * last_steps:
                    without = pipe.unet(x, t, texts[0]).sample
                    v = without + 3 * (v - without)
                a, s = float(abar[t]) ** 0.5, (1 - float(abar[t])) ** 0.5
                x0, eps = a * x - s * v, a * v + s * x
                if reference is None:
                    taken.append(x0)
                elif self.sg:
                    start = self.sg_cutoff_start or self.sg_cutoff
                    cutoff = start + (self.sg_cutoff - start) * i / (last_steps - 1)
                    anchor = (
                        F.interpolate(taken[i - last_steps], size=(24, 24), mode="bicubic") if self.anchor == "trajectory" else reference
                    )
                    x0 = x0 + float((1 - abar[t]) / (1 - abar[times[0]])) * (smooth(anchor, cutoff) - smooth(x0, cutoff))
                    eps = (x - a * x0) / s
                after = float(abar[t - 250]) if t > 250 else 1.0
                x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
            return x

        base = ddim(torch.randn(1, 4, 16, 16, generator=rng), times, None)
        rgb = F.interpolate(pipe.vae.decode(base / scale).sample, size=(96, 96), mode="bicubic")
        reference = pipe.vae.encode(rgb).latent_dist.mean * scale
        if self.lfm:
            z_lu = F.interpolate(base, size=(24, 24), mode="bicubic")
            reference = reference - smooth(reference, self.lfm_cutoff) + smooth(z_lu, self.lfm_cutoff)
        start = float(abar[times[-last_steps]])
        x = start**0.5 * reference + (1 - start) ** 0.5 * torch.randn(reference.shape, generator=rng)
        return ddim(x, times[-last_steps:], reference)


@pytest.mark.parametrize(
    "switches",
    [
        {"filter": "butterworth"},
        {"filter": "gaussian", "sg": False},
        {"filter": "gaussian", "lfm": False},
        {"sg_cutoff_start": 0.75},
        {"sg_cutoff": 0.125, "lfm_cutoff": 0.5},
        {"anchor": "trajectory"},
        {"guidance_until": 0.3},
        {"guidance_until": 0.4},  # 1.2 of 3 steps: the second is guided too
        {"guidance_until": 0.0, "anchor": "trajectory", "filter": "butterworth", "sg_cutoff_start": 0.5},
    ],
    ids=str,
)
def test_a_run_is_the_loop_written_by_hand(demo: Any, switches: dict[str, Any]) -> None:
    run, plain = Run(**switches), Run()
    result = scalediff.generate(demo, PROMPT, height=96, width=96, generator=seeded(), preset=run.settings)
    assert result.settings == run.settings
    assert [stage.steps for stage in result.stages] == [4, 3]
    expected, latents = run.by_hand(demo), result.stages[-1].latents
    # fp32 both; a dozen network calls in sequence with guidance 3 amplify single roundings.
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    assert (latents - plain_latents(demo, plain)).abs().max() > 0.02


_PLAIN: list[Tensor] = []


def plain_latents(pipe: Any, plain: Run) -> Tensor:
    """Those without a switch, drawn once."""
    if not _PLAIN:
        _PLAIN.append(plain.by_hand(pipe))
    return _PLAIN[0]


def test_with_everything_at_its_default_nothing_changes(demo: Any) -> None:
    """The named preset, its numbers as Settings, and its numbers one by one: the same bits."""
    own = preset(demo)
    how: dict[str, Any] = {"height": 128, "width": 128, "steps": 2, "restart": 0.5}
    numbers = Settings(steps=30, restart=0.3, guidance_scale=1.5)
    assert own == numbers
    named, given, none = (
        scalediff.generate(demo, PROMPT, generator=seeded(), **how, **more).stages[-1].latents
        for more in (dict[str, Any](), {"preset": numbers}, {"preset": replace(numbers, jitter="none", sg_cutoff_start=0.125)})
    )
    assert torch.equal(named, given)
    torch.testing.assert_close(named, none, rtol=1e-5, atol=1e-5)  # a cutoff that goes from itself to itself


# A setting for each stage


def drawn(name: str, settings: Settings, **more: Any) -> scalediff.Result:
    """Three stages of a small random pipeline."""
    pipe, arguments = built(name)
    with scalediff.patch_model(pipe, window=WINDOW):
        return scalediff.generate(pipe, None, height=64, width=64, call=arguments, generator=seeded(), preset=settings, **more)


drawn_once = functools.cache(drawn)  # for several tests, that which has no switch


@pytest.mark.parametrize("as_a_list", [False, True])
def test_every_stage_runs_its_own_steps(as_a_list: bool) -> None:
    pipe, arguments = built("SD3")
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["hidden_states"].shape[-1]), with_kwargs=True)
    restart: Any = [0.75, 0.25] if as_a_list else (0.75, 0.25)
    how: dict[str, Any] = {"height": 64, "width": 64, "call": arguments, "steps": 4}
    with scalediff.patch_model(pipe, window=WINDOW):
        result = scalediff.generate(pipe, None, generator=seeded(), restart=restart, lfm_cutoff=0.5, sg_cutoff=0.5, **how)
    assert [(stage.height, stage.steps) for stage in result.stages] == [(16, 4), (32, 3), (64, 1)]
    assert calls == [8] * 4 + [16] * 3 + [32]
    assert result.settings.restart == (0.75, 0.25)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("lfm_cutoff", 0.25, 0.5), ("sg_cutoff", 0.25, 0.5), ("sg_cutoff_start", 0.25, 0.75), ("guidance_until", 1.0, 0.5)],
)
def test_a_tuple_reaches_its_stage(name: str, one: float, other: float) -> None:
    plain = Settings(steps=4, restart=0.5, guidance_scale=3.0, lfm_cutoff=0.25, sg_cutoff=0.25)
    settings = (replace(plain, **{name: value}) for value in ((one, one), one, (one, other), (other, one)))  # type: ignore[arg-type]
    twice, scalar, last, first = ([stage.latents for stage in drawn_once("SD3", each).stages] for each in settings)
    assert all(torch.equal(a, b) for a, b in zip(twice, scalar, strict=True))
    assert torch.equal(last[1], scalar[1])
    assert not torch.equal(last[2], scalar[2])
    assert torch.equal(first[0], scalar[0])
    assert not torch.equal(first[1], scalar[1])


@pytest.mark.parametrize("name", ["restart", "sg_cutoff_start", "guidance_until"])
def test_a_tuple_of_another_length_draws_nothing(name: str) -> None:
    pipe, arguments = built("SD3")
    denoiser_of(pipe).register_forward_pre_hook(lambda *_: pytest.fail("nothing may be drawn"))
    settings = Settings(steps=4, **{name: (0.5, 0.5, 0.5)})  # type: ignore[arg-type]
    how: dict[str, Any] = {"height": 64, "width": 64, "call": arguments}
    with scalediff.patch_model(pipe, window=WINDOW):
        with pytest.raises(ValueError, match=rf"{name} must have one value for each of the 2 stages above the native size, got {name}=\("):
            scalediff.generate(pipe, None, preset=settings, **how)
        with pytest.raises(ValueError, match=rf"{name} must have one value for each of the 1 stages above the native size, got {name}=\("):
            scalediff.upscale(pipe, picture(32, 32), None, preset=settings, **how)


# Sizes of the caller's own


def test_stages_of_the_callers_own_sizes() -> None:
    settings = Settings(steps=4, restart=0.5, lfm_cutoff=0.5, sg_cutoff=0.5)
    own = drawn("SD3", settings, sizes=[[12, 12], [20, 20], (40, 40), (64, 64)])
    assert [(stage.height, stage.width) for stage in own.stages] == [(12, 12), (20, 20), (40, 40), (64, 64)]
    assert [stage.images[0].size for stage in own.stages] == [(12, 12), (20, 20), (40, 40), (64, 64)]
    same, planned = drawn("SD3", settings, sizes=[(16, 16), (32, 32), (64, 64)]), drawn("SD3", settings)
    assert torch.equal(same.stages[-1].latents, planned.stages[-1].latents)


def test_enlarging_through_the_callers_own_sizes() -> None:
    pipe, arguments = built("SD3")
    how: dict[str, Any] = {"height": 64, "width": 64, "call": arguments, "steps": 4, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
    with scalediff.patch_model(pipe, window=WINDOW):
        own = scalediff.upscale(pipe, picture(24, 24), None, generator=seeded(), sizes=[(40, 40), (64, 64)], **how)
        assert [stage.images[0].size for stage in own.stages] == [(40, 40), (64, 64)]
        assert own.stages[0].latents.shape[-2:] == (20, 20)
        assert own.stages[-1].latents.isfinite().all()
        cases: list[tuple[Any, str]] = [
            ([(56, 56), (64, 64)], r"larger than the one before, by at most 2x along an axis, got \(24, 24\) and \(56, 56\)"),
            ([(24, 24), (48, 48), (64, 64)], r"larger than the one before, .* got \(24, 24\) and \(24, 24\)"),
            ([(40, 40)], r"the last stage in sizes must be the target 64 x 64, got sizes=\[.*\(40, 40\)\]"),
            ([], r"the last stage in sizes must be the target 64 x 64, got sizes="),
            ([(42, 42), (64, 64)], r"sizes must be multiples of 4, got .*\(42, 42\)"),
        ]
        for sizes, message in cases:
            with pytest.raises(ValueError, match=message):
                scalediff.upscale(pipe, picture(24, 24), None, sizes=sizes, **how)
        for sizes, message in (
            ([(32, 32), (64, 64)], r"the first stage in sizes must have at most the native area, 16 x 16, got \(32, 32\)"),
            ([(16, 16), (64, 64)], r"by at most 2x along an axis, got \(16, 16\) and \(64, 64\)"),
        ):
            with pytest.raises(ValueError, match=message):
                scalediff.generate(pipe, None, sizes=sizes, **how)


def test_a_picture_of_any_size_is_enlarged_through_sizes(demo: Any) -> None:
    """Without `sizes` it is."""
    how: dict[str, Any] = {"height": 120, "width": 120, "steps": 2, "restart": 0.5}
    assert len(scalediff.upscale(demo, picture(60, 60), PROMPT, generator=seeded(), **how).stages) == 2
    own = scalediff.upscale(demo, picture(60, 60), PROMPT, generator=seeded(), sizes=[(88, 88), (120, 120)], **how)
    assert [stage.height for stage in own.stages] == [88, 120]
