"""Structure guidance folded into the model output: two kernels a step.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalediff_kernels.lowpass import op
from scalediff_kernels.lowpass.api import Impl, check_gamma, check_picture, choose
from scalediff_kernels.lowpass.geometry import Kind, coarse_length
from scalediff_kernels.steps.geometry import NoiseLevel, Prediction, check_prediction, output_change, x0_weights


class GuidedStep:
    """Structure guidance of one stage: from x and a model output, the output that stands for a guided x0.

    `x0 <- x0 + gamma (LP(reference) - LP(x0))` is linear, so it is a change of the model output, and a multi-step solver's history
    holds guided estimates. The reference's coarse grid is computed once; a step is one pass over x and the output, and one over the
    output: two kernels on a GPU, matrix products elsewhere.

    Level, gamma and scale are numbers: under torch.compile they are constants of the graph, and a CUDA graph replays those it captured.
    A step gains nothing from either; compile what lies around it.

    Args:
        reference: The stage's clean reference, `[B, C, Y, X]` of any strides or packed (`packed_view`), or `[1, C, Y, X]` for every batch.
        cutoff, kind, impl: As in `low_pass`; without `"reference"`, and without gradients.
        prediction: What the model predicts, for `x = signal * x0 + noise * eps`: `"epsilon"`: eps.
            `"v_prediction"`: `(signal * eps - noise * x0) / sqrt(signal^2 + noise^2)`. `"flow_prediction"`: `eps - x0`. `"sample"`: x0.

    Raises:
        ValueError, TypeError, NotImplementedError: as `low_pass`; unknown prediction.

    ScaleDiff, arXiv:2510.25818; docs/internals/guidance.md derives the weights.
    """

    def __init__(self, reference: Tensor, *, cutoff: float, prediction: Prediction, kind: Kind = "resize", impl: Impl = "auto") -> None:
        check_picture("reference", reference)
        check_prediction(prediction)
        for length in op.picture_size(reference):
            coarse_length(length, cutoff, kind)
        if impl == "reference":
            raise ValueError("GuidedStep has the implementations auto, matmul and triton, got impl='reference'")
        self.cutoff, self.kind, self.prediction, self.impl = cutoff, kind, prediction, impl
        self._shape, self._device = _picture_shape(reference), reference.device
        triton = choose(impl, [reference.detach()]) == "triton"
        self._coarse: Tensor = op.low_pass_coarse([reference.detach()], [1.0], None, cutoff, kind, triton)

    def __call__(
        self,
        x: Tensor,
        output: Tensor,
        *,
        level: NoiseLevel,
        gamma: float,
        unconditional: Tensor | None = None,
        guidance_scale: float | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Correct a model output.

        Args:
            x: The sample the model saw, unscaled; shape and device of the reference, packed or not; dtypes may differ.
            output: The model output, like x; with `unconditional`, that of the conditional pass.
            level: The noise in x: `NoiseLevel.of_alpha_bar`, `of_sigma`, `of_flow`.
            gamma: Strength, finite; the paper takes `(1 - abar) / (1 - abar_restart)` for SDXL, sigma for FLUX.
            unconditional: The output of the unconditional pass; classifier-free guidance is then done on the way.
            guidance_scale: Of classifier-free guidance, `unconditional + scale (output - unconditional)`.
            inplace: Write the result into `output`.

        Returns:
            A picture like output; summed in fp32 (fp64), rounded once.

        Raises:
            ValueError: shapes or devices disagree, gamma or the scale is not finite, one of unconditional and its scale is missing, no
                noise to guide, so little that the change is not finite in fp32, or an output that overlaps itself in memory is to be
                changed in place.
            TypeError: a tensor is of another dtype than fp16, bf16, fp32 and fp64.
            NotImplementedError: a tensor requires gradients.
        """
        tensors = {"x": x, "output": output} | ({} if unconditional is None else {"unconditional": unconditional})
        self._check(tensors, gamma, guidance_scale, inplace=inplace)
        chosen = choose(self.impl, [self._coarse, *tensors.values()])
        if chosen == "reference":
            raise NotImplementedError("a guided step has no derivative and one is wanted: use torch.no_grad()")
        triton = chosen == "triton"
        of_x, of_output = x0_weights(level, self.prediction)
        gain = gamma * output_change(level, self.prediction)
        if not max(abs(gain), abs(of_x), abs(of_output)) <= torch.finfo(torch.float32).max:
            raise ValueError(f"the change of the output must be finite in fp32, got {gain=} for {level=}, {gamma=}")
        outputs, shares = [output], [1.0]
        if unconditional is not None and guidance_scale is not None:
            outputs, shares = [output, unconditional], [guidance_scale, 1 - guidance_scale]
        terms = [(output, -of_output * share) for output, share in zip(outputs, shares, strict=True)]
        terms += [(x, -of_x)] if of_x else []
        pictures, weights = zip(*terms, strict=True)
        coarse = self._coarse.expand(x.shape[0], -1, -1, -1)
        difference = op.low_pass_coarse(pictures, weights, coarse, self.cutoff, self.kind, triton)  # coarse(reference - x0)
        if inplace:
            op.low_pass_expand_(output, shares[0], difference, gain, outputs[1:], shares[1:], self.cutoff, self.kind, triton)
            return output
        guided: Tensor = op.low_pass_expand(output, difference, gain, outputs, shares, self.cutoff, self.kind, triton)
        return guided

    def _check(self, tensors: dict[str, Tensor], gamma: float, guidance_scale: float | None, *, inplace: bool) -> None:
        for name, tensor in tensors.items():
            check_picture(name, tensor)
        batch = tensors["x"].shape[0] if self._shape[0] == 1 else self._shape[0]
        for name, tensor in tensors.items():
            if _picture_shape(tensor) != (batch, *self._shape[1:]) or tensor.device != self._device:
                raise ValueError(
                    f"{name} must have the reference's shape {(batch, *self._shape[1:])} and device {self._device}, "
                    f"got {tuple(tensor.shape)} on {tensor.device}"
                )
        if len({tensor.shape[3] for tensor in tensors.values() if tensor.ndim == 6}) > 1:
            raise ValueError(f"packed tensors must be packed alike, got {[tuple(tensor.shape) for tensor in tensors.values()]}")
        check_gamma(gamma)
        if ("unconditional" in tensors) != (guidance_scale is not None):
            raise ValueError(
                f"classifier-free guidance takes unconditional and guidance_scale together, "
                f"got {guidance_scale=} {'with' if 'unconditional' in tensors else 'without'} unconditional"
            )
        if guidance_scale is not None and not abs(guidance_scale) < float("inf"):
            raise ValueError(f"guidance_scale must be finite, got {guidance_scale=}")
        if inplace and _overlaps_itself(tensors["output"]):
            raise ValueError(
                f"an output that overlaps itself cannot be changed in place, "
                f"got {tuple(tensors['output'].shape)} with strides {tensors['output'].stride()}"
            )


def _picture_shape(x: Tensor) -> tuple[int, ...]:
    """`(B, C, Y, X)`, packed or not."""
    return (x.shape[0], x.shape[1], *op.picture_size(x))


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share memory: an axis steps no further than the axes below it reach."""
    reach = 0
    for stride, length in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (length - 1)
    return False
