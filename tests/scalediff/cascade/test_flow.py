"""Flow matching: guided tails against loops written by hand, packed latents, and the base stage's schedule at every size.

Legend: sigma noise, x = (1 - sigma) x0 + sigma eps, v = eps - x0.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalediff.cascade.schedule import Guidance, guided_scheduler, recording_scheduler
from scalediff_kernels import low_pass
from tests.conftest import seeded

diffusers = pytest.importorskip("diffusers")

STEPS, KEPT, CUTOFF = 12, 6, 0.25


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 12, 16, generator=seeded(seed), dtype=torch.float64)


REFERENCE, START, WAVE = noise(1), noise(2), noise(3)


def velocity(x: Tensor, sigma: float) -> Tensor:
    return (0.8 * x + 0.5 * WAVE + 0.1 * sigma).tanh()


def guided_velocity(x: Tensor, sigma: float) -> Tensor:
    """By the definition: move the estimate of x0 with gamma = sigma, and take the velocity that stands for it."""
    x0 = x - sigma * velocity(x, sigma)
    x0 = x0 + sigma * (low_pass(REFERENCE, cutoff=CUTOFF) - low_pass(x0, cutoff=CUTOFF))
    return (x - x0) / sigma


def euler(sigmas: list[float], x: Tensor) -> Tensor:
    for now, after in itertools.pairwise(sigmas):
        x = x + (after - now) * guided_velocity(x, now)
    return x


def heun(sigmas: list[float], x: Tensor) -> Tensor:
    for now, after in itertools.pairwise(sigmas):
        slope = guided_velocity(x, now)
        if after > 0:
            slope = (slope + guided_velocity(x + (after - now) * slope, after)) / 2
        x = x + (after - now) * slope
    return x


def pack(x: Tensor) -> Tensor:
    """FLUX's packing, `[B, C, Y, X]` to `[B, Y X / 4, 4 C]`."""
    b, c, y, w = x.shape
    return x.view(b, c, y // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, y * w // 4, 4 * c)


def unpack(x: Tensor) -> Tensor:
    return x.view(2, 6, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 12, 16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "solver"), [("FlowMatchEulerDiscreteScheduler", euler), ("FlowMatchHeunDiscreteScheduler", heun)])
def test_a_guided_tail_is_the_solver_on_guided_estimates(name: str, solver: Any, packed: bool) -> None:
    guidance = Guidance(REFERENCE, CUTOFF, form="tokens" if packed else "grid")
    scheduler = guided_scheduler(getattr(diffusers, name)(shift=3.0), steps=STEPS, last_steps=KEPT, guidance=guidance)
    scheduler.set_timesteps(KEPT)
    sigmas = [float(s) for s in scheduler.sigmas]
    x = pack(START) if packed else START
    for i, t in enumerate(scheduler.timesteps):
        output = pack(velocity(unpack(x), sigmas[i])) if packed else velocity(x, sigmas[i])
        x = scheduler.step(output, t, x.double(), return_dict=False)[0].double()
    steps = [*sigmas[::2], sigmas[-1]] if name.startswith("FlowMatchHeun") else sigmas
    assert len(steps) == KEPT + 1
    expected = solver(steps, START)
    torch.testing.assert_close(unpack(x) if packed else x, expected, rtol=1e-5, atol=1e-5)  # diffusers steps in fp32


def test_every_stage_has_the_schedule_of_the_base() -> None:
    """FLUX asks for even sigmas and a shift by the picture's size; the tail of what it asked for the base is run."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    base = recording_scheduler(scheduler)
    base.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), device="cpu", mu=1.15)
    guided = guided_scheduler(
        scheduler, steps=STEPS, last_steps=KEPT, guidance=Guidance(None, CUTOFF), base_schedule_arguments=base.schedule_arguments
    )
    guided.set_timesteps(sigmas=np.linspace(1, 1 / KEPT, KEPT), device="cpu", mu=3.0)
    assert torch.equal(guided.timesteps, base.timesteps[-KEPT:])
    assert torch.equal(guided.sigmas, base.sigmas[-KEPT - 1 :])
    with pytest.raises(ValueError, match="this stage runs 6 of 12 steps, got count=4"):
        guided.set_timesteps(sigmas=[1.0, 0.9, 0.8, 0.5], mu=1.0)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_other_solvers_know_flows(name: str) -> None:
    """Of first order, and without a corrector, both are Euler's."""
    how: dict[str, Any] = {"solver_order": 1, "use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    if name.startswith("UniPC"):
        how["disable_corrector"] = list(range(STEPS))
    scheduler = getattr(diffusers, name)(**how)
    guided = guided_scheduler(scheduler, steps=STEPS, last_steps=KEPT, guidance=Guidance(REFERENCE, CUTOFF))
    guided.set_timesteps(KEPT)
    sigmas, x = [float(s) for s in guided.sigmas], START
    assert (len(sigmas), sigmas[-1]) == (KEPT + 1, 0.0)
    for sigma, t in zip(sigmas, guided.timesteps, strict=False):
        x = guided.step(velocity(x, sigma), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, euler(sigmas, START), rtol=1e-5, atol=1e-5)  # diffusers' sigmas are fp32


def test_the_tail_of_a_custom_schedule_is_run() -> None:
    """As the caller gave it to the base stage."""
    custom = [1.0, 0.9, 0.5, 0.25]
    base = recording_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0))
    base.set_timesteps(sigmas=custom)
    how: dict[str, Any] = {"guidance": Guidance(None, CUTOFF), "base_schedule_arguments": base.schedule_arguments}
    guided = guided_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), steps=4, last_steps=2, **how)
    guided.set_timesteps(2)
    assert [round(float(sigma), 6) for sigma in guided.sigmas] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("option", ["stochastic_sampling", "invert_sigmas"])
def test_a_flow_that_is_another_is_refused(option: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{option: True})
    with pytest.raises(NotImplementedError, match=f"supports FlowMatchEulerDiscreteScheduler without {option}"):
        guided_scheduler(scheduler, steps=4, last_steps=2, guidance=Guidance(None, 0.5))
