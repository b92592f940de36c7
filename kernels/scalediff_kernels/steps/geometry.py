"""Noise levels, and the relation between model output and x0: plain numbers, no torch.

A sample is `x = signal * x0 + noise * eps`; a model predicts eps, x0, or a mixture of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Prediction = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]


@dataclass(frozen=True)
class NoiseLevel:
    """The noise level of a sample, `x = signal * x0 + noise * eps`.

    Attributes:
        signal: Factor of x0.
        noise: Factor of eps.

    Raises:
        ValueError: A factor is negative or not finite, or both are zero.
    """

    signal: float
    noise: float

    def __post_init__(self) -> None:
        if not (0 <= self.signal < math.inf and 0 <= self.noise < math.inf) or self.signal == self.noise == 0:
            raise ValueError(f"signal and noise must be finite, non-negative and not both zero, got {self.signal=}, {self.noise=}")

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float) -> NoiseLevel:
        """Level of a variance-preserving scheduler (DDPM, DDIM, DPM-Solver): `x = sqrt(abar) x0 + sqrt(1 - abar) eps`."""
        if not 0 <= alpha_bar <= 1:
            raise ValueError(f"alpha_bar must lie in [0, 1], got {alpha_bar=}")
        return cls(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @classmethod
    def of_sigma(cls, sigma: float) -> NoiseLevel:
        """Level of a variance-exploding scheduler (Euler, Heun, Karras): `x = x0 + sigma eps`."""
        return cls(1.0, sigma)

    @classmethod
    def of_flow(cls, sigma: float) -> NoiseLevel:
        """Level of a flow-matching scheduler (FLUX, SD3): `x = (1 - sigma) x0 + sigma eps`."""
        if not 0 <= sigma <= 1:
            raise ValueError(f"sigma of a flow must lie in [0, 1], got {sigma=}")
        return cls(1 - sigma, sigma)

    @property
    def alpha_bar(self) -> float:
        """`signal^2 / (signal^2 + noise^2)`."""
        return (self.signal / math.hypot(self.signal, self.noise)) ** 2


def x0_weights(level: NoiseLevel, prediction: Prediction) -> tuple[float, float]:
    """Weights of x and of the model output in the predicted x0.

    With a = signal, s = noise and r^2 = a^2 + s^2, the predicted x0 is

    - epsilon: `(x - s eps) / a`;
    - v_prediction, where `v = (a eps - s x0) / r`: `a x / r^2 - s v / r`;
    - flow_prediction, where `v = eps - x0`: `(x - s v) / (a + s)`;
    - sample: the output.

    Raises:
        ValueError: x0 is not determined by an epsilon prediction at signal 0, or the prediction is unknown.
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
        raise ValueError(f"the signal must be positive to predict x0 from epsilon, got {level=}")
    return 1 / a, -s / a


def output_change(level: NoiseLevel, prediction: Prediction) -> float:
    """Change of the model output per unit change of x0 at fixed x: the inverse of the second weight of `x0_weights`.

    Raises:
        ValueError: The noise is zero, so that x0 does not depend on the output (except for `"sample"`), or the prediction is unknown.
    """
    of_output = x0_weights(level, prediction)[1]
    if of_output == 0:
        raise ValueError(f"the noise must be positive to guide {prediction=}, got {level=}")
    return 1 / of_output


def check_prediction(prediction: str) -> None:
    """Check the name of a prediction type.

    Raises:
        ValueError: The prediction is unknown.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction=}")
