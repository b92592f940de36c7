"""Transformers that take latents `[B, C, H, W]` and cut them into patches themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scalediff.families.base import Arguments, Family, Reader
from scalediff.grid import Grid, Layout, Sequence, Side, Unreadable
from scalediff.rotation import TextRotation

_SHAPE = "hidden_states.shape[-2:] // patch_size"


def _grid(denoiser: Any, arguments: Arguments) -> Grid:
    y, x = arguments["hidden_states"].shape[-2:]
    return y // denoiser.config.patch_size, x // denoiser.config.patch_size


def _native(denoiser: Any) -> Grid:
    size = denoiser.config.sample_size // denoiser.config.patch_size
    return size, size


def _native_64(denoiser: nn.Module) -> Grid:
    return 64, 64  # 1024 pixels; the config names another size


def _text(arguments: Arguments) -> int:
    return int(arguments["encoder_hidden_states"].shape[1])


def _cross(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid = _grid(denoiser, arguments)
    return Layout(grid, (Sequence(grid),), (_text(arguments),))


def _hunyuan(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid = _grid(denoiser, arguments)
    return Layout(grid, (Sequence(grid),), (_text(arguments) + int(arguments["encoder_hidden_states_t5"].shape[1]),))


def _lumina_next(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """Every call carries a mask over the image, which is all True."""
    layout = _cross(denoiser, arguments, read)
    return Layout(layout.grid, layout.sequences, layout.others, masked=True)


def _joint(side: Side, *, registers: Callable[[Any], int] = lambda denoiser: 0) -> Callable[[nn.Module, Arguments, Reader], Layout]:
    def layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
        grid, text = _grid(denoiser, arguments), _text(arguments) + registers(denoiser)
        return Layout(grid, (Sequence(grid, side=side, text=text), Sequence(grid)))

    return layout


def _cogview4(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """A mask over the text is squared and added to the scores: all ones add one number to all."""
    mask = arguments.get("attention_mask")
    if mask is not None and not read(mask, _all_ones):
        raise Unreadable("the prompt is padded, and the model adds its mask to the scores as numbers")
    layout = _joint("prefix")(denoiser, arguments, read)
    return Layout(layout.grid, layout.sequences, masked=True)


def _all_ones(mask: Tensor) -> bool:
    return bool((mask > 0).all())


def lengths(mask: Tensor) -> tuple[int, ...]:
    """Real tokens of each sample of a `[B, T]` mask; empty where a sample's real tokens are not its first ones."""
    real = mask.bool()
    counts = real.sum(dim=1)
    first = real.long().cummin(dim=1).values.sum(dim=1)
    return tuple(counts.tolist()) if bool((first == counts).all()) else ()


def _lumina2(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    grid, mask = _grid(denoiser, arguments), arguments["encoder_attention_mask"]
    real = read(mask, lengths)
    if not real:
        raise Unreadable("the real tokens of a prompt must come first in encoder_attention_mask")
    joint = Sequence(grid, text=max(real), real=real, ragged=True)
    return Layout(grid, (joint, Sequence(grid)), (int(mask.shape[1]),), masked=True)


def _lumina2_rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dim_rope), 10000.0)


LATENTS = (
    Family("SD3Transformer2DModel", _SHAPE, "joint, after the image; image alone in dual layers", _native, _joint("suffix"), role="joint",
           roles=((r"\.attn2$", "self"),)),
    Family("SD3ControlNetModel", _SHAPE, "joint, after the image; image alone in dual layers", _native, _joint("suffix"), role="joint",
           roles=((r"\.attn2$", "self"),)),
    Family("AuraFlowTransformer2DModel", _SHAPE, "joint, registers and text before the image", _native_64,
           _joint("prefix", registers=lambda denoiser: int(denoiser.register_tokens.shape[1])), role="joint"),
    Family("CogView3PlusTransformer2DModel", _SHAPE, "joint, before the image", _native, _joint("prefix"), role="joint"),
    Family("CogView4Transformer2DModel", _SHAPE, "joint, before the image", _native, _cogview4, role="joint"),
    Family("Lumina2Transformer2DModel", _SHAPE, "joint, before the image, each prompt as long as it is", _native, _lumina2, role="joint",
           roles=((r"^noise_refiner\.", "self"), (r"^context_refiner\.", "text")), rotation=_lumina2_rotation),
    Family("LuminaNextDiT2DModel", _SHAPE, "cross-attention", _native, _lumina_next, roles=((r"\.attn2$", "cross"),)),
    Family("PixArtTransformer2DModel", _SHAPE, "cross-attention", _native, _cross, roles=((r"\.attn2$", "cross"),)),
    Family("HunyuanDiT2DModel", _SHAPE, "cross-attention", _native, _hunyuan, roles=((r"\.attn2$", "cross"),)),
    Family("HunyuanDiT2DControlNetModel", _SHAPE, "cross-attention", _native, _hunyuan, roles=((r"\.attn2$", "cross"),)),
)  # fmt: skip
