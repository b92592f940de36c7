"""What runs with a picture to change accept and refuse, and how they are interrupted and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scalediff
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.changing import blank_arguments
from scalediff.cascade.memory import estimate
from scalediff.cascade.pipeline import preset
from scalediff.patching.networks import changes_picture, obstacle_to_changes
from tests.conftest import seeded
from tests.scalediff.cascade.changing_pipelines import changing, right_half
from tests.scalediff.cascade.prompted_pipelines import picture_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

Built = tuple[Any, dict[str, Any]]
BIG, SMALL = picture_of((32, 32)), picture_of((16, 16))


@pytest.fixture(scope="module")
def inpainting() -> Any:
    pipe, arguments = changing("FluxInpaintPipeline")
    scalediff.patch_model(pipe, window=WINDOW)
    return pipe, arguments


@pytest.fixture(scope="module")
def from_text() -> Any:
    pipe, arguments = built("FLUX")
    scalediff.patch_model(pipe, window=WINDOW)
    return pipe, arguments


def upscale(pipeline: Built, picture: Any = SMALL, **more: Any) -> scalediff.Result:
    pipe, arguments = pipeline
    how: dict[str, Any] = {"height": 32, "width": 32, "call": arguments, "steps": 4, "generator": seeded()} | more
    return scalediff.upscale(pipe, picture, None, **how)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"strength": 0.0}, ValueError, r"strength must lie in \(0, 1\], got strength=0.0"),
        ({"strength": 1.5}, ValueError, r"strength must lie in \(0, 1\], got strength=1.5"),
        ({"strength": "half"}, TypeError, "strength must be a number, got strength='half'"),
        ({"picture": BIG}, ValueError, "the target must be larger than the picture, 32 x 32, got height=32, width=32"),
        (
            {"picture": picture_of((40, 40)), "strength": 0.3},
            ValueError,
            "the target must not be smaller than the picture, 40 x 40, got height=32, width=32",
        ),
        (
            {"mask_image": right_half((16, 32))},
            ValueError,
            "mask_image must have the aspect ratio of the picture, 16 x 16, got 16 x 32",
        ),
        (
            {"mask_image": [right_half((16, 16))] * 2},
            ValueError,
            "mask_image must hold one picture, or one for each prompt, for 1 pictures, got 2",
        ),
        ({"mask_image": "mask.png"}, TypeError, "mask_image must be a PIL picture, an array or a tensor, or a list of at least one, got"),
        ({"mask_image": []}, TypeError, r"mask_image must be a PIL picture, .* got mask_image=\[\]"),
        ({"mask_image": torch.ones(1, 2, 16, 16)}, ValueError, "mask_image must have one channel, got .*shape.*2, 16, 16"),
        (
            {"picture": Image.new("F", (16, 16))},
            ValueError,
            "a picture must have levels of 8 bits, or .* first, got image.mode='F'",
        ),
        (
            {"call": {"strength": 0.5}},
            ValueError,
            "call must not hold arguments of generate or upscale, or those that each stage sets, got strength",
        ),
    ],
)
def test_upscale_refuses(inpainting: Built, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        upscale(inpainting, **{"picture": SMALL} | more)


def test_grey_levels_of_16_bits_are_not_cut_off(inpainting: Built) -> None:
    """Neither of the picture nor of the mask, of which all but black would be white."""
    grey = np.tile(np.linspace(0, 200, 16, dtype=np.uint16), (16, 1))
    drawn = [
        upscale(inpainting, Image.fromarray(levels), mask_image=Image.fromarray(levels)).images[0]
        for levels in (grey.astype(np.uint8), grey * 257)
    ]
    assert np.array_equal(*map(np.asarray, drawn))


def test_what_is_transparent_in_a_mask_is_kept_and_in_a_picture_white(inpainting: Built) -> None:
    """Whatever colour is hidden there, which for Pillow alone would be the picture."""
    clear, half = Image.new("RGBA", (16, 16), (255, 255, 255, 0)), right_half((16, 16)).convert("L")
    drawn = [
        upscale(inpainting, picture, mask_image=mask).images[0]
        for picture, mask in (
            (Image.new("RGB", (16, 16), "white"), half),
            (Image.new("RGBA", (16, 16), (200, 0, 0, 0)), Image.composite(Image.new("RGBA", (16, 16), "white"), clear, half)),
        )
    ]
    assert np.array_equal(*map(np.asarray, drawn))


def test_a_strength_needs_a_pipeline_that_has_one(from_text: Built) -> None:
    with pytest.raises(
        ValueError,
        match=r"strength needs an image-to-image or inpainting pipeline, got FluxPipeline; AutoPipelineForImage2Image.from_pipe makes one",
    ):
        upscale(from_text, strength=0.5)


def test_a_strength_is_at_least_one_step() -> None:
    """By the rule of the pipeline: SD and SDXL drop a part of a step, FLUX runs it."""
    pipe, arguments = changing("StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(ValueError, match=r"strength must be at least one of the steps=4, got strength=0.2"):
        scalediff.upscale(pipe, picture_of((8, 8)), None, height=16, width=16, call=arguments, steps=4, strength=0.2)


def test_a_base_stage_must_know_of_the_mask() -> None:
    pipe, arguments = changing("FluxImg2ImgPipeline")
    with scalediff.patch_model(pipe, window=WINDOW):
        with pytest.raises(
            ValueError, match=r"mask_image needs an inpainting pipeline where a base stage redraws the picture, got FluxImg2I"
        ):
            upscale((pipe, arguments), strength=0.9, mask_image=right_half((16, 16)))
        kept = upscale((pipe, arguments), BIG, strength=0.3, mask_image=right_half((16, 16)))
    assert [stage.height for stage in kept.stages] == [32]


def test_the_trajectory_of_the_base_stage_must_be_long_enough(inpainting: Built) -> None:
    chosen = replace(preset(inpainting[0]), steps=4, anchor="trajectory")
    with pytest.raises(ValueError, match=r"anchor='trajectory' needs a base stage of at least 2 steps, as many as a stage above it, got s"):
        upscale(inpainting, strength=0.2, preset=chosen, steps=None)
    assert len(upscale(inpainting, strength=0.9, preset=chosen, steps=None).stages) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strength": 0.0}, r"strength must lie in \(0, 1\], got strength=0.0"),
        ({"image": torch.zeros(1, 4, 16, 16)}, "image must be pictures with three channels above the native size, got "),
        ({"image": [BIG] * 3}, "image must hold one picture, or one for each prompt, for 1 pictures, got 3"),
        ({"padding_mask_crop": 4}, "above the native size the call is several stages, each of its own size: it cannot have padding_mask_c"),
        (
            {"latents": torch.zeros(1, 64, 16)},
            "above the native size the call is several stages, each of its own size: it cannot have latents",
        ),
        ({"mask_image": right_half((16, 32))}, "mask_image must have the aspect ratio of the picture, 32 x 32, got 16 x 32"),
    ],
)
def test_a_call_above_the_native_size_refuses(inpainting: Built, more: dict[str, Any], message: str) -> None:
    pipe, arguments = inpainting
    given = {"image": BIG, "mask_image": right_half((32, 32)), "height": 32, "width": 32, "num_inference_steps": 2}
    with pytest.raises(ValueError, match=message):
        pipe(**{**arguments, **given, **more})


def test_latents_as_a_picture_above_the_native_size_are_refused() -> None:
    """Their size is that of the picture which they stand for."""
    pipe, arguments = changing("StableDiffusionXLImg2ImgPipeline")
    with scalediff.patch_model(pipe), pytest.raises(ValueError, match="image must be pictures with three channels above the native size"):
        pipe(**arguments, image=torch.zeros(1, 4, 8, 8), strength=0.5)


@pytest.mark.parametrize("kind", ["array", "tensor", "list", "larger mask"])
def test_pictures_and_masks_come_in_any_form(inpainting: Built, kind: str) -> None:
    pipe, arguments = inpainting
    values, mask = np.asarray(BIG), np.asarray(right_half((32, 32)))[..., None]
    image, mask_image = {
        "array": (values[None] / 255, mask[None] / 255),
        "tensor": (torch.tensor(values).permute(2, 0, 1)[None] / 255, torch.tensor(mask).permute(2, 0, 1)[None] / 255),
        "list": ([BIG], [right_half((32, 32))]),
        "larger mask": (BIG, right_half((64, 64))),
    }[kind]
    how = {**arguments, "height": 32, "width": 32, "num_inference_steps": 2, "strength": 0.5, "output_type": "latent"}
    found, expected = (
        pipe(image=one, mask_image=of_one, generator=seeded(), **how).images
        for one, of_one in ((image, mask_image), (BIG, right_half((32, 32))))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_pictures_size_fits_whatever_the_model_can_have(inpainting: Built) -> None:
    """A picture of 39 pixels a side becomes one of 36; a mask is compared with what was given."""
    pipe, arguments = inpainting
    how = {**arguments, "height": 64, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    assert pipe(image=picture_of((64, 39)), mask_image=right_half((64, 39)), **how).images.shape == (1, 16 * 8, 16)


def test_pipelines_that_draw_the_size_of_their_picture() -> None:
    """Without a size in the call, FLUX's draws its native one, and Z-Image's that of the picture, down to what it can draw."""
    sizes = []
    for name, window in (("FluxImg2ImgPipeline", None), ("ZImageImg2ImgPipeline", WINDOW)):
        pipe, arguments = changing(name)
        pipe.default_sample_size = 8  # of FLUX's: the trained size of the small model would take long
        with scalediff.patch_model(pipe, window=window):
            sizes.append(pipe(**arguments, image=picture_of((34, 35)), num_inference_steps=2, output_type="pt").images.shape[-2:])
    assert sizes == [(16, 16), (32, 32)]


def test_an_interrupted_call_returns_the_base_stage(inpainting: Built) -> None:
    pipe, arguments = inpainting

    def stop(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    how = {"height": 32, "width": 32, "num_inference_steps": 4, "strength": 1.0, "output_type": "pt", "callback_on_step_end": stop}
    pictures = pipe(**arguments, image=SMALL, mask_image=right_half((16, 16)), **how).images
    assert pictures.shape == (1, 3, 16, 16)
    assert pictures.std() > 0.01


def test_a_run_is_resumed_bit_for_bit_and_belongs_to_its_mask(inpainting: Built, tmp_path: Path) -> None:
    how = {"height": 64, "width": 64, "strength": 0.9, "mask_image": right_half((16, 16)), "steps": 3}
    whole = upscale(inpainting, **how)

    def interrupt(stage: Any) -> None:
        if stage.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale(inpainting, **how, workdir=tmp_path, on_stage=interrupt)
    resumed = upscale(inpainting, **how, workdir=tmp_path)
    assert torch.equal(resumed.stages[-1].latents, whole.stages[-1].latents)
    for other in ({"mask_image": right_half((8, 8)).rotate(180)}, {"strength": 0.8}):
        with pytest.raises(ValueError, match="picture"):
            upscale(inpainting, **how | other, workdir=tmp_path)


@pytest.mark.parametrize("name", ["StableDiffusionXLInpaintPipeline", "QwenImageImg2ImgPipeline"])
def test_the_memory_is_that_of_drawing_from_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimated without encoding a picture."""
    pipe, arguments = changing(name)
    monkeypatch.setattr(pipe.vae.encoder, "forward", None)
    given = {**arguments, **blank_arguments(pipe), "num_inference_steps": 2}
    parent, more = built("SDXL" if "XL" in name else "Qwen-Image")
    assert estimate(pipe, given, (64, 64)).denoiser == estimate(parent, {**more, "num_inference_steps": 2}, (64, 64)).denoiser > 0
    assert "encode" not in vars(pipe.vae)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("FluxKontextInpaintPipeline", "its picture is also among the tokens"),
        ("Flux2KleinInpaintPipeline", "its picture is also among the tokens"),
        ("QwenImageEditInpaintPipeline", "it encodes the prompt together with the picture"),
        ("LatentConsistencyModelImg2ImgPipeline", "its schedule depends on the strength"),
        ("StableDiffusionDepth2ImgPipeline", "it estimates the depth of one picture size"),
        ("StableDiffusionXLImg2ImgPipeline", ""),
    ],
)
def test_pipelines_that_change_pictures_in_other_ways(name: str, why: str) -> None:
    cls = getattr(diffusers, name)
    assert changes_picture(cls)
    found = obstacle_to_changes(cls)
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_what_the_cascade_cannot_change_has_a_reason() -> None:
    parts = dict.fromkeys(("vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxKontextInpaintPipeline(transformer=ZOO["FLUX.1"].build(), **parts)
    with pytest.warns(UserWarning, match=r"the cascade does not support FluxKontextInpaintPipeline \(its picture is also among the tokens"):
        handle = scalediff.patch_model(pipe, window=WINDOW)
    assert handle.report.call.endswith("its call is unchanged")
    with pytest.raises(NotImplementedError, match="the cascade does not support FluxKontextInpaintPipeline: its picture is also among"):
        scalediff.upscale(pipe, SMALL, "a moon", height=32, width=32)


def test_pipelines_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"the cascade needs a text-to-image pipeline, got FluxImg2ImgPipeline"):
        scalediff.generate(changing("FluxImg2ImgPipeline")[0], "a moon", height=32, width=32)
    parts = dict.fromkeys(("vae", "scheduler", "text_encoder", "tokenizer", "processor"))
    editing = diffusers.QwenImageEditPipeline(transformer=ZOO["Qwen-Image"].build(), **parts)
    with pytest.raises(TypeError, match=r"needs a text-to-image, image-to-image or inpainting pipeline, got QwenImageEditPipeline"):
        scalediff.upscale(editing, SMALL, "a moon", height=32, width=32)
