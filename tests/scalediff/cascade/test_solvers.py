"""Multi-step solvers remember guided predictions: whole guided tails against loops written by hand from the papers.

A solver whose sample were patched in place of its prediction would remember the unguided estimate and leave these loops.

Legend: sigma noise over signal; a, s = 1, sigma over sqrt(1 + sigma^2); lambda = -log sigma.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.cascade.schedule import Guidance, guided_scheduler
from scalediff_kernels import low_pass
from tests.conftest import seeded

diffusers = pytest.importorskip("diffusers")

STEPS, KEPT, CUTOFF = 12, 6, 0.25
Estimate = Callable[[Tensor, float], Tensor]


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 12, 16, generator=seeded(seed), dtype=torch.float64)


REFERENCE, START, WAVE = noise(1), noise(2), noise(3)


def model(x: Tensor, sigma: float) -> Tensor:
    """A prediction of eps that depends on what it sees; x variance preserving."""
    return (0.8 * x + 0.5 * WAVE + 0.1 * math.log(sigma)).tanh()


def estimate(x: Tensor, sigma: float, restart: float, *, guided: bool = True) -> Tensor:
    """x0 of the variance-preserving x by the definition of structure guidance."""
    root = math.sqrt(1 + sigma**2)
    x0 = x * root - sigma * model(x, sigma)
    gamma = (sigma**2 / (1 + sigma**2)) / (restart**2 / (1 + restart**2))
    return x0 + gamma * (low_pass(REFERENCE, cutoff=CUTOFF) - low_pass(x0, cutoff=CUTOFF)) if guided else x0


def levels(sigma: float) -> tuple[float, float, float]:
    """a, s, lambda."""
    root = math.sqrt(1 + sigma**2)
    return 1 / root, sigma / root, -math.log(sigma) if sigma else math.inf


def dpm_solver_pp_2m(sigmas: list[float], x: Tensor, x0_of: Estimate) -> Tensor:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2, midpoint form; first order in the first and the last step."""
    history: list[Tensor] = []
    for i, (now, after) in enumerate(itertools.pairwise(sigmas)):
        (_, s, lam), (a_next, s_next, lam_next) = levels(now), levels(after)
        history.append(x0_of(x, now))
        direction = history[-1]
        if 0 < i < len(sigmas) - 2:
            ratio = (lam - levels(sigmas[i - 1])[2]) / (lam_next - lam)
            direction = direction + (history[-1] - history[-2]) / (2 * ratio)
        x = s_next / s * x - a_next * math.expm1(lam - lam_next) * direction
    return x


def unipc_2(sigmas: list[float], x: Tensor, x0_of: Estimate) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 on x0, arXiv:2302.04867, algorithms 1 and 2: correct, then predict; order 1 at both ends."""
    history: list[Tensor] = []
    before, order = x, 1
    for i, (now, after) in enumerate(itertools.pairwise(sigmas)):
        a, s, lam = levels(now)
        new = x0_of(x, now)
        if i > 0:
            _, s_old, lam_old = levels(sigmas[i - 1])
            h = lam - lam_old
            b = math.expm1(-h)
            x = s / s_old * before - a * b * history[-1]
            if order == 1:
                x = x - a * b * 0.5 * (new - history[-1])
            else:
                r = (levels(sigmas[i - 2])[2] - lam_old) / h
                phi_2 = b / -h - 1
                phi_3 = phi_2 / -h - 0.5
                one, two = phi_2 / b, 2 * phi_3 / b  # of the two conditions on the weights
                far = (two - one) / (r - 1)
                x = x - a * b * (far * (history[-2] - history[-1]) / r + (one - far) * (new - history[-1]))
        history.append(new)
        order = 2 if 0 < i < len(sigmas) - 2 else 1
        before = x
        a_next, s_next, lam_next = levels(after)
        h = lam_next - lam
        b = math.expm1(-h)
        x = s_next / s * x - a_next * b * new
        if order == 2:
            r = (levels(sigmas[i - 1])[2] - lam) / h
            x = x - a_next * b * 0.5 * (history[-2] - new) / r
    return x


def deis_2(sigmas: list[float], x: Tensor, x0_of: Estimate) -> Tensor:
    """DEIS of order 2, arXiv:2204.13902, section 3.2: eps is linear in log rho through the last two, rho = sigma; order 1 at both ends.

    In y = x / a the equation is dy = eps drho. The integrals of the two weights are Gauss's quadrature with eight points.
    """
    points = [-0.9602898564975363, -0.7966664774136267, -0.5255324099163290, -0.1834346424956498]
    weights = [0.1012285362903763, 0.2223810344533745, 0.3137066458778873, 0.3626837833783620]
    nodes = [(sign * point, weight) for point, weight in zip(points, weights, strict=True) for sign in (1, -1)]
    history: list[Tensor] = []
    for i, (now, after) in enumerate(itertools.pairwise(sigmas)):
        (a, s, _), (a_next, _, _) = levels(now), levels(after)
        history.append((x - a * x0_of(x, now)) / s)
        change = (after - now) * history[-1]
        if 0 < i < len(sigmas) - 2:
            before = math.log(sigmas[i - 1])
            part = sum(
                weight * (math.log((now + after) / 2 + (after - now) / 2 * node) - before) for node, weight in nodes
            ) / (math.log(now) - before)  # fmt: skip
            recent = part * (after - now) / 2
            change = recent * history[-1] + (after - now - recent) * history[-2]
        x = a_next * (x / a + change)
    return x


def plms(sigmas: list[float], x: Tensor, x0_of: Estimate) -> Tensor:
    """PNDM without Runge-Kutta steps, arXiv:2202.09778, equations 9, 12 and 13; the first step is made twice, by the mean of two eps."""
    history: list[Tensor] = []

    def eps_of(x: Tensor, sigma: float) -> Tensor:
        a, s, _ = levels(sigma)
        return (x - a * x0_of(x, sigma)) / s

    def transfer(x: Tensor, eps: Tensor, now: float, after: float) -> Tensor:
        (a, s, _), (a_next, s_next, _) = levels(now), levels(after)
        return a_next / a * x - (a_next**2 - a**2) / (a * (s_next * a + s * a_next)) * eps

    for i, (now, after) in enumerate(itertools.pairwise(sigmas)):
        history.append(eps_of(x, now))
        e = history[::-1]
        if i == 0:
            ahead = transfer(x, e[0], now, after)
            eps = (e[0] + eps_of(ahead, after)) / 2
        elif i == 1:
            eps = (3 * e[0] - e[1]) / 2
        elif i == 2:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            eps = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = transfer(x, eps, now, after)
    return x


def heun(sigmas: list[float], x: Tensor, x0_of: Estimate) -> Tensor:
    """Heun's method on `x = x0 + sigma eps`, arXiv:2206.00364, algorithm 1 without churn."""
    for now, after in itertools.pairwise(sigmas):
        slope = (x - x0_of(x, now)) / now
        ahead = x + (after - now) * slope
        if after > 0:
            slope = (slope + (ahead - x0_of(ahead, after)) / after) / 2
        x = x + (after - now) * slope
    return x


SOLVERS: dict[str, tuple[Callable[[list[float], Tensor, Estimate], Tensor], dict[str, Any]]] = {
    "DPMSolverMultistepScheduler": (dpm_solver_pp_2m, {"final_sigmas_type": "zero"}),
    "UniPCMultistepScheduler": (unipc_2, {"final_sigmas_type": "zero"}),
    "HeunDiscreteScheduler": (heun, {}),
    "DEISMultistepScheduler": (deis_2, {}),
    "PNDMScheduler": (plms, {"skip_prk_steps": True}),
}


pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # of DEIS in diffusers


def guided_tail(name: str) -> tuple[Tensor, list[float]]:
    """The sample after a guided tail in diffusers, and the noise of its steps."""
    base = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **SOLVERS[name][1])
    scheduler = guided_scheduler(base, steps=STEPS, last_steps=KEPT, guidance=Guidance(REFERENCE, CUTOFF))
    scheduler.set_timesteps(KEPT)
    calls = [level.noise / level.signal for level in scheduler.levels]
    sigmas = calls if name == "PNDMScheduler" else [float(s) for s in scheduler.sigmas]
    added = name == "HeunDiscreteScheduler"
    x = START * (math.sqrt(1 + sigmas[0] ** 2) if added else 1)
    for i, t in enumerate(scheduler.timesteps):
        seen = x / math.sqrt(1 + sigmas[i] ** 2) if added else x
        x = scheduler.step(model(seen, sigmas[i]), t, x, return_dict=False)[0]
    if name == "PNDMScheduler":  # the second twice, and none after the last
        end = float(scheduler.final_alpha_cumprod)
        return x, [sigmas[0], *sigmas[2:], math.sqrt((1 - end) / end)]
    return x, [*sigmas[::2], sigmas[-1]] if added else sigmas  # Heun keeps all but the first and the last twice


def by_hand(name: str, sigmas: list[float], *, guided: bool) -> Tensor:
    added = name == "HeunDiscreteScheduler"

    def x0_of(x: Tensor, sigma: float) -> Tensor:
        return estimate(x / math.sqrt(1 + sigma**2) if added else x, sigma, sigmas[0], guided=guided)

    return SOLVERS[name][0](sigmas, START * (math.sqrt(1 + sigmas[0] ** 2) if added else 1), x0_of)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_guided_tail_is_the_solver_of_the_paper_on_guided_estimates(name: str) -> None:
    """To the fp32 in which diffusers keeps its noise levels."""
    actual, sigmas = guided_tail(name)
    assert len(sigmas) == KEPT + 1
    torch.testing.assert_close(actual, by_hand(name, sigmas, guided=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_without_guidance_the_loops_end_elsewhere(name: str) -> None:
    actual, sigmas = guided_tail(name)
    assert (actual - by_hand(name, sigmas, guided=False)).abs().max() > 0.01
