"""Filters of pictures that continue on the other side, against circular sums written out here, and under cyclic shifts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import GuidedStep, LowPass, NoiseLevel, guide_structure, low_pass, mix_frequencies
from scalediff_kernels.lowpass.geometry import SMALLEST_RESPONSE, coarse_length
from scalediff_kernels.testing import assert_within_budget, poisoned_memory

X, Y, BOTH = (False, True), (True, False), (True, True)
KINDS = ["resize", "gaussian", "butterworth"]


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def circular(n: int, cutoff: float, kind: str) -> Tensor:
    """The filter of an axis as one matrix: a sum over all copies of the axis, or over its Fourier coefficients."""
    out = torch.zeros(n, n, dtype=torch.float64)
    if kind == "resize":
        m = int(n * cutoff)
        scale, copies = n / m, range(-2 * n, 3 * n)
        for i in range(n):
            place = (i + 0.5) / scale - 0.5
            for sample in (math.floor(place), math.floor(place) + 1):
                up = 1 - abs(sample - place)
                down = [max(0.0, 1 - abs(j - ((sample + 0.5) * scale - 0.5)) / scale) for j in copies]
                for j, weight in zip(copies, down, strict=True):
                    out[i, j % n] += up * weight / sum(down)
        return out
    for k in range(n):
        ratio = 2 * min(k, n - k) / n / cutoff
        gain = 0.5 ** (ratio**2) if kind == "gaussian" else 1 / (1 + ratio**8)
        if gain >= SMALLEST_RESPONSE:
            steps = torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n)
            out += gain * torch.cos(2 * math.pi * k / n * steps) / n
    return out


@pytest.mark.parametrize("impl", ["matmul", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "cutoff"), [((8, 12), 0.25), ((7, 13), 0.3), ((8, 9), 0.125), ((5, 6), 1.0)])
def test_the_filter_is_a_circular_sum(kind: Any, shape: tuple[int, int], cutoff: float, impl: Any) -> None:
    x, axes = picture(*shape), [circular(n, cutoff, kind) for n in shape]
    with poisoned_memory():
        out = low_pass(x, cutoff=cutoff, kind=kind, wrap=BOTH, impl=impl)
    torch.testing.assert_close(out, axes[0] @ x @ axes[1].T, rtol=1e-12, atol=1e-12)
    plain = low_pass(x, cutoff=cutoff, kind=kind, impl=impl)
    if cutoff < 1:
        assert not torch.allclose(plain, out)


@pytest.mark.parametrize("kind", KINDS)
def test_an_axis_that_does_not_wrap_is_filtered_as_before(kind: Any) -> None:
    x = picture(1, 24)
    expected = low_pass(x, cutoff=1.0, kind=kind)
    torch.testing.assert_close(low_pass(x, cutoff=1.0, kind=kind, wrap=Y), expected, rtol=1e-12, atol=1e-12)
    tall = picture(24, 16)
    matrix = LowPass(16, 0.25, kind).up @ LowPass(16, 0.25, kind).down
    exact = circular(24, 0.25, kind) @ tall @ matrix.T
    torch.testing.assert_close(low_pass(tall, cutoff=0.25, kind=kind, wrap=Y), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cyclic_shift_shifts_the_result(kind: Any) -> None:
    a, b = picture(16, 24), picture(16, 24, seed=1)
    shift = (4, -8) if kind == "resize" else (3, -5)  # by whole coarse pixels, or by any
    arguments: dict[str, Any] = {"cutoff": 0.25, "kind": kind, "wrap": BOTH}

    def moved(x: Tensor) -> Tensor:
        return x.roll(shift, (2, 3))

    mixed, guided = mix_frequencies(a, b, **arguments), guide_structure(a, b, gamma=0.4, **arguments)
    torch.testing.assert_close(mix_frequencies(moved(a), moved(b), **arguments), moved(mixed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guide_structure(moved(a), moved(b), gamma=0.4, **arguments), moved(guided), rtol=1e-12, atol=1e-12)
    level = NoiseLevel.of_flow(0.6)
    step, moved_step = (GuidedStep(x, prediction="flow_prediction", **arguments) for x in (a, moved(a)))
    out = step(b, 0.5 * b, level=level, gamma=0.4)
    torch.testing.assert_close(moved_step(moved(b), 0.5 * moved(b), level=level, gamma=0.4), moved(out), rtol=1e-12, atol=1e-12)
    plain = GuidedStep(a, cutoff=0.25, kind=kind, prediction="flow_prediction")(b, 0.5 * b, level=level, gamma=0.4)
    assert not torch.allclose(plain, out)


@pytest.mark.parametrize("kind", ["resize", "gaussian"])
def test_the_kernel_keeps_the_error_budget(kind: Any) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    x = picture(10, 20)[:1, :1].half()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments: dict[str, Any] = {"cutoff": 0.3, "kind": kind, "wrap": X}
    out = low_pass(x.to(device), **arguments, impl="triton").cpu()
    exact = low_pass(x.double(), **arguments, impl="reference")
    assert_within_budget(out, low_pass(x, **arguments, impl="matmul"), exact)


def test_modes_of_an_axis_that_wraps() -> None:
    assert coarse_length(8, 1.0, "gaussian", wrap=True) == 8
    assert coarse_length(9, 1.0, "gaussian", wrap=True) == 9
    assert coarse_length(64, 0.125, "gaussian", wrap=True) == 1 + 2 * math.floor(32 * 0.125 * math.sqrt(math.log2(1e4)))
    axis = LowPass(9, 1.0, "butterworth", wrap=True)
    torch.testing.assert_close(axis.up.T @ axis.up, torch.eye(9, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_bad_wrap_is_named() -> None:
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans \(Y, X\), got wrap=True"):
        low_pass(x, cutoff=0.5, wrap=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans"):
        GuidedStep(x, cutoff=0.5, prediction="epsilon", wrap=(1, 0))  # type: ignore[arg-type]
