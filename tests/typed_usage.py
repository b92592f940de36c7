"""A user's script with every public name, which `mypy --strict` checks against an installed package (`test_release.py`)."""

from __future__ import annotations

import torch

import scalediff
import scalediff_kernels as ops


def picture(prompt: str) -> tuple[int, int]:
    pipe = scalediff.load_demo()
    handle: scalediff.Handle = scalediff.patch_model(pipe, jitter="none")
    with handle:
        print(handle.report)
    scalediff.unpatch_model(pipe)
    scalediff.register_backend()
    result: scalediff.Result = scalediff.generate(
        pipe,
        prompt,
        height=128,
        width=128,
        restart=(0.4,),
        on_stage=lambda stage: print(stage.height),
        on_step=lambda step: print(step.left),
    )
    larger = scalediff.upscale(pipe, result.images[0], prompt, height=256, width=256, attention="npa")
    return larger.stages[-1].height, larger.settings.steps


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = ops.neighborhood_patch_attention(q, k, v, window=(8, 8), patch=(4, 4))
    image, text = ops.joint_neighborhood_patch_attention(q, k, v, q[0], k[0], v[0], window=(8, 8), patch=(4, 4))
    assert text is not None
    return out + image + text.sum()


def guidance(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    reference = ops.mix_frequencies(x, ops.low_pass(x, cutoff=0.25), cutoff=0.125)
    low_pass: type[ops.LowPass] = ops.LowPass
    step = ops.GuidedStep(reference, cutoff=0.125, prediction="epsilon")
    guided: torch.Tensor = step(x, eps, level=ops.NoiseLevel.of_alpha_bar(0.3), gamma=0.7)
    return (
        ops.guide_structure(guided, reference, cutoff=0.125, gamma=0.5)
        + ops.packed_view(x[0], grid=(8, 8)).mean()
        + float(low_pass is not None)
    )
