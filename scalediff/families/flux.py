"""FLUX.1, FLUX.2 and models with the same layout: packed latents, the token grid in `img_ids`, text before the image.

Both double and single blocks attend to `[text, image]` in one softmax, with rotary positions on all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.families.base import BESIDE, Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, UnknownLayout
from scalediff.families.rotation import TextRotation
from scalediff.families.transformers import all_ones, lengths
from scalediff.settings import Preset, Settings, derived_presets


def _extent(ids: Tensor, text: int = 0) -> Grid:
    """The token grid `(Y, X)` of position ids `[S, axes]` or `[1, S, axes]`, of which the first `text` belong to text.

    (0, 0) if the ids are not those of one picture, row by row.
    """
    rows, columns = (ids[0] if ids.ndim == 3 else ids)[text:, 1:3].long().unbind(-1)
    y, x = rows - rows.min(), columns - columns.min()
    grid = int(y.max()) + 1, int(x.max()) + 1
    in_order = bool((y * grid[1] + x == torch.arange(y.numel(), device=y.device)).all())
    return grid if in_order and y.numel() == grid[0] * grid[1] else (0, 0)


def _layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    tokens, text = arguments["hidden_states"].shape[1], arguments["encoder_hidden_states"].shape[1]
    text += int(getattr(denoiser, "union", False))  # a union ControlNet puts a token for the chosen condition first
    if arguments.get("kv_cache_mode") is not None:
        raise UnknownLayout("reference tokens in a key/value cache are not supported")
    grid = read(arguments["img_ids"], _extent)
    if grid[0] * grid[1] != tokens:
        shape = tuple(arguments["img_ids"].shape)
        raise UnknownLayout(f"img_ids must be the ids of one picture, row by row, for {tokens} tokens, got {shape}", tokens)
    return Layout(grid, (Sequence(grid, side="prefix", text=text),))


def _chroma_layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """Chroma adds the outer product of its 0/1 mask to the scores. Without padding this adds the same number to all of them."""
    layout, mask = _layout(denoiser, arguments, read), arguments.get("attention_mask")
    if mask is None or read(mask, all_ones):
        return replace(layout, masked=True)
    if mask.dtype == torch.bool:  # then the outer product is a true mask, and padding is never attended to
        real = read(mask, _text_lengths, layout.sequences[0].text)
        if not real:
            raise UnknownLayout("padding must follow the text tokens in attention_mask")
        return replace(layout, sequences=(replace(layout.sequences[0], real=real),), masked=True)
    return replace(layout, masked=True, weights=mask)


def _flux3_layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """FLUX.3: the first blocks attend to image and text separately."""
    if arguments.get("image_cond_hidden_states") is not None:
        raise UnknownLayout("reference tokens are not supported")
    layout = _layout(denoiser, arguments, read)
    return replace(layout, sequences=(*layout.sequences, Sequence(layout.grid)), others=(layout.sequences[0].text,))


def _text_lengths(mask: Tensor, text: int) -> tuple[int, ...]:
    return lengths(mask[:, :text])


def _krea_layout(denoiser: Any, arguments: Arguments, read: Reader) -> Layout:
    """Krea 2: one table of position ids for text and image, and a mask for padded text."""
    stack = arguments["encoder_hidden_states"]
    text, mask = int(stack.shape[1]), arguments.get("encoder_attention_mask")
    grid = read(arguments["position_ids"], _extent, text)
    tokens = arguments["hidden_states"].shape[1]
    if grid[0] * grid[1] != tokens:
        raise UnknownLayout(f"position_ids must end with the ids of one picture, row by row, for {tokens} tokens")
    real = () if mask is None else read(mask, lengths)
    others = text, int(stack.shape[2])
    if mask is not None and not real:  # the pipeline puts the end of its template after the padding: the mask itself is applied
        return Layout(grid, (Sequence(grid, side="prefix", text=text),), others)
    return Layout(grid, (Sequence(grid, side="prefix", text=text, real=real),), others, masked=True)


def _rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dims_rope), float(getattr(denoiser.config, "rope_theta", 10000)))


def _native(denoiser: nn.Module) -> Grid:
    return 64, 64  # 1024 pixels; not in the config


_FLUX = Family(
    denoiser="FluxTransformer2DModel",
    grid_source="img_ids",
    text="joint, before the image",
    native_grid=_native,
    layout=_layout,
    role="joint",
    rotation=_rotation,
)
_PAPER = Settings(steps=30, restart=0.6, guidance_scale=3.5, lfm_cutoff=0.25, sg_cutoff=0.25)
_PUBLISHED = (
    "arXiv:2510.25818 and its authors' scripts, for FLUX.1-dev; without the jitter that the scripts have on, with an offset for every "
    "layer's call, and that the paper's evaluation had off"
)
_SUFFIX = ", highly detailed, 4k resolution, best quality"
_DEV = {
    "default": Preset(_PAPER, _PUBLISHED),
    "paper": Preset(_PAPER, _PUBLISHED, suffix=_SUFFIX, call={"max_sequence_length": 256}),
}
_SCHNELL = {"default": Preset(replace(_PAPER, steps=4, restart=0.5, guidance_scale=0.0), "the authors' example: 4 steps, then 2 and 2")}


def _presets(denoiser: Any) -> Mapping[str, Preset]:
    return _DEV if denoiser.config.guidance_embeds else _SCHNELL


# Models that the paper does not cover: the pipeline's default steps and guidance.
_FLUX2_DEV = derived_presets(steps=50, guidance_scale=4.0)
_DISTILLED = replace(_FLUX2_DEV["default"].settings, steps=4, restart=0.5, guidance_scale=1.0)
_KLEIN = {**_FLUX2_DEV, "distilled": Preset(_DISTILLED, "4 steps, then 2 and 2, for distilled checkpoints; not measured yet")}


def _flux2_presets(denoiser: Any) -> Mapping[str, Preset]:
    return _FLUX2_DEV if denoiser.config.guidance_embeds else _KLEIN


def _packed(*, steps: int, guidance_scale: float, **more: Any) -> Cascade:
    """A cascade of a model with FLUX.1's packed latents, and the presets derived from the pipeline's defaults."""
    presets = derived_presets(steps=steps, guidance_scale=guidance_scale)
    return Cascade(lambda denoiser: presets, form="tokens", **more)


def _with_area(height: int, width: int) -> Mapping[str, Any]:
    return {"max_area": height * width}  # FLUX.1 Kontext scales every size to this area, which is the native one by default


def _unpatched(height: int, width: int) -> Mapping[str, Any]:
    return {"do_patching": False}  # one latent in a token, as the model was trained


def _written_prompt(height: int, width: int) -> Mapping[str, Any]:
    return {"enable_prompt_rewrite": False}  # a language model would write another prompt for every stage


def _own_prompt(height: int, width: int) -> Mapping[str, Any]:
    return {"caption_upsample_temperature": None}  # likewise, with numbers from the global generator


_CASCADES = {
    "Flux2Transformer2DModel": Cascade(_flux2_presets, form="tokens", input_form="patches", call=_own_prompt),
    "BriaTransformer2DModel": _packed(steps=30, guidance_scale=5.0, factor_of_token=True, conditional="last"),
    "BriaFiboTransformer2DModel": _packed(steps=30, guidance_scale=5.0, patch=1, conditional="last", call=_unpatched),
    "LongCatImageTransformer2DModel": _packed(steps=50, guidance_scale=4.5, call=_written_prompt),
    "OvisImageTransformer2DModel": _packed(steps=50, guidance_scale=5.0),
}
FLUX = (
    replace(_FLUX, cascade=Cascade(_presets, form="tokens", call=_with_area), context_parallel=True),
    replace(_FLUX, denoiser="FluxControlNetModel", no_cascade=BESIDE),
    *(
        replace(_FLUX, denoiser=name, cascade=cascade, context_parallel=name == "Flux2Transformer2DModel")
        for name, cascade in _CASCADES.items()
    ),
    replace(_FLUX, denoiser="ChromaTransformer2DModel", layout=_chroma_layout, cascade=_packed(steps=35, guidance_scale=5.0)),
    replace(
        _FLUX,
        denoiser="Flux3Transformer2DModel",
        native_grid=lambda denoiser: None,
        layout=_flux3_layout,
        roles=((r"^txt_mode_blocks\.", "text"), (r"^mode_blocks\.image_cond\.", "text"), (r"^mode_blocks\.", "self")),
        no_cascade="diffusers has modular blocks for it and no pipeline to call",
    ),
    replace(
        _FLUX,
        denoiser="Krea2Transformer2DModel",
        grid_source="position_ids",
        layout=_krea_layout,
        roles=((r"^text_fusion\.", "text"),),
        cascade=_packed(steps=28, guidance_scale=4.5),
    ),
)
