"""Transformers that take latents `[B, C, H, W]` and cut them into patches themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.families.base import Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, Side, Unreadable
from scalediff.families.rotation import TextRotation
from scalediff.settings import derived_presets

_SHAPE = "hidden_states.shape[-2:] // patch_size"


def _grid(denoiser: Any, arguments: Arguments) -> Grid:
    hidden, size = arguments["hidden_states"], denoiser.config.patch_size
    if hidden.ndim == 3 and isinstance(arguments.get("controlnet_cond"), Tensor):  # tokens of the transformer, beside latents
        hidden = arguments["controlnet_cond"]
    if hidden.ndim != 4:
        raise Unreadable(f"hidden_states must be latents [B, C, H, W], got {tuple(hidden.shape)}")
    y, x = size if isinstance(size, list | tuple) else (size, size)
    return hidden.shape[-2] // y, hidden.shape[-1] // x


def _native(denoiser: Any) -> Grid:
    size = denoiser.config.sample_size // denoiser.config.patch_size
    return size, size


def _native_64(denoiser: nn.Module) -> Grid:
    return 64, 64  # what it was trained at; the config names another size, or none


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
    """Every call carries a mask over the image, which is all True."""
    return replace(_cross(denoiser, arguments, read), masked=True)


def _joint(side: Side, *, registers: Callable[[Any], int] = lambda denoiser: 0) -> Callable[[nn.Module, Arguments, Reader], Layout]:
    def layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
        grid, text = _grid(denoiser, arguments), _text(arguments) + registers(denoiser)
        return Layout(grid, (Sequence(grid, side=side, text=text), Sequence(grid)))

    return layout


def _cogview4(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """A mask over the text is squared and added to the scores as 0 and 1: without padding that is one number for all."""
    layout, mask = _joint("prefix")(denoiser, arguments, read), arguments.get("attention_mask")
    if mask is None or read(mask, all_ones):
        return replace(layout, masked=True)
    real = (mask > 0).float()
    weights = torch.cat([real, real.new_ones(len(real), layout.grid[0] * layout.grid[1])], dim=1)
    return replace(layout, masked=True, weights=weights)


def all_ones(mask: Tensor) -> bool:
    """Whether a mask of 0 and 1 has no 0."""
    return bool((mask > 0).all())


def lengths(mask: Tensor) -> tuple[int, ...]:
    """Real tokens of each sample of a `[B, T]` mask; empty where a sample's real tokens are not its first ones."""
    real = mask.bool()
    counts = real.sum(dim=1)
    first = real.long().cummin(dim=1).values.sum(dim=1)
    return tuple(counts.tolist()) if bool((first == counts).all()) else ()


def _lumina2(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid, mask = _grid(denoiser, arguments), arguments["encoder_attention_mask"]
    real = _first(read(mask, lengths), "encoder_attention_mask")
    joint = Sequence(grid, text=max(real), real=real, ragged=True)
    return Layout(grid, (joint, Sequence(grid)), (int(mask.shape[1]),), masked=True)


def _lumina2_rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dim_rope), 10000.0)


def _class_labels(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid = _grid(denoiser, arguments)
    return Layout(grid, (Sequence(grid),))


def _glm(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    if any(cache.mode in ("read", "write") for cache in getattr(arguments.get("kv_caches"), "caches", ())):
        raise Unreadable("reference tokens in a key/value cache have no place on the grid")
    return _cogview4(denoiser, arguments, read)


def _prx(denoiser: Any, arguments: Arguments, read: Reader) -> Layout:
    """Text is among the keys alone."""
    grid, text, mask = _grid(denoiser, arguments), _text(arguments), arguments.get("attention_mask")
    real = () if mask is None else _first(read(mask, lengths), "attention_mask")
    return Layout(grid, (Sequence(grid, text=text, real=real, queries="image"),), masked=True)


def _first(real: tuple[int, ...], name: str) -> tuple[int, ...]:
    if not real:
        raise Unreadable(f"the real tokens of a prompt must come first in {name}")
    return real


def _counts(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.bool().sum(dim=1).tolist())


def _hunyuan_image(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """A second text is merged with the first, real tokens of both before the padding; each is refined alone before."""
    grid, mask, second = _grid(denoiser, arguments), arguments["encoder_attention_mask"], arguments.get("encoder_attention_mask_2")
    if second is None or arguments.get("encoder_hidden_states_2") is None:
        real, text = _first(read(mask, lengths), "encoder_attention_mask"), int(mask.shape[1])
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


def _unsaid(denoiser: nn.Module) -> None:
    return None


def _prx_rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.pe_embedder.axes_dim), float(denoiser.pe_embedder.theta), y=0, x=1)


_SD3 = derived_presets(steps=28, guidance_scale=7.0)
_LUMINA = derived_presets(steps=30, guidance_scale=4.0)

LATENTS = (
    Family("DiTTransformer2DModel", _SHAPE, "none: classes", _native, _class_labels),
    Family("GlmImageTransformer2DModel", _SHAPE, "joint, before the image", _unsaid, _glm, role="joint"),
    Family("PRXTransformer2DModel", _SHAPE, "joint, before the image, keys alone", _unsaid, _prx, role="joint", rotation=_prx_rotation),
    Family("ErnieImageTransformer2DModel", _SHAPE, "joint, after the image", _unsaid, _ernie, role="joint"),
    Family("HunyuanImageTransformer2DModel", _SHAPE, "joint, after the image", _native_64, _hunyuan_image, role="joint",
           roles=((r"^context_embedder", "text"),), rotation=_hunyuan_image_rotation),
    Family("SD3Transformer2DModel", _SHAPE, "joint, after the image; image alone in dual layers", _native, _joint("suffix"), role="joint",
           roles=((r"\.attn2$", "self"),), cascade=Cascade(lambda denoiser: _SD3, conditional="last")),
    Family("SD3ControlNetModel", _SHAPE, "joint, after the image; image alone in dual layers", _native, _joint("suffix"), role="joint",
           roles=((r"\.attn2$", "self"),)),
    Family("AuraFlowTransformer2DModel", _SHAPE, "joint, registers and text before the image", _native_64,
           _joint("prefix", registers=lambda denoiser: int(denoiser.register_tokens.shape[1])), role="joint"),
    Family("CogView3PlusTransformer2DModel", _SHAPE, "joint, before the image", _native, _joint("prefix"), role="joint"),
    Family("CogView4Transformer2DModel", _SHAPE, "joint, before the image", _native, _cogview4, role="joint"),
    Family("Lumina2Transformer2DModel", _SHAPE, "joint, before the image, each prompt as long as it is", _native, _lumina2, role="joint",
           roles=((r"^noise_refiner\.", "self"), (r"^context_refiner\.", "text")), rotation=_lumina2_rotation,
           cascade=Cascade(lambda denoiser: _LUMINA)),
    Family("LuminaNextDiT2DModel", _SHAPE, "cross-attention", _native, _lumina_next, roles=((r"\.attn2$", "cross"),),
           cascade=Cascade(lambda denoiser: _LUMINA, conditional="first", trained_size="default_image_size")),
    Family("PixArtTransformer2DModel", _SHAPE, "cross-attention", _native, _cross, roles=((r"\.attn2$", "cross"),)),
    Family("HunyuanDiT2DModel", _SHAPE, "cross-attention", _native, _hunyuan, roles=((r"\.attn2$", "cross"),)),
    Family("HunyuanDiT2DControlNetModel", _SHAPE, "cross-attention", _native, _hunyuan, roles=((r"\.attn2$", "cross"),)),
)  # fmt: skip
