"""The work of a run, recorded and then counted without weights, is what torch's counter sees while the same run computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.memory import estimate
from scalediff.cascade.pipeline import pixels_per_latent
from scalediff.cost.flops import attention_work
from scalediff.cost.recorded import RecordedWork, recorded_work
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built

pytest.importorskip("diffusers")

from tests.scalediff.cascade import prompted_pipelines as small
from tests.scalediff.cascade.further_pipelines import FURTHER, ready
from tests.scalediff.cascade.test_assumed import foreign


def counted(pipe: Any, size: int, prompt: str | None = None, **more: Any) -> tuple[float, float]:
    """FLOPs by the record, and by torch's counter, of one run with attention as matrix products."""
    arguments: dict[str, Any] = {"height": size, "width": size, "steps": 1, **more}
    scalediff.generate(pipe, prompt, generator=seeded(), **arguments)  # the memory of the autoencoder is estimated once, and kept
    counter = FlopCounterMode(display=False)
    with recorded_work(pipe) as work, counter, sdpa_kernel(SDPBackend.MATH):
        scalediff.generate(pipe, prompt, generator=seeded(), **arguments)
    return work.tflops() * 1e12, float(counter.get_total_flops())


@pytest.mark.parametrize(("method", "batch"), [("direct", 2), pytest.param("diffusehigh", 1, marks=pytest.mark.slow)])
def test_u_nets(trained_demo: Any, method: str, batch: int) -> None:
    """All that the record lacks is DiffuseHigh's wavelet transform."""
    text = torch.randn(batch, 24, 64, generator=seeded())
    call = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    recorded, computed = counted(trained_demo, 72, method=method, guidance_scale=2.0, call=call)
    assert recorded == pytest.approx(computed, rel=1e-6 if method == "direct" else 1e-4)


def test_packed_latents() -> None:
    pipe, arguments = built("FLUX")
    with scalediff.patch_model(pipe, window=(4, 4)):
        recorded, computed = counted(pipe, 32, method="direct", call=arguments)
    assert recorded == pytest.approx(computed)


def small_z_image() -> tuple[Any, dict[str, Any]]:
    pipe = small.z_image()
    scalediff.patch_model(pipe, window=WINDOW)
    return pipe, {}


@pytest.mark.parametrize(
    "name", ["PRX", *(pytest.param(name, marks=pytest.mark.slow) for name in ("HiDream-I1", "ERNIE-Image", "Z-Image"))]
)
def test_two_stages_of_pipelines_from_text(name: str) -> None:
    """Their text encoders, which are not recorded, do the same for both sizes, and no text is padded."""
    pipe, call = ready(name) if name in FURTHER else small_z_image()
    boat = "a red boat on a quiet lake in the evening, with a lantern at its bow and swans around"
    how = {"guidance_scale": 3.0, "negative_prompt": boat, "call": call}
    narrow, wide = (counted(pipe, 32, boat, width=width, **how) for width in (16, 32))
    assert wide[0] > 1.1 * narrow[0]
    assert wide[0] - narrow[0] == pytest.approx(wide[1] - narrow[1], rel=1e-6)


def test_denoisers_that_nobody_listed_are_not_counted() -> None:
    pipe, _ = foreign("SD3")
    with pytest.raises(NotImplementedError, match="cannot be counted: Foreign has no from_config, by which it is built without weights"):
        RecordedWork(pipe).tflops()
    with pytest.raises(NotImplementedError, match="the work of denoisers of no known family is not counted, got Linear"):
        attention_work(torch.nn.Linear(1, 1), {})
    prx = ZOO["PRX"]
    with pytest.raises(
        ValueError, match=r"PRXTransformer2DModel does not tell its native size: pass native=\(Y, X\) in tokens, got native=None"
    ):
        attention_work(prx.build(), prx.inputs(Draw(0), (8, 8), 1))


def test_passes_without_a_known_layout_are_not_counted() -> None:
    pipe, _ = small_z_image()
    pictures = {"x": [[torch.zeros(4, 1, 8, 8)]], "t": torch.ones(1), "cap_feats": [torch.zeros(7, 32)]}
    with recorded_work(pipe) as work:
        work._record_forward(pipe.transformer, (), pictures)
    with pytest.raises(NotImplementedError, match="ZImagePipeline cannot be counted: several pictures in one sequence are not supported"):
        work.tflops()


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
