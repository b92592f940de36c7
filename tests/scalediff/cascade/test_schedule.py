"""The guided scheduler: the tail of the schedule, structure guidance as defined, everything else the scheduler's own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.cascade.schedule import Guidance, check_steps, first_calls, guided_scheduler, model_calls
from scalediff_kernels import low_pass
from tests.conftest import seeded

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of DEIS in diffusers

STEPS, KEPT = 10, 4
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
]
ADDED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")  # x0 + sigma eps
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SUPPORTED = [(s, p) for s in SCHEDULERS for p in PREDICTIONS if not (s in (*ADDED, "PNDMScheduler") and p == "sample")]


def make(name: str, prediction: str, **more: Any) -> Any:
    plain = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name)(prediction_type=prediction, **BETAS, **plain, **more)


def latents(seed: int) -> Tensor:
    return torch.randn(1, 4, 12, 16, generator=seeded(seed), dtype=torch.float64)


def outputs() -> list[Tensor]:
    return [latents(100 + i) for i in range(STEPS)]


def run(scheduler: Any, x: Tensor, timesteps: Any) -> Tensor:
    """A fixed sequence of model outputs through a scheduler; noise, where it draws some, from its own seed."""
    extra = {"generator": seeded(7)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t, output in zip(timesteps, outputs(), strict=False):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("name", "prediction"), SUPPORTED)
def test_every_step_moves_the_estimate_by_the_definition(name: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the scheduler's own step stands for x0 + gamma (LP(ref) - LP(x0)), gamma = (1 - abar) / (1 - abar_restart)."""
    base = make(name, prediction)
    received: list[Tensor] = []
    own_step = type(base).step

    def spy(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(model_output)
        return own_step(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(base), "step", spy)
    reference = latents(1)
    guided = guided_scheduler(base, steps=STEPS, last_steps=KEPT, guidance=Guidance(reference, 0.25))
    guided.set_timesteps(KEPT)
    whole = make(name, prediction)
    whole.set_timesteps(STEPS)
    first = whole.order * (STEPS - KEPT)  # of the model calls
    if name == "PNDMScheduler":  # its first step is made twice
        times = [t for i, t in enumerate(whole.timesteps.tolist()) if i != 1][first:]
        assert guided.timesteps.tolist() == [*times[:2], *times[1:]]
    else:
        assert torch.equal(guided.timesteps, whole.timesteps[first:])

    x = latents(0)
    alpha_bars = [1 / (1 + float(s) ** 2) for s in whole.sigmas[first:]] if hasattr(whole, "sigmas") else None
    for i, (t, output) in enumerate(zip(guided.timesteps, outputs(), strict=False)):
        guided.scale_model_input(x, t)
        alpha_bar = alpha_bars[i] if alpha_bars else float(whole.alphas_cumprod[t])
        start = alpha_bars[0] if alpha_bars else float(whole.alphas_cumprod[guided.timesteps[0]])
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        preserved = x * signal if name in ADDED else x

        def estimate(value: Tensor, signal: float = signal, noise: float = noise, x_t: Tensor = preserved) -> Tensor:
            if prediction == "epsilon":
                return (x_t - noise * value) / signal
            return signal * x_t - noise * value if prediction == "v_prediction" else value

        gamma = (1 - alpha_bar) / (1 - start)
        wanted = estimate(output) + gamma * (low_pass(reference, cutoff=0.25) - low_pass(estimate(output), cutoff=0.25))
        x = guided.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(estimate(received[-1]), wanted, rtol=1e-9, atol=1e-9)
        assert 0 < gamma <= 1 + 1e-12


@pytest.mark.parametrize(("name", "prediction"), [(s, p) for s, p in SUPPORTED if "Multistep" not in s and s != "PNDMScheduler"])
def test_without_guidance_the_tail_is_the_schedulers_own(name: str, prediction: str) -> None:
    """The same as the last steps of the whole schedule (a multi-step scheduler's tail would depend on what came before)."""
    guided = guided_scheduler(make(name, prediction), steps=STEPS, last_steps=KEPT, guidance=Guidance(None, 0.25))
    guided.set_timesteps(KEPT)
    whole = make(name, prediction)
    whole.set_timesteps(STEPS)
    first = whole.order * (STEPS - KEPT)
    tail = whole.timesteps[first:]
    if hasattr(whole, "set_begin_index"):
        whole.set_begin_index(first)
    torch.testing.assert_close(run(guided, latents(0), guided.timesteps), run(whole, latents(0), tail), rtol=0, atol=0)


def test_guidance_at_full_cutoff_and_strength_lands_on_the_reference() -> None:
    """With cutoff 1 and one step left, gamma is 1 and the low band is everything: DDIM's last step gives the reference."""
    base = make("DDIMScheduler", "v_prediction", timestep_spacing="trailing", clip_sample=False)
    reference = latents(1)
    guided = guided_scheduler(base, steps=STEPS, last_steps=1, guidance=Guidance(reference, 1.0))
    guided.set_timesteps(1)
    x = guided.step(latents(2), guided.timesteps[0], latents(0), return_dict=False)[0]
    torch.testing.assert_close(x, reference, rtol=1e-6, atol=1e-6)  # the scheduler keeps its constants in fp32


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipelines_see_the_scheduler_they_know(name: str) -> None:
    base = make(name, "epsilon")
    guided = guided_scheduler(base, steps=STEPS, last_steps=KEPT, guidance=Guidance(None, 0.25))
    assert isinstance(guided, type(base))
    assert type(guided).__name__ == name
    assert inspect.signature(guided.set_timesteps) == inspect.signature(base.set_timesteps)
    assert inspect.signature(guided.step) == inspect.signature(base.step)
    assert guided.init_noise_sigma == 1.0
    assert guided.config == base.config
    guided.set_timesteps(KEPT)
    assert len(guided.timesteps) == base.order * (KEPT - 1) + 1 + (name == "PNDMScheduler")
    assert base.num_inference_steps == make(name, "epsilon").num_inference_steps, "the pipeline's own scheduler is left as it was"


def test_what_is_not_known_is_refused_by_name() -> None:
    guidance = Guidance(None, 0.25)
    with pytest.raises(NotImplementedError, match=r"support the schedulers DDIMScheduler.*got TCDScheduler"):
        guided_scheduler(make("TCDScheduler", "epsilon"), steps=10, last_steps=4, guidance=guidance)
    with pytest.raises(NotImplementedError, match="supports PNDMScheduler without Runge-Kutta steps, got skip_prk_steps=False"):
        guided_scheduler(diffusers.PNDMScheduler(), steps=10, last_steps=4, guidance=guidance)
    with pytest.raises(
        NotImplementedError, match=r"structure guidance supports epsilon, sample, v_prediction with DPM.*got prediction='flow_prediction'"
    ):
        guided_scheduler(
            make("DPMSolverSinglestepScheduler", "flow_prediction", use_flow_sigmas=True), steps=10, last_steps=4, guidance=guidance
        )
    with pytest.raises(NotImplementedError, match=r"supports epsilon, sample, v_prediction with DEIS.*got prediction='flow_prediction'"):
        guided_scheduler(make("DEISMultistepScheduler", "flow_prediction", use_flow_sigmas=True), steps=10, last_steps=4, guidance=guidance)
    with pytest.raises(NotImplementedError, match=r"supports epsilon, v_prediction with EulerDiscreteScheduler, got prediction='sample'"):
        guided_scheduler(make("EulerDiscreteScheduler", "sample"), steps=10, last_steps=4, guidance=guidance)
    guided = guided_scheduler(make("DDIMScheduler", "epsilon"), steps=10, last_steps=4, guidance=guidance)
    with pytest.raises(ValueError, match=r"this stage runs 4 of 10 steps.*got count=7"):
        guided.set_timesteps(7)


@pytest.mark.parametrize("kept", [0, 1, 2, STEPS])
def test_pndm_starts_again_with_any_number_of_steps(kept: int) -> None:
    """The whole schedule is the scheduler's own, call by call; a single step is made once."""
    guided = guided_scheduler(make("PNDMScheduler", "epsilon"), steps=STEPS, last_steps=kept, guidance=Guidance(None, 0.25))
    guided.set_timesteps(max(kept, 1))
    own = make("PNDMScheduler", "epsilon")
    own.set_timesteps(STEPS)
    last = own.timesteps[-1].item()
    expected = {0: [], 1: [last], 2: [last + 100, last, last], STEPS: own.timesteps.tolist()}
    assert guided.timesteps.tolist() == expected[kept]
    if kept == STEPS:
        extra = [*outputs(), latents(99)]
        ends = []
        for scheduler in (guided, own):
            x = latents(0)
            for t, output in zip(scheduler.timesteps, extra, strict=True):
                x = scheduler.step(output, t, x, return_dict=False)[0]
            ends.append(x)
        assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_model_calls_are_counted(name: str) -> None:
    scheduler = make(name, "epsilon")
    for steps in (1, 2, STEPS):
        scheduler.set_timesteps(steps)
        assert model_calls(scheduler, steps) == len(scheduler.timesteps)
    assert [first_calls(scheduler, steps) for steps in (0, 1, 3)] == {
        "DDIMScheduler": [0, 1, 3], "HeunDiscreteScheduler": [0, 2, 6], "PNDMScheduler": [0, 2, 4],
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_has_no_more_steps_than_timesteps(name: str) -> None:
    """Those of diffusers raise there, or repeat a timestep."""
    scheduler, most = make(name, "epsilon"), 50 if name == "LCMScheduler" else 1000
    check_steps(scheduler, most)
    with pytest.raises(ValueError, match=f"steps must be at most {most}, the number of timesteps of this {name}, got steps={most + 1}"):
        check_steps(scheduler, most + 1)


def test_a_flow_has_any_number_of_steps() -> None:
    check_steps(diffusers.FlowMatchEulerDiscreteScheduler(), 1001)
