"""The work of a run, recorded and then counted without weights, is what torch's counter sees while the same run computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scalediff
from scalediff.cascade.memory import estimate
from scalediff.cascade.pipeline import pixels_per_latent
from scalediff.cost.recorded import recorded_work
from tests.conftest import seeded
from tests.scalediff.cascade.test_further_pipelines import ready
from tests.scalediff.cascade.test_pipelines import built

pytest.importorskip("diffusers")


def counted(pipe: Any, size: int, **more: Any) -> tuple[float, float]:
    """FLOPs by the record, and by torch's counter, of one run with full attention as matrix products."""
    arguments: dict[str, Any] = {"height": size, "width": size, "steps": 1, **more}
    scalediff.generate(pipe, None, generator=seeded(), **arguments)  # the memory of the autoencoder is estimated once, and kept
    counter = FlopCounterMode(display=False)
    with recorded_work(pipe) as work, counter, sdpa_kernel(SDPBackend.MATH):
        scalediff.generate(pipe, None, generator=seeded(), **arguments)
    return work.tflops() * 1e12, float(counter.get_total_flops())


@pytest.mark.parametrize(("method", "batch"), [("direct", 2), pytest.param("diffusehigh", 1, marks=pytest.mark.slow)])
def test_u_nets(demo: Any, method: str, batch: int) -> None:
    """All that the record lacks is DiffuseHigh's wavelet transform."""
    text = torch.randn(batch, 24, 64, generator=seeded())
    call = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    recorded, computed = counted(demo, 72, method=method, guidance_scale=2.0, call=call)
    assert recorded == pytest.approx(computed, rel=1e-6 if method == "direct" else 1e-4)


def test_packed_latents() -> None:
    pipe, arguments = built("FLUX")
    with scalediff.patch_model(pipe, window=(4, 4)):
        recorded, computed = counted(pipe, 32, method="direct", call=arguments)
    assert recorded == pytest.approx(computed)


def test_what_the_cascade_sets_in_a_denoiser_is_recorded_and_estimated() -> None:
    """HiDream-I1 pads a picture that is not square to its longest sequence, here by a stage of 6 x 3 tokens, more than its own 16."""
    pipe, call = ready("HiDream-I1")
    width, height = (side * pixels_per_latent(pipe) for side in (6, 12))
    assert estimate(pipe, call | {"prompt": "a boat"}, (height, width)).denoiser > 0
    with recorded_work(pipe) as work:
        scalediff.generate(pipe, "a boat", height=height, width=width, steps=1, call=call)
    assert work.tflops() > 0
    assert pipe.transformer.max_seq == 16


def test_the_pipeline_is_given_back_and_tiles_are_counted(demo: Any) -> None:
    before = set(demo.vae.__dict__), len(demo.unet._forward_pre_hooks)

    def fail_after_decoding() -> None:
        demo.vae.decode(torch.zeros(1, 4, 16, 16))
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), recorded_work(demo) as work:
        fail_after_decoding()
    assert (set(demo.vae.__dict__), len(demo.unet._forward_pre_hooks)) == before
    whole = work.tflops()
    demo.vae.enable_tiling()
    try:
        with recorded_work(demo) as tiles:
            demo.vae.decode(torch.zeros(1, 4, 32, 32))
    finally:
        demo.vae.disable_tiling()
    assert tiles.tflops() > 4 * whole, "tiles overlap"
