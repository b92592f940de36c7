"""Transformers that take latents `[B, C, H, W]` and split them into tokens themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.families.base import BESIDE, Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, Side, UnknownLayout
from scalediff.families.rotation import TextRotation
from scalediff.settings import derived_presets

_SHAPE = "hidden_states.shape[-2:] // patch_size"


def _grid(denoiser: Any, arguments: Arguments) -> Grid:
    hidden, size = arguments["hidden_states"], denoiser.config.patch_size
    if hidden.ndim == 3 and isinstance(arguments.get("controlnet_cond"), Tensor):  # hidden_states are tokens; latents are here
        hidden = arguments["controlnet_cond"]
    if hidden.ndim != 4:
        raise UnknownLayout(f"hidden_states must be latents [B, C, H, W], got {tuple(hidden.shape)}")
    y, x = size if isinstance(size, list | tuple) else (size, size)
    return hidden.shape[-2] // y, hidden.shape[-1] // x


def _native(denoiser: Any) -> Grid:
    size = denoiser.config.sample_size // denoiser.config.patch_size
    return size, size


def _native_64(denoiser: nn.Module) -> Grid:
    return 64, 64  # the trained size; the config has another one, or none


def _text(arguments: Arguments) -> int:
    text = arguments.get("encoder_hidden_states")
    return 0 if text is None else int(text.shape[1])


def _cross(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid = _grid(denoiser, arguments)
    return Layout(grid, (Sequence(grid),), (_text(arguments),))


def _hunyuan(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid = _grid(denoiser, arguments)
    return Layout(grid, (Sequence(grid),), (_text(arguments) + int(arguments["encoder_hidden_states_t5"].shape[1]),))


def _lumina_next(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """Every call has a mask of the image tokens, which is all True."""
    return replace(_cross(denoiser, arguments, read), masked=True)


def _joint(side: Side, *, registers: Callable[[Any], int] = lambda denoiser: 0) -> Callable[[nn.Module, Arguments, Reader], Layout]:
    def layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
        grid, text = _grid(denoiser, arguments), _text(arguments) + registers(denoiser)
        return Layout(grid, (Sequence(grid, side=side, text=text), Sequence(grid)))

    return layout


def _cogview4(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """The outer product of the 0/1 mask is added to the scores. Without padding this adds the same number to all of them."""
    layout, mask = _joint("prefix")(denoiser, arguments, read), arguments.get("attention_mask")
    if mask is None or read(mask, all_ones):
        return replace(layout, masked=True)
    real = (mask > 0).float()
    weights = torch.cat([real, real.new_ones(len(real), layout.grid[0] * layout.grid[1])], dim=1)
    return replace(layout, masked=True, weights=weights)


def all_ones(mask: Tensor) -> bool:
    """Whether a 0/1 mask is all ones."""
    return bool((mask > 0).all())


def lengths(mask: Tensor) -> tuple[int, ...]:
    """Number of unmasked tokens of each sample of a `[B, T]` mask; empty if in some sample they do not come first."""
    real = mask.bool()
    counts = real.sum(dim=1)
    first = real.long().cummin(dim=1).values.sum(dim=1)
    return tuple(counts.tolist()) if bool((first == counts).all()) else ()


def _lumina2(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid, mask = _grid(denoiser, arguments), arguments["encoder_attention_mask"]
    real = _require_padding_last(read(mask, lengths), "encoder_attention_mask")
    joint = Sequence(grid, text=max(real), real=real, ragged=True)
    return Layout(grid, (joint, Sequence(grid)), (int(mask.shape[1]),), masked=True)


def _lumina2_rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dim_rope), 10000.0)


def _class_labels(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid = _grid(denoiser, arguments)
    return Layout(grid, (Sequence(grid),))


def _glm(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    if any(cache.mode in ("read", "write") for cache in getattr(arguments.get("kv_caches"), "caches", ())):
        raise UnknownLayout("reference tokens in a key/value cache are not supported")
    return _cogview4(denoiser, arguments, read)


def _prx(denoiser: Any, arguments: Arguments, read: Reader) -> Layout:
    """Text is only among the keys."""
    grid, text, mask = _grid(denoiser, arguments), _text(arguments), arguments.get("attention_mask")
    real = () if mask is None else _require_padding_last(read(mask, lengths), "attention_mask")
    return Layout(grid, (Sequence(grid, text=text, real=real, queries="image"),), masked=True)


def _require_padding_last(real: tuple[int, ...], name: str) -> tuple[int, ...]:
    if not real:
        raise UnknownLayout(f"padding must follow the text tokens in {name}")
    return real


def _counts(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.bool().sum(dim=1).tolist())


def _hunyuan_image(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """Two texts are concatenated, with the padding of both at the end. Before that, each passes through its own refiner."""
    grid, mask, second = _grid(denoiser, arguments), arguments["encoder_attention_mask"], arguments.get("encoder_attention_mask_2")
    if second is None or arguments.get("encoder_hidden_states_2") is None:
        real, text = _require_padding_last(read(mask, lengths), "encoder_attention_mask"), int(mask.shape[1])
    else:
        real = tuple(a + b for a, b in zip(read(mask, _counts), read(second, _counts), strict=True))
        text = int(mask.shape[1] + second.shape[1])
    return Layout(grid, (Sequence(grid, side="suffix", text=text, real=real),), (int(mask.shape[1]),), masked=True)


def _hunyuan_image_rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.rope_axes_dim), float(denoiser.config.rope_theta), y=0, x=1)


def _ernie(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid, text = _grid(denoiser, arguments), int(arguments["text_bth"].shape[1])
    return Layout(grid, (Sequence(grid, side="suffix", text=text, real=read(arguments["text_lens"], _numbers)),), masked=True)


def _numbers(x: Tensor) -> tuple[int, ...]:
    return tuple(int(n) for n in x.tolist())


def _no_grid(denoiser: nn.Module) -> None:
    return None


def _prx_rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.pe_embedder.axes_dim), float(denoiser.pe_embedder.theta), y=0, x=1)


def _without_bins(height: int, width: int) -> Mapping[str, Any]:
    return {"use_resolution_binning": False}  # the pipeline would draw the nearest of a list of sizes


def _without_enhancer(height: int, width: int) -> Mapping[str, Any]:
    return {"use_pe": False}  # a language model would write another prompt for every stage


def _square_table(denoiser: Any) -> Grid:
    side = math.isqrt(denoiser.config.pos_embed_max_size)
    return side, side


def _table(denoiser: Any) -> Grid | None:
    side = denoiser.config.pos_embed_max_size
    return None if side is None else (side, side)


def _cascade(*, steps: int, guidance_scale: float, **more: Any) -> Cascade:
    """A cascade with the presets derived from the pipeline's default steps and guidance."""
    presets = derived_presets(steps=steps, guidance_scale=guidance_scale)
    return Cascade(lambda denoiser: presets, **more)


_PRIOR = "an autoregressive model draws its tokens for one picture size: a larger stage would be of another picture"
_VIDEO_SCHEDULER = "its pipeline takes only CogVideoX's schedulers, which are not supported"

TRANSFORMERS = (
    Family("DiTTransformer2DModel", _SHAPE, "none: classes", _native, _class_labels, no_cascade="it draws classes, not prompts"),
    Family("GlmImageTransformer2DModel", _SHAPE, "joint, before the image", _no_grid, _glm, role="joint", no_cascade=_PRIOR),
    Family("PRXTransformer2DModel", _SHAPE, "joint, before the image, keys only", _no_grid, _prx, role="joint", rotation=_prx_rotation,
           cascade=_cascade(steps=28, guidance_scale=4.0, conditional="last", call=_without_bins)),
    Family("ErnieImageTransformer2DModel", _SHAPE, "joint, after the image", _native_64, _ernie, role="joint",
           cascade=_cascade(steps=50, guidance_scale=4.0, form="patches", factor_of_token=True, batch_norm_eps=1e-5, conditional="last",
                            call=_without_enhancer)),
    Family("HunyuanImageTransformer2DModel", _SHAPE, "joint, after the image", _native_64, _hunyuan_image, role="joint",
           roles=((r"^context_embedder", "text"),), rotation=_hunyuan_image_rotation,
           cascade=_cascade(steps=50, guidance_scale=3.25, patch=1, guidance="distilled_guidance_scale")),
    Family("SD3Transformer2DModel", _SHAPE, "joint, after the image; image only in dual layers", _native, _joint("suffix"), role="joint",
           roles=((r"\.attn2$", "self"),),
           cascade=_cascade(steps=28, guidance_scale=7.0, conditional="last", largest_grid=_table)),
    Family("SD3ControlNetModel", _SHAPE, "joint, after the image; image only in dual layers", _native, _joint("suffix"), role="joint",
           roles=((r"\.attn2$", "self"),), no_cascade=BESIDE),
    Family("AuraFlowTransformer2DModel", _SHAPE, "joint, registers and text before the image", _native_64,
           _joint("prefix", registers=lambda denoiser: int(denoiser.register_tokens.shape[1])), role="joint",
           cascade=_cascade(steps=50, guidance_scale=3.5, size_multiple=8, conditional="last", largest_grid=_square_table)),
    Family("CogView3PlusTransformer2DModel", _SHAPE, "joint, before the image", _native, _joint("prefix"), role="joint",
           no_cascade=_VIDEO_SCHEDULER),
    Family("CogView4Transformer2DModel", _SHAPE, "joint, before the image", _native, _cogview4, role="joint",
           cascade=_cascade(steps=50, guidance_scale=5.0, size_multiple=16)),
    Family("Lumina2Transformer2DModel", _SHAPE, "joint, before the image, each prompt at its own length", _native, _lumina2, role="joint",
           roles=((r"^noise_refiner\.", "self"), (r"^context_refiner\.", "text")), rotation=_lumina2_rotation,
           cascade=_cascade(steps=30, guidance_scale=4.0)),
    Family("LuminaNextDiT2DModel", _SHAPE, "cross-attention", _native, _lumina_next, roles=((r"\.attn2$", "cross"),),
           cascade=_cascade(steps=30, guidance_scale=4.0, conditional="first", trained_size="default_image_size")),
    Family("PixArtTransformer2DModel", _SHAPE, "cross-attention", _native, _cross, roles=((r"\.attn2$", "cross"),),
           cascade=_cascade(steps=20, guidance_scale=4.5, size_multiple=8, conditional="last", call=_without_bins)),
    Family("HunyuanDiT2DModel", _SHAPE, "cross-attention", _native, _hunyuan, roles=((r"\.attn2$", "cross"),),
           cascade=_cascade(steps=50, guidance_scale=5.0, size_multiple=16, conditional="last", call=_without_bins)),
    Family("HunyuanDiT2DControlNetModel", _SHAPE, "cross-attention", _native, _hunyuan, roles=((r"\.attn2$", "cross"),),
           no_cascade=BESIDE),
)  # fmt: skip
