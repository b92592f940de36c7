"""What the cascade reads from a pipeline: family, presets, sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from operator import attrgetter
from typing import Any

from torch import nn

from scalediff.cascade.pictures import pictures_at
from scalediff.families import FAMILIES
from scalediff.families.base import Cascade, Family
from scalediff.families.grid import Grid
from scalediff.patching.networks import (
    changes_picture,
    denoiser_of,
    family_in_use,
    handle_of,
    is_text_to_image,
    may_edit_picture,
    obstacle_to_changes,
    original_call,
)  # fmt: skip
from scalediff.settings import Preset, Settings, check_sizes, plan_sizes

Sizes = Sequence[tuple[int, int]]


def family_with_cascade(denoiser: nn.Module) -> tuple[Family, Cascade]:
    """The family of a denoiser and its `Cascade`.

    Raises:
        ValueError: The family is not known, or the cascade does not support it.
    """
    family = family_in_use(denoiser)
    if family is None or family.cascade is None:
        known = ", ".join(sorted(name for name, one in FAMILIES.items() if one.cascade is not None))
        why = f": {family.no_cascade}" if family is not None and family.no_cascade else ""
        raise ValueError(f"the cascade supports pipelines with one of {known}, got {type(denoiser).__name__}{why}")
    return family, family.cascade


def cascade_of(pipe: Any) -> Cascade:
    """What the cascade needs to know about the pipeline's family; raises as `family_with_cascade`."""
    return family_with_cascade(denoiser_of(pipe))[1]


def named_preset(pipe: Any, name: str) -> Preset:
    """A preset of the pipeline's family, by name.

    Raises:
        ValueError: The family has no such preset, or the preset needs another scheduler.
    """
    presets = cascade_of(pipe).presets(denoiser_of(pipe))
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)} for this {type(denoiser_of(pipe)).__name__}, got {name!r}")
    wanted, spacing = presets[name].spacing, pipe.scheduler.config.get("timestep_spacing")
    if wanted and spacing != wanted:
        raise ValueError(
            f"preset {name!r} needs a scheduler with timestep_spacing={wanted!r}, got {type(pipe.scheduler).__name__} with {spacing=}"
        )
    return presets[name]


def preset(pipe: Any, name: str = "default") -> Settings:
    """The settings of a preset of the pipeline's family, by name; raises as `named_preset`."""
    return named_preset(pipe, name).settings


def native_size(pipe: Any) -> tuple[int, int]:
    """The model's native (height, width) in pixels; for a patched pipeline, the size of its window.

    Raises:
        ValueError: As `family_with_cascade`, or the pipeline is not patched and its denoiser does not tell its native size.
    """
    denoiser, handle = denoiser_of(pipe), handle_of(pipe)
    family, _ = family_with_cascade(denoiser)
    window = handle.window if handle is not None else family.native_grid(denoiser)
    if window is None:
        raise ValueError(f"{type(denoiser).__name__} does not tell its native size: patch_model(pipe, window=(Y, X)) first, in tokens")
    return _size_of_tokens(pipe, window)


def default_size(pipe: Any) -> tuple[int, int]:
    """(height, width) in pixels that a call without a size draws: the trained size, or `native_size` if the denoiser does not tell."""
    trained = family_with_cascade(denoiser_of(pipe))[0].native_grid(denoiser_of(pipe))
    return native_size(pipe) if trained is None else _size_of_tokens(pipe, trained)


def _size_of_tokens(pipe: Any, grid: Grid) -> tuple[int, int]:
    """(height, width) in pixels of a token grid `(Y, X)`."""
    pixels = cascade_of(pipe).patch * pixels_per_latent(pipe)
    return grid[0] * pixels, grid[1] * pixels


def pixels_per_latent(pipe: Any) -> int:
    """Pixels per latent along an axis."""
    cascade = cascade_of(pipe)
    return int(pipe.vae_scale_factor) // (cascade.patch if cascade.factor_of_token else 1)


def latent_size(pipe: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The latent grid `(Y, X)` of a picture of (height, width) pixels."""
    pixels = pixels_per_latent(pipe)
    return size[0] // pixels, size[1] // pixels


def size_multiple(pipe: Any) -> int:
    """Number of pixels that picture sides must be multiples of."""
    cascade = cascade_of(pipe)
    return max(cascade.size_multiple, cascade.patch * pixels_per_latent(pipe))


def side_multiples(pipe: Any, wrap: tuple[bool, bool]) -> tuple[int, int]:
    """Numbers of pixels that height and width must be multiples of.

    Along an axis that wraps, a side has whole tokens at every level of a U-Net. Otherwise its two ends would not meet.
    """
    multiple = size_multiple(pipe)
    if not any(wrap):
        return multiple, multiple
    levels = len(getattr(denoiser_of(pipe).config, "block_out_channels", ())) or 1
    whole = math.lcm(multiple, pixels_per_latent(pipe) << (levels - 1))
    return (whole if wrap[0] else multiple), (whole if wrap[1] else multiple)


def wrap_of(pipe: Any, settings: Settings) -> tuple[bool, bool]:
    """The axes along which a run's picture continues on the other side: of the settings, or else of the patched pipeline."""
    handle = handle_of(pipe)
    if settings.wrap is not None:
        return settings.wrap
    return handle.wrap if handle is not None else (False, False)


def stage_sizes(
    pipe: Any,
    height: int,
    width: int,
    given: Sizes | None = None,
    *,
    picture: tuple[int, int] | None = None,
    wrap: tuple[bool, bool] = (False, False),
) -> list[tuple[int, int]]:
    """The size of every stage up to a target: planned, or the caller's list after a check.

    Args:
        pipe: The pipeline.
        height, width: Target in pixels.
        given: The caller's (height, width) of every stage, or None.
        picture: (height, width) of the picture that replaces the base stage, for the check of `given`.
        wrap: The axes along which the picture continues on the other side.

    Raises:
        ValueError: As `plan_sizes` and `check_sizes`.
    """
    rules: dict[str, Any] = {"native": native_size(pipe), "multiple": side_multiples(pipe, wrap)}
    if given is None:
        return plan_sizes((height, width), **rules)
    check_sizes(given, (height, width), picture=picture, **rules)
    return [(int(y), int(x)) for y, x in given]


def enlarged_size(pipe: Any, picture: Any, wrap: tuple[bool, bool] = (False, False)) -> tuple[int, int]:
    """About twice the (height, width) of a PIL picture, or the model's native area if that is more; in multiples of `side_multiples`.

    Near that size it is the one whose aspect ratio is nearest to the picture's.
    """
    (rows, columns), native = side_multiples(pipe, wrap), math.prod(native_size(pipe))
    factor = max(2.0, math.sqrt(native / (picture.height * picture.width)))
    sizes = []
    for y in range(1, math.ceil(1.25 * factor * picture.height / rows) + 1):
        height = y * rows
        width = max(1, round(height * picture.width / picture.height / columns)) * columns
        distortion = abs(math.log(height * picture.width / (width * picture.height)))
        if height * width >= 0.8 * factor**2 * picture.height * picture.width and height * width >= native:
            sizes.append((round(distortion, 2), abs(height - factor * picture.height), height, width))
    return min(sizes)[2:]


def call_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """Run the unpatched call of a pipeline on copies of lists, because Z-Image's pipeline modifies a list of prompts.

    Raises:
        ValueError: The pipeline pads prompts to the length of its tokenizer, which has none.
    """
    copied = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return original_call(pipe)(pipe, **copied)
    except OverflowError as error:  # transformers has 10^30 in place of a length that a tokenizer's files do not give
        endless = [name for name, part in pipe.components.items() if getattr(part, "model_max_length", 0) > sys.maxsize]
        if not endless:
            raise
        raise ValueError(
            f"{type(pipe).__name__} pads prompts to the length of its tokenizer, got {endless[0]}.model_max_length="
            f"{getattr(pipe, endless[0]).model_max_length:.0e}: set it to the number of text tokens that the model was trained with"
        ) from error


def call_stage(pipe: Any, size: tuple[int, int], arguments: Mapping[str, Any], *, wrap: tuple[bool, bool] = (False, False)) -> Any:
    """Run the unpatched call of a pipeline for a stage of (height, width) pixels, with the picture that it changes at this size."""
    pictures = pictures_at(arguments, size, wrap=wrap) if changes_picture(type(pipe)) else {}
    with _attributes_set(pipe, cascade_of(pipe).attributes(pipe, *size)):
        return call_pipeline(pipe, {**arguments, **stage_arguments(pipe, size), **pictures})


@contextmanager
def _attributes_set(pipe: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of a pipeline, or of its parts by a dotted name, and restore them on exit."""
    parts = {name: attrgetter(owner)(pipe) if (owner := name.rpartition(".")[0]) else pipe for name in attributes}
    before = {name: getattr(part, name.rpartition(".")[2]) for name, part in parts.items()}
    try:
        for name, value in attributes.items():
            setattr(parts[name], name.rpartition(".")[2], value)
        yield
    finally:
        for name, value in before.items():
            setattr(parts[name], name.rpartition(".")[2], value)


def check_call(pipe: Any, *, has_picture: bool = False) -> None:
    """Check that a pipeline can run the cascade.

    Args:
        pipe: The pipeline.
        has_picture: Whether the run starts from a picture, so that pipelines that change one can run it too.

    Raises:
        TypeError: It is not a text-to-image pipeline, nor one that changes a picture where there is one.
        NotImplementedError: It changes a picture in a way that the cascade does not support.
        ValueError: As `family_with_cascade`.
    """
    cls = type(pipe)
    changes = has_picture and changes_picture(cls)
    if not hasattr(pipe, "vae_scale_factor") or not (changes or is_text_to_image(cls)):
        kinds = "a text-to-image, image-to-image or inpainting pipeline" if has_picture else "a text-to-image pipeline"
        raise TypeError(f"the cascade needs {kinds}, got {cls.__name__}")
    if changes and (obstacle := obstacle_to_changes(cls)):
        raise NotImplementedError(f"the cascade does not support {cls.__name__}: {obstacle}")
    family_with_cascade(denoiser_of(pipe))


def edits_picture(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether these arguments of the pipeline's call hold a picture to edit or to refer to, which the cascade does not support."""
    return may_edit_picture(type(pipe)) and not changes_picture(type(pipe)) and arguments.get("image") is not None


def takes(pipe: Any, *names: str) -> bool:
    """Whether the pipeline's call has arguments of all these names."""
    return set(names) <= set(signature(original_call(pipe)).parameters)


def takes_size_conditioning(pipe: Any) -> bool:
    """Whether the pipeline conditions the model on a picture size, as SDXL's does."""
    return takes(pipe, "original_size", "target_size")


def guidance_argument(pipe: Any, scale: float) -> dict[str, float]:
    """The guidance scale as an argument of the pipeline's call; empty if the call has none, as of distilled models."""
    name = cascade_of(pipe).guidance
    return {name: scale} if takes(pipe, name) else {}


def stage_arguments(pipe: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments of the pipeline's call for a stage of (height, width) pixels, by which it draws this size and no other."""
    wanted = {"height": size[0], "width": size[1], **cascade_of(pipe).call(*size)}
    return {name: value for name, value in wanted.items() if takes(pipe, name)}
