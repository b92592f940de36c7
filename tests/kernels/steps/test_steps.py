"""Guided steps: the three-line definition in fp64, two launches, classifier-free guidance on the way, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import GuidedStep, NoiseLevel, packed_view
from scalediff_kernels._launch import has_triton
from scalediff_kernels.steps.geometry import output_change, x0_weights
from scalediff_kernels.steps.reference import guided_step_reference
from scalediff_kernels.testing import assert_within_budget, poisoned_memory

PREDICTIONS: list[Any] = ["epsilon", "v_prediction", "flow_prediction", "sample"]
LEVELS = [NoiseLevel.of_alpha_bar(0.3), NoiseLevel.of_sigma(2.5), NoiseLevel.of_flow(0.6)]
IMPLS = ["matmul", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="Triton has no build for this platform"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pictures(shape: tuple[int, ...] = (2, 3, 24, 32), dtype: torch.dtype = torch.float64, count: int = 4) -> list[Tensor]:
    """x, output, reference, unconditional."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype) for _ in range(count)]


@pytest.mark.parametrize("kind", ["resize", "gaussian", "butterworth"])
@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_is_its_definition_in_fp64(prediction: Any, level: NoiseLevel, kind: Any) -> None:
    x, output, reference, _ = pictures()
    step = GuidedStep(reference, cutoff=0.25, prediction=prediction, kind=kind)
    expected = guided_step_reference(x, output, reference, level=level, prediction=prediction, gamma=0.7, cutoff=0.25, kind=kind)
    torch.testing.assert_close(step(x, output, level=level, gamma=0.7), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_the_weights_recover_x0(prediction: Any, level: NoiseLevel) -> None:
    """From x and each prediction, made of x0 and eps as their papers define them."""
    x0, eps = pictures(count=2)
    a, s = level.signal, level.noise
    x = a * x0 + s * eps
    output = {"epsilon": eps, "v_prediction": (a * eps - s * x0) / (a * a + s * s) ** 0.5, "flow_prediction": eps - x0, "sample": x0}
    of_x, of_output = x0_weights(level, prediction)
    torch.testing.assert_close(of_x * x + of_output * output[prediction], x0, rtol=1e-12, atol=1e-12)
    assert of_output * output_change(level, prediction) == pytest.approx(1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guided", [False, True])
def test_low_precision_keeps_the_error_budget(prediction: Any, dtype: torch.dtype, impl: Any, guided: bool) -> None:
    """Classifier-free guidance done on the way, or by the caller: against fp64, with plain torch in the dtype as the yardstick."""
    x, output, reference, unconditional = pictures((2, 2, 18, 12), dtype)
    level = NoiseLevel.of_alpha_bar(0.4)

    def by_definition(x: Tensor, output: Tensor, reference: Tensor, unconditional: Tensor) -> Tensor:
        combined = unconditional + 7.5 * (output - unconditional) if guided else output
        how: dict[str, Any] = {"level": level, "prediction": prediction, "gamma": 0.8, "cutoff": 0.25, "kind": "resize"}
        return guided_step_reference(x, combined, reference, **how).to(x.dtype)

    extra: dict[str, Any] = {"unconditional": unconditional, "guidance_scale": 7.5} if guided else {}
    with poisoned_memory():
        step = GuidedStep(reference, cutoff=0.25, prediction=prediction, impl=impl)
        out = step(x, output, level=level, gamma=0.8, **extra)
    exact = by_definition(*(t.double() for t in (x, output, reference, unconditional)))
    assert_within_budget(out, by_definition(x, output, reference, unconditional), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "packed"])
def test_in_place_gives_the_same_bits_in_the_same_memory(impl: Any, layout: str, guided: bool) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "packed":
            return packed_view(t.reshape(2, 12 * 16, 12), grid=(12, 16))
        return t.to(memory_format=torch.channels_last) if layout == "channels last" else t

    x, output, reference, unconditional = (laid_out(t) for t in pictures(dtype=torch.float32))
    extra: dict[str, Any] = {"unconditional": unconditional, "guidance_scale": 3.0} if guided else {}
    step = GuidedStep(reference, cutoff=0.25, prediction="epsilon", impl=impl)
    before = output.clone()
    new = step(x, output, level=LEVELS[0], gamma=0.5, **extra)
    assert torch.equal(output, before), "not in place unless asked"
    assert new.stride() == output.stride()
    place = output.data_ptr()
    assert step(x, output, level=LEVELS[0], gamma=0.5, inplace=True, **extra) is output
    assert output.data_ptr() == place
    assert torch.equal(output, new)


@pytest.mark.parametrize("shape", [(2, 1, 16, 12), (2, 3, 16, 1), (2, 3, 1, 12), (1, 1, 1, 1)])
@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_whatever_the_strides_of_single_elements(shape: tuple[int, ...], impl: Any) -> None:
    x, output, reference, _ = pictures(shape, torch.float32)
    for turn in (lambda t: t, lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)):
        step = GuidedStep(reference, cutoff=1.0, prediction="epsilon", impl=impl)
        new = step(x, turn(output), level=LEVELS[0], gamma=0.5)
        assert torch.equal(step(x, turn(output).clone(), level=LEVELS[0], gamma=0.5, inplace=True), new)


def test_a_guidance_scale_of_zero_is_the_unconditional_output() -> None:
    x, output, reference, unconditional = pictures()
    step = GuidedStep(reference, cutoff=0.25, prediction="epsilon")
    out = step(x, output, level=LEVELS[0], gamma=0.5, unconditional=unconditional, guidance_scale=0.0)
    torch.testing.assert_close(out, step(x, unconditional, level=LEVELS[0], gamma=0.5))


def test_one_reference_serves_every_batch() -> None:
    x, output, reference, _ = pictures(dtype=torch.float32)
    step = GuidedStep(reference[:1], cutoff=0.25, prediction="epsilon")
    whole = GuidedStep(reference[:1].expand(2, -1, -1, -1), cutoff=0.25, prediction="epsilon")
    assert torch.equal(step(x, output, level=LEVELS[0], gamma=0.5), whole(x, output, level=LEVELS[0], gamma=0.5))


def test_packed_and_plain_agree() -> None:
    tokens = [t.reshape(2, 12 * 16, 12) for t in pictures(dtype=torch.float32)]
    packed = [packed_view(t, grid=(12, 16)) for t in tokens]
    plain = [t.reshape(2, 3, 24, 32) for t in packed]
    level = NoiseLevel.of_flow(0.7)
    out = GuidedStep(plain[2], cutoff=0.25, prediction="flow_prediction")(packed[0], packed[1], level=level, gamma=0.7)
    same = GuidedStep(packed[2], cutoff=0.25, prediction="flow_prediction")(plain[0], plain[1], level=level, gamma=0.7)
    assert out.shape == packed[1].shape
    torch.testing.assert_close(out.reshape(2, 3, 24, 32), same)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_step_is_two_launches(guided: bool, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from scalediff_kernels._launch import Launch

    x, output, reference, unconditional = pictures(dtype=torch.float32)
    step = GuidedStep(reference, cutoff=0.25, prediction="v_prediction", impl="triton")
    launches: list[Launch] = []
    own = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launches.append(self), own(self)))
    extra: dict[str, Any] = {"unconditional": unconditional, "guidance_scale": 3.0} if guided else {}
    step(x, output, level=LEVELS[0], gamma=0.5, inplace=inplace, **extra)
    assert [launch.arguments["COUNT"] for launch in launches] == [2 + guided, 1], "x and every output once, then the coarse grid"
    assert launches[1].arguments["ADDENDS"] == 1 + guided, "every output once more"


def test_dtypes_may_differ_and_the_outputs_is_kept() -> None:
    x, output, reference, _ = pictures(dtype=torch.float32)
    step = GuidedStep(reference, cutoff=0.25, prediction="epsilon")
    expected = step(x, output.half().float(), level=LEVELS[0], gamma=0.5)
    out = step(x, output.half(), level=LEVELS[0], gamma=0.5)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected.half(), rtol=2e-3, atol=2e-3)  # two roundings to fp16


def test_gamma_one_moves_the_whole_low_band_and_zero_nothing() -> None:
    x, output, reference, _ = pictures()
    step = GuidedStep(reference, cutoff=1.0, prediction="sample")
    torch.testing.assert_close(step(x, output, level=LEVELS[0], gamma=1.0), reference)
    torch.testing.assert_close(step(x, output, level=LEVELS[0], gamma=0.0), output, rtol=0, atol=0)


def test_compiles_to_one_graph() -> None:
    x, output, reference, _ = pictures(dtype=torch.float32)
    step = GuidedStep(reference, cutoff=0.25, prediction="epsilon")

    def call(x: Tensor, output: Tensor) -> Tensor:
        return 2 * step(x + 0, output, level=NoiseLevel.of_alpha_bar(0.4), gamma=0.5)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x, output), call(x, output))


def test_levels() -> None:
    assert NoiseLevel(1.0, 2.0).alpha_bar == pytest.approx(0.2)
    for level in (NoiseLevel.of_alpha_bar(0.2), NoiseLevel.of_sigma(2.0), NoiseLevel.of_flow(2 / 3)):
        assert level.alpha_bar == pytest.approx(0.2)
    assert NoiseLevel.of_sigma(1e200).alpha_bar == 0
    assert NoiseLevel(1e-200, 1e-200).alpha_bar == pytest.approx(0.5)
    for make, value, message in (
        (NoiseLevel.of_alpha_bar, 1.5, r"alpha_bar must lie in \[0, 1\], got alpha_bar=1.5"),
        (NoiseLevel.of_flow, -0.1, r"sigma of a flow must lie in \[0, 1\], got sigma=-0.1"),
        (NoiseLevel.of_sigma, float("nan"), r"must be finite.*self.noise=nan"),
        (NoiseLevel.of_sigma, -1.0, r"non-negative.*self.noise=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(value)


def test_what_cannot_be_guided_is_refused() -> None:
    x, output, reference, unconditional = pictures(dtype=torch.float32)
    step = GuidedStep(reference, cutoff=0.25, prediction="epsilon")
    how: dict[str, Any] = {"level": LEVELS[0], "gamma": 0.5}
    with pytest.raises(ValueError, match=r"noise must be positive to guide prediction='epsilon', got level=.*noise=0.0"):
        step(x, output, level=NoiseLevel.of_sigma(0.0), gamma=0.5)
    with pytest.raises(ValueError, match=r"the signal must be positive to predict x0 from epsilon"):
        step(x, output, level=NoiseLevel.of_flow(1.0), gamma=0.5)
    with pytest.raises(ValueError, match=r"gamma must be finite, got gamma=inf"):
        step(x, output, level=LEVELS[0], gamma=float("inf"))
    with pytest.raises(ValueError, match=r"output must have the reference's shape \(2, 3, 24, 32\).*got \(2, 3, 24, 31\)"):
        step(x, output[..., 1:], **how)
    with pytest.raises(ValueError, match=r"x must have the reference's shape.*on meta"):
        step(x.to("meta"), output, **how)
    with pytest.raises(TypeError, match=r"output must be floating point .*got x.dtype=torch.int64"):
        step(x, output.long(), **how)
    with pytest.raises(ValueError, match=r"needs both unconditional and guidance_scale, got guidance_scale=None with unconditional"):
        step(x, output, unconditional=unconditional, **how)
    with pytest.raises(ValueError, match=r"needs both unconditional and guidance_scale, got guidance_scale=2.0 without unconditional"):
        step(x, output, guidance_scale=2.0, **how)
    with pytest.raises(ValueError, match=r"guidance_scale must be finite, got guidance_scale=nan"):
        step(x, output, unconditional=unconditional, guidance_scale=float("nan"), **how)
    for overlapping in (output[:1].expand(2, -1, -1, -1), output.as_strided((2, 3, 24, 32), (600, 200, 8, 1))):
        with pytest.raises(ValueError, match=r"output must not overlap itself in memory with inplace=True, got .* with strides"):
            step(x, overlapping, inplace=True, **how)
    with pytest.raises(ValueError, match=r"must be finite in fp32, got gain=-?1e\+300"):
        GuidedStep(reference, cutoff=0.25, prediction="sample")(x, output, level=LEVELS[0], gamma=1e300)
    with pytest.raises(NotImplementedError, match=r"does not support gradients"):
        step(x, output.requires_grad_(), **how)
    with torch.no_grad():
        step(x, output, **how)


def test_what_is_no_stage_is_refused() -> None:
    reference = pictures()[2]
    with pytest.raises(ValueError, match=r"prediction must be one of epsilon, v_prediction, flow_prediction, sample, got prediction='eps'"):
        GuidedStep(reference, cutoff=0.25, prediction="eps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cutoff must lie in \(0, 1\]"):
        GuidedStep(reference, cutoff=0.0, prediction="epsilon")
    with pytest.raises(ValueError, match=r"at least one coarse pixel, got cutoff=0.03 for length=24"):
        GuidedStep(reference, cutoff=0.03, prediction="epsilon")
    with pytest.raises(ValueError, match=r"reference must be \[B, C, Y, X\]"):
        GuidedStep(reference[0], cutoff=0.25, prediction="epsilon")
    with pytest.raises(ValueError, match=r"must be one of auto, matmul, triton, got impl='reference'"):
        GuidedStep(reference, cutoff=0.25, prediction="epsilon", impl="reference")
    level = NoiseLevel.of_flow(0.5)
    views = [packed_view(torch.zeros(1, 64 // p**2, 4 * p**2), grid=(8 // p, 8 // p), patch=p) for p in (2, 4)]
    with pytest.raises(
        ValueError, match=r"packed tensors must have the same patch size, got \[\(1, 4, 4, 2, 4, 2\), \(1, 4, 2, 4, 2, 4\)\]"
    ):
        GuidedStep(torch.zeros(1, 4, 8, 8), cutoff=0.25, prediction="flow_prediction")(*views, level=level, gamma=1.0)
