"""Structure guidance applied to the model output: two kernels per step.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalediff_kernels._arguments import checked_wrap
from scalediff_kernels.lowpass import op
from scalediff_kernels.lowpass.api import Impl, check_gamma, check_picture, choose
from scalediff_kernels.lowpass.geometry import Kind, coarse_length
from scalediff_kernels.steps.geometry import NoiseLevel, Prediction, check_prediction, output_change, x0_weights


class GuidedStep:
    """Structure guidance of one stage: changes a model output so that it predicts the guided x0.

    Guidance, `x0 <- x0 + gamma (LP(reference) - LP(x0))`, is linear, so it can be applied to the model output. The history of a
    multi-step solver then holds guided predictions. The coarse grid of the reference is computed once. A step reads x and the output to
    compute their coarse grid, and then updates the output: two kernels on a GPU, matrix products elsewhere.

    Level, gamma and guidance scale are Python numbers, so they are constants in a graph of torch.compile or a CUDA graph. A step does not
    become faster by either; compile the code around it.

    Args:
        reference: The clean reference of the stage, `[B, C, Y, X]` with any strides or packed (`packed_view`). `[1, C, Y, X]` serves any
            batch.
        cutoff, kind, wrap, impl: As in `low_pass`, except that `impl="reference"` and gradients are not supported.
        prediction: What the model predicts, for `x = signal * x0 + noise * eps`. `"epsilon"`: eps;
            `"v_prediction"`: `(signal * eps - noise * x0) / sqrt(signal^2 + noise^2)`; `"flow_prediction"`: `eps - x0`; `"sample"`: x0.

    Raises:
        ValueError: As `low_pass`, or the prediction is unknown.
        TypeError: As `low_pass`.
        NotImplementedError: As `low_pass`.

    ScaleDiff, arXiv:2510.25818; docs/internals/guidance.md derives the weights.
    """

    def __init__(
        self,
        reference: Tensor,
        *,
        cutoff: float,
        prediction: Prediction,
        kind: Kind = "resize",
        wrap: tuple[bool, bool] = (False, False),
        impl: Impl = "auto",
    ) -> None:
        check_picture("reference", reference)
        check_prediction(prediction)
        for length in op.picture_size(reference):
            coarse_length(length, cutoff, kind)
        if impl == "reference":
            raise ValueError("impl of GuidedStep must be one of auto, matmul, triton, got impl='reference'")
        self.cutoff, self.kind, self.wrap, self.prediction, self.impl = cutoff, kind, checked_wrap(wrap), prediction, impl
        self._shape, self._device = _picture_shape(reference), reference.device
        triton = choose(impl, [reference.detach()]) == "triton"
        self._coarse: Tensor = op.low_pass_coarse([reference.detach()], [1.0], None, cutoff, kind, self.wrap, triton)

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
        """Apply structure guidance to a model output.

        Args:
            x: The unscaled sample that the model output belongs to, with the shape and device of the reference, packed or not. Its dtype
                may differ.
            output: The model output, like x. With `unconditional`, the output of the conditional pass.
            level: Noise level of x: `NoiseLevel.of_alpha_bar`, `of_sigma` or `of_flow`.
            gamma: Finite strength. The paper uses `(1 - abar) / (1 - abar_restart)` for SDXL and sigma for FLUX.
            unconditional: The output of the unconditional pass. If given, classifier-free guidance is applied too.
            guidance_scale: Scale of classifier-free guidance, `unconditional + scale (output - unconditional)`.
            inplace: Write the result into `output`.

        Returns:
            The guided model output, with the shape, dtype and packing of `output`. Sums are in fp32 (fp64 for fp64), rounded once.

        Raises:
            ValueError: Shapes or devices disagree; gamma or the scale is not finite; only one of unconditional and guidance_scale is
                given; the noise is zero, or so small that the change is not finite in fp32; or `inplace` is set and `output` overlaps
                itself in memory.
            TypeError: A tensor is not fp16, bf16, fp32 or fp64.
            NotImplementedError: A tensor requires gradients.
        """
        tensors = {"x": x, "output": output} | ({} if unconditional is None else {"unconditional": unconditional})
        self._check(tensors, gamma, guidance_scale, inplace=inplace)
        chosen = choose(self.impl, [self._coarse, *tensors.values()])
        if chosen == "reference":
            raise NotImplementedError("GuidedStep does not support gradients: use torch.no_grad()")
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
        difference = op.low_pass_coarse(pictures, weights, coarse, self.cutoff, self.kind, self.wrap, triton)  # coarse(reference - x0)
        if inplace:
            op.low_pass_expand_(output, shares[0], difference, gain, outputs[1:], shares[1:], self.cutoff, self.kind, self.wrap, triton)
            return output
        guided: Tensor = op.low_pass_expand(output, difference, gain, outputs, shares, self.cutoff, self.kind, self.wrap, triton)
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
            raise ValueError(f"packed tensors must have the same patch size, got {[tuple(tensor.shape) for tensor in tensors.values()]}")
        check_gamma(gamma)
        if ("unconditional" in tensors) != (guidance_scale is not None):
            raise ValueError(
                f"classifier-free guidance needs both unconditional and guidance_scale, "
                f"got {guidance_scale=} {'with' if 'unconditional' in tensors else 'without'} unconditional"
            )
        if guidance_scale is not None and not abs(guidance_scale) < float("inf"):
            raise ValueError(f"guidance_scale must be finite, got {guidance_scale=}")
        if inplace and _overlaps_itself(tensors["output"]):
            raise ValueError(
                f"output must not overlap itself in memory with inplace=True, "
                f"got {tuple(tensors['output'].shape)} with strides {tensors['output'].stride()}"
            )


def _picture_shape(x: Tensor) -> tuple[int, ...]:
    """`(B, C, Y, X)` of a picture, packed or not."""
    return (x.shape[0], x.shape[1], *op.picture_size(x))


def _overlaps_itself(x: Tensor) -> bool:
    """Whether elements may share memory: the stride of an axis is not larger than the extent of the axes with smaller strides."""
    reach = 0
    for stride, length in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (length - 1)
    return False
