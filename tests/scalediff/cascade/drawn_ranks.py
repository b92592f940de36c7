"""Pictures that several processes draw and change together, each with a band of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import scalediff
from tests.conftest import seeded
from tests.scalediff.cascade.changing_pipelines import changing, conditioned_on_the_picture, right_half
from tests.scalediff.cascade.prompted_pipelines import picture_of
from tests.scalediff.cascade.test_pipelines import built


def draw_demo(pipe: Any, **options: Any) -> Any:
    how: dict[str, Any] = {"height": 128, "width": 64, "steps": 2, "restart": 0.5, "generator": seeded()}
    return scalediff.generate(pipe, "a full moon", **how | options)


def arrays(result: Any) -> list[tuple[Any, Tensor]]:
    """Pictures and latents of every stage."""
    return [(stage.images[0], stage.latents) for stage in result.stages]


def drawn() -> dict[str, Any]:
    """Whole cascades: of the embedded model, with previews on one rank alone, and of a U-Net whose autoencoder attends."""
    everyone = distributed.group.WORLD
    demo, previews = scalediff.load_demo().to(torch.float64), list[Any]()
    shown = (lambda step: previews.append(step.preview()[0].size)) if distributed.get_rank() == 0 else None
    stages = arrays(draw_demo(demo, mesh=everyone, on_step=shown))
    with scalediff.patch_model(demo, mesh=everyone):
        own = call_demo(demo)
    return {"demo": stages, "previews": previews, "SDXL": arrays(draw_sdxl(mesh=everyone)), "own call": [own]}


def call_demo(pipe: Any) -> tuple[Any, Tensor]:
    """A picture of a patched pipeline's own call, and no latents, since the pipeline decodes them."""
    image = pipe("a full moon", height=128, width=64, num_inference_steps=2, generator=seeded()).images[0]
    return image, torch.zeros(1)


def drawn_in_halves() -> list[tuple[Any, Tensor]]:
    """A cascade whose guidance is split: alone over two ranks, over more together with the rows."""
    world = distributed.get_world_size()
    shape, names = ((2,), ("guidance",)) if world == 2 else ((2, world // 2), ("guidance", "rows"))
    return arrays(draw_sdxl(mesh=init_device_mesh("cpu", shape, mesh_dim_names=names)))


def draw_sdxl(**options: Any) -> Any:
    pipe, prompt = built("SDXL")
    for part in (pipe.unet, pipe.vae):
        part.double()
    call = {name: x.double() for name, x in prompt.items()}
    return scalediff.generate(pipe, None, height=32, width=24, steps=2, restart=0.5, generator=seeded(), call=call, **options)


# Pictures to change: the class of the pipeline, and the arguments of `upscale`.
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "upscale": ("StableDiffusionImg2ImgPipeline", {}),
    "image-to-image": ("StableDiffusionXLImg2ImgPipeline", {"strength": 0.8}),
    "inpainting": ("StableDiffusionInpaintPipeline", {"strength": 0.8, "mask_image": right_half((32, 32))}),
    "mask among the channels": ("", {"strength": 0.8, "mask_image": right_half((32, 32))}),
    "a larger picture": ("StableDiffusionXLInpaintPipeline", {"strength": 0.3, "mask_image": right_half((32, 32))}),
    "ControlNet": ("StableDiffusionXLControlNetImg2ImgPipeline", {"strength": 0.8}),
}


def change(name: str, **options: Any) -> Any:
    """A picture of 32 x 32 pixels, twice the native side, or of the native size, that is changed."""
    kind, how = CHANGED[name]
    pipe, call = changing(kind) if kind else conditioned_on_the_picture()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.double()
    call = {key: x.double() if isinstance(x, Tensor) else x for key, x in call.items()}
    side = 16 if name == "upscale" else 32
    sizes = {"height": 32, "width": 32, "steps": 3, "restart": 0.5}
    return scalediff.upscale(
        pipe, picture_of((side, side)), call.pop("prompt", None), **sizes, generator=seeded(), call=call, **how, **options
    )


def changed() -> dict[str, Any]:
    """Pictures that all ranks change together."""
    return {name: arrays(change(name, mesh=distributed.group.WORLD)) for name in CHANGED}


def with_workdir() -> dict[str, str]:
    """A pipeline that `patch_model` has split, in a run with a workdir, and in one without a generator."""
    pipe, said = scalediff.load_demo(), dict[str, str]()
    with scalediff.patch_model(pipe, mesh=distributed.group.WORLD):
        for name, how in (("workdir", {"workdir": "here"}), ("generator", {"generator": None})):
            try:
                draw_demo(pipe, **how)
            except ValueError as error:
                said[name] = str(error)
        try:
            scalediff.upscale(pipe, picture_of((64, 64)), "a moon", height=128, width=128, generator=seeded(), workdir="here")
        except ValueError as error:
            said["upscale"] = str(error)
    return said
