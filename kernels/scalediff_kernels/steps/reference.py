"""Reference implementation of a guided step; fp64 stays fp64.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

from torch import Tensor

from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.lowpass.reference import low_pass_reference
from scalediff_kernels.steps.geometry import NoiseLevel, Prediction, output_change, x0_weights


def guided_step_reference(
    x: Tensor,
    output: Tensor,
    reference: Tensor,
    *,
    level: NoiseLevel,
    prediction: Prediction,
    gamma: float,
    cutoff: float,
    kind: Kind,
    wrap: tuple[bool, bool] = (False, False),
) -> Tensor:
    """The model output that gives `x0 + gamma (LP(reference) - LP(x0))`: ScaleDiff's structure guidance, arXiv:2510.25818."""
    of_x, of_output = x0_weights(level, prediction)
    x0 = of_x * x + of_output * output
    low, low_x0 = (low_pass_reference(one, cutoff=cutoff, kind=kind, wrap=wrap) for one in (reference, x0))
    guided = x0 + gamma * (low - low_x0)
    return output + output_change(level, prediction) * (guided - x0)
