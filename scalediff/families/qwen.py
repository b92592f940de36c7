"""Qwen-Image and NucleusMoE-Image: packed latents, the token grid in `img_shapes`, positions relative to the picture's centre."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.families.base import BESIDE, Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, UnknownLayout
from scalediff.families.rotation import TextRotation
from scalediff.families.transformers import lengths
from scalediff.settings import derived_presets


def _layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    shapes = {shape if isinstance(shape[0], int) else tuple(shape) for shape in map(_hashable, arguments["img_shapes"])}
    pictures = [p for shape in shapes for p in ([shape] if isinstance(shape[0], int) else shape)]
    if len(shapes) != 1 or len(pictures) != 1 or pictures[0][0] != 1:
        raise UnknownLayout(f"img_shapes must hold one picture per sample, all of one size, got {arguments['img_shapes']}")
    grid, text = (int(pictures[0][1]), int(pictures[0][2])), int(arguments["encoder_hidden_states"].shape[1])
    mask = arguments.get("encoder_hidden_states_mask")
    if mask is None:
        return Layout(grid, (Sequence(grid, text=text),))
    real = read(mask, lengths)
    if not real:  # padding does not come last: the mask itself is applied
        return Layout(grid, (Sequence(grid, text=text),))
    return Layout(grid, (Sequence(grid, text=text, real=real),), masked=True)


def _nucleus_layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    layout = _layout(denoiser, arguments, read)
    sequences = tuple(replace(sequence, side="suffix", queries="image") for sequence in layout.sequences)
    return replace(layout, sequences=sequences)


def _hashable(shape: Any) -> Any:
    return tuple(map(_hashable, shape)) if isinstance(shape, list | tuple) else int(shape)


def _native(denoiser: nn.Module) -> Grid:
    return 64, 64  # 1024 pixels; not in the config


def _shift(grid: Grid, native: Grid) -> tuple[int, int]:
    """Text starts where the longer half of the picture ends, on both axes; rows and columns start at minus half their number."""

    def of(axis: int) -> int:
        text, start = max(n // 2 for n in grid), -(grid[axis] - grid[axis] // 2)
        native_text, native_start = max(n // 2 for n in native), -(native[axis] - native[axis] // 2)
        return (native_text - native_start) - (text - start)

    return of(0), of(1)


def _rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dims_rope), 10000.0, shift=_shift)


# Not in the paper: restart and cutoffs of FLUX, steps and guidance of the model card.
_PRESETS = derived_presets(steps=50, guidance_scale=4.0)
_CASCADE = Cascade(lambda denoiser: _PRESETS, form="tokens", guidance="true_cfg_scale", negative=" ")

_QWEN = Family(
    denoiser="QwenImageTransformer2DModel",
    grid_source="img_shapes",
    text="joint, before the image",
    native_grid=_native,
    layout=_layout,
    role="joint",
    rotation=_rotation,
    cascade=_CASCADE,
)
QWEN = (
    replace(_QWEN, context_parallel=True),
    replace(_QWEN, denoiser="QwenImageControlNetModel", cascade=None, no_cascade=BESIDE),
    replace(
        _QWEN,
        denoiser="NucleusMoEImageTransformer2DModel",
        text="joint, after the image, keys only",
        layout=_nucleus_layout,
        cascade=Cascade(lambda denoiser: _PRESETS, form="tokens"),
    ),
)
