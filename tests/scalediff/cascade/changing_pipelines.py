"""Small random image-to-image and inpainting pipelines, and the pictures and masks that they are given.

Their autoencoders have a narrow posterior, as the published ones: diffusers' pipelines draw a sample of it, the cascade takes its mode.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.models.inputs import Draw
from bench.models.zoo import ZOO
from tests.scalediff.cascade import further_pipelines as further
from tests.scalediff.cascade import prompted_pipelines as prompted
from tests.scalediff.cascade.test_pipelines import PIPELINES, prompts

diffusers = pytest.importorskip("diffusers")

Built = tuple[Any, dict[str, Any]]  # a pipeline, and the arguments of its call that stand for a prompt
# By the class of the pipeline: the entry of PIPELINES with its parts.
PARTS = {
    "StableDiffusionXLImg2ImgPipeline": "SDXL", "StableDiffusionXLInpaintPipeline": "SDXL", "FluxImg2ImgPipeline": "FLUX",
    "FluxInpaintPipeline": "FLUX", "StableDiffusion3Img2ImgPipeline": "SD3", "QwenImageImg2ImgPipeline": "Qwen-Image",
    "QwenImageInpaintPipeline": "Qwen-Image", "ZImageImg2ImgPipeline": "Z-Image", "ZImageInpaintPipeline": "Z-Image",
}  # fmt: skip
CLASSES = (
    *PARTS, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusion3InpaintPipeline", "ChromaImg2ImgPipeline",
    "FluxFillPipeline", "StableDiffusionXLControlNetImg2ImgPipeline", "KolorsImg2ImgPipeline",
)  # fmt: skip
# The families of the others, in their order.
_OTHER = ("SD1.5", "SD1.5", "SD3", "Chroma", "FLUX", "SDXL", "Kolors")
BY_FAMILY = [pytest.param(name, id=f"{family}-{name}") for name, family in zip(CLASSES, (*PARTS.values(), *_OTHER), strict=True)]
# The families of those with a mask, and of those without.
INPAINTED = ("SDXL", "FLUX", "Qwen-Image", "Z-Image", "SD1.5", "SD3")
CHANGED = ("SDXL", "FLUX", "SD3", "Qwen-Image", "Z-Image", "SD1.5", "Chroma", "Kolors")
WITHOUT_SIZE = {"StableDiffusionXLImg2ImgPipeline", "StableDiffusionImg2ImgPipeline"}  # their calls draw the picture's size
WITH_MASK = {name for name in CLASSES if "Inpaint" in name or "Fill" in name}


@torch.no_grad()
def sharpened(vae: Any) -> Any:
    """The autoencoder with a narrow posterior: the half of the encoder's channels that is its log variance is -40."""
    for last in (vae.encoder.conv_out, getattr(vae, "quant_conv", None)):
        if last is not None:
            half = len(last.bias) // 2
            last.weight[half:] = 0
            last.bias[half:] = -40
    return vae


def changing(name: str) -> Built:
    """A pipeline of a class, by its name."""
    if name in PARTS:
        base, arguments = PIPELINES[PARTS[name]]()
        more = {"add_watermarker": False, "vae": further.autoencoder()} if PARTS[name] == "SDXL" else {}  # they know no shift
        pipe = getattr(diffusers, name)(**base.components | more)
    else:
        pipe, arguments = _FURTHER[name]()
    sharpened(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments


def _stable_diffusion(name: str, channels: int = 4) -> Built:
    spec = replace(ZOO["SD1.5"], config=ZOO["SD1.5"].config | {"in_channels": channels})
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = getattr(diffusers, name)(
        unet=spec.build(), vae=further.autoencoder(), scheduler=scheduler, requires_safety_checker=False, **parts
    )
    return pipe, prompts(Draw(3), pooled=False, negative=True)


def conditioned_on_the_picture() -> Built:
    """A U-Net with 9 channels: latents, mask and masked picture."""
    pipe, arguments = _stable_diffusion("StableDiffusionInpaintPipeline", channels=9)
    sharpened(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments


def _sd3_inpaint() -> Built:
    """Its class counts on 16 channels."""
    base, arguments = PIPELINES["SD3"]()
    spec = replace(ZOO["SD3"], config=ZOO["SD3"].config | {"in_channels": 16, "out_channels": 16})
    parts = base.components | {"transformer": spec.build(), "vae": further.autoencoder(latent_channels=16, shift_factor=0.1)}
    return diffusers.StableDiffusion3InpaintPipeline(**parts), arguments


def _chroma() -> Built:
    """diffusers 0.42 also has an inpainting pipeline, whose call asks the model's config for what it does not have."""
    pipe, call = further.chroma()
    return diffusers.ChromaImg2ImgPipeline(**pipe.components), {"prompt": "a moon", **call}


def _fill() -> Built:
    """A transformer that also sees the mask, 16 values of it in a token with a factor of 2, and the masked picture."""
    base, arguments = PIPELINES["FLUX"]()
    spec = replace(ZOO["FLUX.1"], config=ZOO["FLUX.1"].config | {"in_channels": 16 + 16 + 16, "out_channels": 16})
    parts = {name: base.components[name] for name in ("vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    return diffusers.FluxFillPipeline(transformer=spec.build(), **parts), arguments


def _controlled() -> Built:
    pipe = prompted.sdxl("StableDiffusionXLControlNetPipeline", controlnet=ZOO["ControlNet"].build())
    name = "StableDiffusionXLControlNetImg2ImgPipeline"
    changed = getattr(diffusers, name)(**pipe.components, add_watermarker=False)
    return changed, {"prompt": "a moon", "control_image": prompted.picture_of((16, 16), seed=7)}


def _kolors() -> Built:
    from diffusers.pipelines.kolors.pipeline_kolors_img2img import KolorsImg2ImgPipeline  # the public name needs sentencepiece

    base, call = further.kolors()
    words = base.tokenizer
    pipe = KolorsImg2ImgPipeline(**base.components | {"tokenizer": None})
    pipe.tokenizer = words
    return pipe, {"prompt": "a moon", **call}


_FURTHER = {
    "StableDiffusionImg2ImgPipeline": lambda: _stable_diffusion("StableDiffusionImg2ImgPipeline"),
    "StableDiffusionInpaintPipeline": lambda: _stable_diffusion("StableDiffusionInpaintPipeline"),
    "StableDiffusion3InpaintPipeline": _sd3_inpaint,
    "ChromaImg2ImgPipeline": _chroma,
    "FluxFillPipeline": _fill,
    "StableDiffusionXLControlNetImg2ImgPipeline": _controlled,
    "KolorsImg2ImgPipeline": _kolors,
}


def right_half(size: tuple[int, int]) -> Any:
    """A mask of (height, width) pixels: the right half may change."""
    from PIL import Image

    values = np.zeros(size, np.uint8)
    values[:, size[1] // 2 :] = 255
    return Image.fromarray(values)


def as_tensor(picture: Any) -> Tensor:
    """A PIL picture as `[1, 3, height, width]` in [-1, 1]."""
    return torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
