"""Pictures to change: where the cascade enters with a given picture, a mask and a strength.

    a picture up to the native size, or a strength above `restart`:
        a base stage redraws the picture at the native size with this strength, and the other stages restart as always
    a larger picture and a strength up to `restart`:
        the picture stands in place of the stages up to its size, and the others run the share `strength` of the schedule

A base stage sees nothing of a picture's detail above the native size, so it redraws a larger picture only where the strength asks for more
noise than the stages after it leave detail in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalediff.arguments import check_number, shown, wrong_type
from scalediff.cascade.keeping import Given, strength_steps
from scalediff.cascade.memory import images_per_call
from scalediff.cascade.pictures import BEHIND_MASK, rgb
from scalediff.cascade.pipeline import (
    Sizes,
    cascade_of,
    default_size,
    native_size,
    pixels_per_latent,
    size_multiple,
    stage_sizes,
    takes,
    wrap_of,
)  # fmt: skip
from scalediff.cascade.placement import is_offloaded
from scalediff.patching.networks import changes_picture, original_call
from scalediff.settings import Settings

_MAX_DISTORTION = 0.02  # change of the log aspect ratio that is allowed, because sizes are rounded to multiples of the model's
# Arguments of calls that hold for one picture size, or that start a schedule elsewhere.
_ONE_SIZE = ("latents", "masked_image_latents", "padding_mask_crop", "denoising_start")
CHANGE_ARGUMENTS = {"image", "mask_image", "strength", *_ONE_SIZE}  # what `upscale` has itself, or sets


def check_strength(name: str, value: Any) -> None:
    """Check for a share of the schedule."""
    check_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {shown(name, value)}")


def changing_pipeline(pipe: Any, *, with_mask: bool) -> Any:
    """The image-to-image or inpainting pipeline with the components of a pipeline, or the pipeline itself where it is one already.

    Args:
        pipe: The pipeline.
        with_mask: Whether it must take a mask.

    Raises:
        ValueError: diffusers has none for this model.
    """
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    if takes(pipe, "strength", *(("mask_image",) if with_mask else ())):
        return pipe
    offloaded_to = pipe._execution_device if is_offloaded(pipe) else None
    maker = AutoPipelineForInpainting if with_mask else AutoPipelineForImage2Image
    try:
        made = maker.from_pipe(pipe)
    except ValueError as error:
        kind = "inpainting" if with_mask else "image-to-image"
        raise ValueError(f"strength needs a model for which diffusers has an {kind} pipeline, got {type(pipe).__name__}") from error
    if offloaded_to is not None:
        made.enable_model_cpu_offload(device=offloaded_to)
    return made


def has_aspect_ratio(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (height, width) have about the same aspect ratio."""
    return abs(math.log(size[0] * other[1] / (size[1] * other[0]))) <= _MAX_DISTORTION


def called_size(pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The (height, width) in pixels that a call of the pipeline draws: those of its arguments, or else the picture's or the model's.

    diffusers' image-to-image pipelines of SD and SDXL have no size argument, and Z-Image's and those with a ControlNet for a U-Net take
    the picture's size when they are given none.
    """
    height, width = (arguments.get(side) if takes(pipe, side) else None for side in ("height", "width"))
    default = default_size(pipe)
    if changes_picture(type(pipe)) and _draws_size_of_picture(pipe) and not (height and width):
        multiple = size_multiple(pipe)
        default = tuple(max(side // multiple, 1) * multiple for side in _size_of(pipe, arguments.get("image")))  # type: ignore[assignment]
    return height or default[0], width or default[1]


def _size_of(pipe: Any, image: Any) -> tuple[int, int]:
    """(height, width) in pixels of the pictures among a call's arguments, as they are given."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, Tensor):
        pixels = 1 if first.shape[-3] == 3 else pixels_per_latent(pipe)  # others are latents
        return first.shape[-2] * pixels, first.shape[-1] * pixels
    if hasattr(first, "convert"):
        return first.height, first.width
    height, width = _pictures(pipe, image).shape[-2:] if not hasattr(first, "ndim") else first.shape[-3:-1]
    return height, width


def _draws_size_of_picture(pipe: Any) -> bool:
    with_control = getattr(pipe, "controlnet", None) is not None and getattr(pipe, "unet", None) is not None
    return not takes(pipe, "height", "width") or with_control or type(pipe).__name__.startswith("ZImage")


def _pictures(pipe: Any, image: Any) -> Tensor:
    """The pictures among the arguments of a call, `[B, 3, height, width]` in [-1, 1].

    Raises:
        ValueError: They are latents, or no pictures.
    """
    given = image if isinstance(image, list | tuple) else [image]
    if all(hasattr(one, "convert") for one in given):
        image = [rgb(one) for one in given]
    pictures: Tensor = pipe.image_processor.preprocess(image)
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"image must be pictures with three channels above the native size, got {tuple(pictures.shape)=}")
    return pictures


def _masks(mask_image: Any) -> Tensor:
    """Masks of zeros and ones `[B, 1, height, width]`, from anything that diffusers takes as a mask.

    Raises:
        TypeError: It is no mask, or an empty list.
        ValueError: A mask has several channels, or levels of more than 16 bits.
    """
    from diffusers.image_processor import VaeImageProcessor

    how = {"do_resize": False, "do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    masks = mask_image if isinstance(mask_image, list) else [mask_image]
    if not masks or not all(hasattr(one, "convert") or isinstance(one, np.ndarray | Tensor) for one in masks):
        raise wrong_type("mask_image", "a PIL picture, an array or a tensor, or a list of at least one", mask_image)
    masks = [rgb(one, behind=BEHIND_MASK) if hasattr(one, "convert") else one for one in masks]
    found: Tensor = VaeImageProcessor(**how).preprocess(masks if isinstance(mask_image, list) else masks[0])
    if found.ndim != 4 or found.shape[1] != 1:
        raise ValueError(f"mask_image must have one channel, got {tuple(found.shape)=}")
    return found.float()


def redraws_picture(pipe: Any, settings: Settings, picture: tuple[int, int], strength: float) -> bool:
    """Whether a base stage redraws a picture of (height, width) pixels at the native size.

    Raises:
        ValueError: It does, and the strength is less than one step, or fewer steps than structure guidance needs of the base stage.
    """
    restarts = settings.restart if isinstance(settings.restart, tuple) else (settings.restart,)
    if math.prod(picture) > math.prod(native_size(pipe)) and strength <= restarts[0]:
        return False
    steps = strength_steps(pipe, settings.steps, strength)
    if steps < 1:
        raise ValueError(f"strength must be at least one of the steps={settings.steps}, got {strength=}")
    most = max(replace(settings, restart=restart).stage_steps for restart in restarts)
    if settings.anchor == "trajectory" and settings.sg and steps < most:
        raise ValueError(f"anchor='trajectory' needs a base stage of at least {most} steps, as many as a stage above it, got {strength=}")
    return True


def _sizes_above(sizes: Sizes, picture: tuple[int, int]) -> list[tuple[int, int]]:
    """The stages that are larger than a picture; the last one in any case."""
    return [size for size in sizes if math.prod(size) > math.prod(picture)] or [sizes[-1]]


def given_picture(
    pipe: Any,
    arguments: Mapping[str, Any],
    picture: Tensor,
    mask_image: Any,
    size: tuple[int, int],
    *,
    base: tuple[int, int],
    strength: float | None,
) -> tuple[Given, dict[str, Any]]:
    """The picture and mask of a run, and the arguments of the pipeline's call with which it changes them.

    Args:
        pipe: The pipeline.
        arguments: Arguments of the pipeline's call.
        picture: `[B, 3, height, width]` in [-1, 1].
        mask_image: A mask or several, as in diffusers: white where the picture may change. None changes all of it.
        size: (height, width) of the picture as it was given, before it was resized to what the model can have.
        base: (height, width) of the base stage in pixels.
        strength: Share of the schedule that the base stage runs; None if the picture replaces the base stage.

    Raises:
        ValueError: The numbers of pictures, masks and prompts do not agree, the mask has another aspect ratio than the picture, or the
            pipeline has no mask for the base stage.
    """
    count = images_per_call(arguments)
    picture = _repeated("image", picture, count)
    own_mask = takes(pipe, "mask_image")
    if mask_image is not None and strength is not None and not own_mask:
        raise ValueError(
            f"mask_image needs an inpainting pipeline where a base stage redraws the picture, got {type(pipe).__name__}; "
            "AutoPipelineForInpainting.from_pipe makes one"
        )
    mask = None if mask_image is None else _repeated("mask_image", _masks(mask_image), count)
    if mask is not None and not has_aspect_ratio((mask.shape[-2], mask.shape[-1]), size):
        shapes = f"{size[0]} x {size[1]}, got {mask.shape[-2]} x {mask.shape[-1]}"
        raise ValueError(f"mask_image must have the aspect ratio of the picture, {shapes}")
    changes: dict[str, Any] = {}
    if changes_picture(type(pipe)):
        changes = {"image": picture, "strength": 1.0}
        if own_mask:
            changes["mask_image"] = torch.ones(count, 1, *picture.shape[-2:]) if mask is None else mask
    return Given(picture, base, mask, strength), changes


def blank_arguments(pipe: Any) -> dict[str, Any]:
    """Arguments with an empty picture for a call of which only the memory matters; none for a text-to-image pipeline."""
    if not changes_picture(type(pipe)):
        return {}
    return {
        "image": torch.zeros(1, 3, 1, 1),
        "strength": 1.0,
        **({"mask_image": torch.ones(1, 1, 1, 1)} if takes(pipe, "mask_image") else {}),
    }


def _repeated(name: str, pictures: Tensor, count: int) -> Tensor:
    """One picture for each of `count`, in the order of the prompts."""
    if count % len(pictures):
        raise ValueError(f"{name} must hold one picture, or one for each prompt, for {count} pictures, got {len(pictures)}")
    return pictures.repeat_interleave(count // len(pictures), dim=0) if len(pictures) != count else pictures


def change_in_call(
    pipe: Any, arguments: Mapping[str, Any], sizes: Sizes, settings: Settings
) -> tuple[dict[str, Any], list[tuple[int, int]], Settings, Given]:
    """A patched pipeline's own call with a picture to change: its arguments, the sizes of its stages, its settings, and the picture.

    Raises:
        ValueError: The strength is out of range, or an argument holds for one picture size; as `redraws_picture` and `given_picture`.
        TypeError: The strength is not a number.
    """
    named = [name for name in _ONE_SIZE if arguments.get(name) is not None]
    if named:
        raise ValueError(f"above the native size the call is several stages, each of its own size: it cannot have {named[0]}")
    strength = arguments.get("strength")
    if strength is None:
        strength = inspect.signature(original_call(pipe)).parameters["strength"].default
    check_strength("strength", strength)
    picture = _pictures(pipe, arguments.get("image"))
    size = (picture.shape[-2], picture.shape[-1])
    redraws = redraws_picture(pipe, settings, size, strength)
    settings = settings if redraws else replace(settings, restart=strength)
    of_base, own = strength if redraws else None, _size_of(pipe, arguments["image"])
    given, changes = given_picture(pipe, arguments, picture, arguments.get("mask_image"), own, base=sizes[0], strength=of_base)
    return {**arguments, **changes}, list(sizes) if redraws else _sizes_above(sizes[1:], size), settings, given


def change_to_upscale(
    pipe: Any,
    arguments: Mapping[str, Any],
    image: Any,
    target: tuple[int, int],
    settings: Settings,
    *,
    sizes: Sizes | None,
    mask_image: Any,
    strength: float | None,
) -> tuple[dict[str, Any], list[tuple[int, int]], Settings, Given]:
    """A picture to upscale: the arguments of the pipeline's call, the sizes of the stages, the settings, and the picture.

    Raises:
        ValueError, TypeError: As `scalediff.upscale`.
    """
    images = _checked_images(image, images_per_call(arguments))
    width, height = images[0].size
    wrap = wrap_of(pipe, settings)
    own, planned = (height, width), stage_sizes(pipe, *target, wrap=wrap)
    described = f"{height} x {width}, got height={target[0]}, width={target[1]}"
    if not has_aspect_ratio(target, own):
        raise ValueError(f"the target must have the aspect ratio of the picture, {described}")
    if math.prod(target) <= math.prod(own) and mask_image is None and strength is None:
        raise ValueError(f"the target must be larger than the picture, {described}")
    if math.prod(target) < math.prod(own):
        raise ValueError(f"the target must not be smaller than the picture, {described}")
    if strength is not None and not changes_picture(type(pipe)):
        makes = "AutoPipelineForImage2Image.from_pipe makes one"
        raise ValueError(f"strength needs an image-to-image or inpainting pipeline, got {type(pipe).__name__}; {makes}")
    redraws = strength is not None and redraws_picture(pipe, settings, own, strength)
    multiple = pixels_per_latent(pipe) * cascade_of(pipe).patch
    near = {"height": max(height // multiple, 1) * multiple, "width": max(width // multiple, 1) * multiple}
    if any(on and side != fitting for on, side, fitting in zip(wrap, own, near.values(), strict=True)):
        raise ValueError(f"a side that wraps must be a multiple of {multiple} pixels, got a picture of {height} x {width}")
    if sizes is not None:
        stages = stage_sizes(pipe, *target, sizes, picture=None if redraws else (near["height"], near["width"]), wrap=wrap)
    else:
        stages = planned if redraws else _sizes_above(planned, own)
    if strength is not None and not redraws:
        settings = replace(settings, restart=strength)
    picture = pipe.image_processor.preprocess([rgb(picture) for picture in images], **near)
    base, of_base = (stages[0], strength) if redraws else (planned[0], None)
    given, changes = given_picture(pipe, arguments, picture, mask_image, own, base=base, strength=of_base)
    return {**arguments, **changes}, stages, settings, given


def _checked_images(image: Any, count: int) -> list[Any]:
    """The pictures to upscale, one for each of `count`."""
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("image must be a PIL picture or a list of at least one, got image=[]")
    if not all(hasattr(picture, "convert") for picture in images):
        raise TypeError(f"image must be a PIL picture or a list of them, got {', '.join(type(picture).__name__ for picture in images)}")
    if len({picture.size for picture in images}) != 1:
        raise ValueError(f"all pictures must have the same size, got {[picture.size for picture in images]}")
    if len(images) != count:
        raise ValueError(f"image must hold one picture per prompt, {count} in all, got {len(images)}")
    return images
