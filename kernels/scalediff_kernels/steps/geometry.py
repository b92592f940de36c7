"""Noise levels, and what a model output stands for: numbers only, no torch.

A sample is `x = signal * x0 + noise * eps`; a model predicts eps, x0, or a mixture of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Prediction = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]


@dataclass(frozen=True)
class NoiseLevel:
    """One step's noise: `x = signal * x0 + noise * eps`.

    Raises:
        ValueError: a part is negative or not finite, or both are zero.
    """

    signal: float
    noise: float

    def __post_init__(self) -> None:
        if not (0 <= self.signal < math.inf and 0 <= self.noise < math.inf) or self.signal == self.noise == 0:
            raise ValueError(f"signal and noise must be finite, not negative and not both zero, got {self.signal=}, {self.noise=}")

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float) -> NoiseLevel:
        """Variance preserving (DDPM, DDIM, DPM-Solver): `x = sqrt(abar) x0 + sqrt(1 - abar) eps`."""
        if not 0 <= alpha_bar <= 1:
            raise ValueError(f"alpha_bar must lie in [0, 1], got {alpha_bar=}")
        return cls(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @classmethod
    def of_sigma(cls, sigma: float) -> NoiseLevel:
        """Noise added (Euler, Heun, Karras): `x = x0 + sigma eps`."""
        return cls(1.0, sigma)

    @classmethod
    def of_flow(cls, sigma: float) -> NoiseLevel:
        """Flow matching (FLUX, SD3): `x = (1 - sigma) x0 + sigma eps`."""
        if not 0 <= sigma <= 1:
            raise ValueError(f"sigma of a flow must lie in [0, 1], got {sigma=}")
        return cls(1 - sigma, sigma)

    @property
    def alpha_bar(self) -> float:
        """Share of the signal: `signal^2 / (signal^2 + noise^2)`."""
        return (self.signal / math.hypot(self.signal, self.noise)) ** 2


def x0_weights(level: NoiseLevel, prediction: Prediction) -> tuple[float, float]:
    """(of x, of the model output) in the estimate of x0.

    epsilon: `(x - s eps) / a`. v, `(a eps - s x0) / r` with `r^2 = a^2 + s^2`: `a x / r^2 - s v / r`.
    flow, `eps - x0`: `(x - s v) / (a + s)`. sample: the output.

    Raises:
        ValueError: a division by zero would follow, or no such prediction.
    """
    check_prediction(prediction)
    a, s = level.signal, level.noise
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        r = math.hypot(a, s)
        return a / r / r, -s / r
    if prediction == "flow_prediction":
        return 1 / (a + s), -s / (a + s)
    if a == 0:
        raise ValueError(f"epsilon says nothing of x0 where there is no signal, got {level=}")
    return 1 / a, -s / a


def output_change(level: NoiseLevel, prediction: Prediction) -> float:
    """Change of the model output for a unit change of x0, at fixed x: the inverse of the second weight.

    Raises:
        ValueError: without noise no output but the sample itself can change x0; no such prediction.
    """
    of_output = x0_weights(level, prediction)[1]
    if of_output == 0:
        raise ValueError(f"the noise must be positive to guide {prediction=}, got {level=}")
    return 1 / of_output


def check_prediction(prediction: str) -> None:
    """Raises ValueError: no such prediction."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction=}")
