"""Which pipelines draw from text, read from the signatures of their calls, and what patching says of those without a cascade."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import scalediff
from bench.models.zoo import ZOO
from scalediff.patching.networks import is_text_to_image, may_edit_picture
from tests.conftest import seeded

diffusers = pytest.importorskip("diffusers")

FROM_TEXT = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline",
    "ChromaPipeline", "PixArtSigmaPipeline", "StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline",
    "StableDiffusion3ControlNetPipeline", "FluxControlNetPipeline", "QwenImageControlNetPipeline",
)  # fmt: skip
PICTURE_OPTIONAL = ("Flux2Pipeline", "Flux2KleinPipeline", "FluxKontextPipeline")
PICTURE_REQUIRED = (
    "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionAdapterPipeline", "StableUnCLIPImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusion3ControlNetInpaintingPipeline", "QwenImageControlNetInpaintPipeline", "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline", "FluxFillPipeline", "FluxControlImg2ImgPipeline", "Flux2KleinInpaintPipeline",
    "ZImageControlNetInpaintPipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", [*FROM_TEXT, *PICTURE_OPTIONAL])
def test_pipelines_that_draw_from_text(name: str) -> None:
    cls = getattr(diffusers, name)
    assert is_text_to_image(cls)
    assert may_edit_picture(cls) == (name in PICTURE_OPTIONAL)


@pytest.mark.parametrize("name", PICTURE_REQUIRED)
def test_pipelines_that_need_a_picture(name: str) -> None:
    assert not is_text_to_image(getattr(diffusers, name))


def pipeline(name: str, model: str, **parts: Any) -> Any:
    """A pipeline with a small denoiser and nothing else."""
    missing = {"scheduler", "vae", "text_encoder", "tokenizer", *parts} - {"transformer"}
    return getattr(diffusers, name)(transformer=ZOO[model].build(), **(dict.fromkeys(missing) | parts))


def test_patching_warns_where_there_is_no_cascade() -> None:
    pipe = pipeline("GlmImagePipeline", "GLM-Image", processor=None, vision_language_encoder=None)
    with pytest.warns(UserWarning, match="above the native size it is direct inference with windowed attention") as caught:
        handle = scalediff.patch_model(pipe, window=(4, 4))
    (warning,) = caught
    assert str(warning.message).startswith(
        "scalediff: the cascade does not support GlmImageTransformer2DModel (an autoregressive model draws its tokens for one picture size"
    )
    assert warning.filename == __file__
    assert handle.report.call in str(warning.message)
    scalediff.unpatch_model(pipe)
    with pytest.raises(ValueError, match=r"the cascade supports .*, got GlmImageTransformer2DModel: an autoregressive"):
        scalediff.generate(pipe, "a moon", height=2048, width=2048, generator=seeded())


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "FluxKontextPipeline"])
def test_a_pipeline_that_can_also_edit_says_so(name: str) -> None:
    more = {"text_encoder_2": None, "tokenizer_2": None} if name == "FluxKontextPipeline" else {}
    pipe = pipeline(name, "FLUX.1" if more else "FLUX.2", **more)
    with scalediff.patch_model(pipe) as handle:
        assert handle.report.call == f"{name} runs the cascade above the native size, unless it is given a picture to edit"
        with pytest.raises(ValueError, match=f"call must not hold a picture for {name}, got image"):
            scalediff.generate(pipe, "a moon", height=2048, width=2048, call={"image": object()})
        with pytest.raises(ValueError, match=r"Input is in incorrect format|Provide either"):  # the pipeline's own check
            pipe(image=object(), height=2048, width=2048)


def test_no_warning_for_a_cascade_for_editing_or_for_the_network_alone(demo: Any) -> None:
    editing = diffusers.StableDiffusionImg2ImgPipeline(**demo.components, requires_safety_checker=False)
    network = ZOO["Chroma"].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (demo, editing, demo.unet, network):
            with scalediff.patch_model(model):
                pass
