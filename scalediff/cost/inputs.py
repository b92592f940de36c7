"""Arguments of one forward pass of a denoiser of published size, for one picture.

Every function takes a grid of latents `(Y, X)`. Texts are as long as the pipeline pads them, or as a long prompt. Masks, lengths and
position ids are on the CPU, because their values are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[int, int], dict[str, Any]]


def _empty(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def _mask(tokens: int) -> Tensor:
    """A mask of text without padding."""
    return torch.ones(1, tokens, dtype=torch.int64, device="cpu")


def _ids(y: int, x: int, axes: int) -> Tensor:
    """Position ids of a token grid; the values are read, so not on the meta device."""
    ids = torch.zeros(y, x, axes, device="cpu")
    ids[..., 1] += torch.arange(y, device="cpu")[:, None]
    ids[..., 2] += torch.arange(x, device="cpu")[None, :]
    return ids.flatten(0, 1)


def sdxl_inputs(y: int, x: int) -> dict[str, Any]:
    added = _empty(text_embeds=(1, 1280), time_ids=(1, 6))
    text = torch.empty(1, 77, 2048)
    return {"sample": torch.empty(1, 4, y, x), "timestep": torch.tensor(1.0), "encoder_hidden_states": text, "added_cond_kwargs": added}


def packed(*, text: int, width: int, channels: int = 64, axes: int = 3, patch: int = 2, **more: tuple[int, ...]) -> Inputs:
    """Arguments of FLUX-like transformers, with `text` tokens of this width and `patch` latents per token along an axis."""

    def inputs(y: int, x: int) -> dict[str, Any]:
        tensors = _empty(hidden_states=(1, y * x // patch**2, channels), encoder_hidden_states=(1, text, width), timestep=(1,), **more)
        return {**tensors, "img_ids": _ids(y // patch, x // patch, axes), "txt_ids": torch.zeros(text, axes, device="cpu")}

    return inputs


def latents(*, text: int, width: int, channels: int, **more: tuple[int, ...]) -> Inputs:
    """Arguments of transformers that take latents, with `text` tokens of this width."""

    def inputs(y: int, x: int) -> dict[str, Any]:
        tensors = _empty(hidden_states=(1, channels, y, x), encoder_hidden_states=(1, text, width), timestep=(1,))
        return {**tensors, **_empty(**more)}

    return inputs


def chroma_inputs(y: int, x: int) -> dict[str, Any]:
    """All text tokens are real, as for a long prompt."""
    mask = torch.ones(1, 512 + y * x // 4, dtype=torch.bool, device="cpu")
    return {**packed(text=512, width=4096)(y, x), "attention_mask": mask}


def qwen_inputs(y: int, x: int) -> dict[str, Any]:
    tensors = _empty(hidden_states=(1, y * x // 4, 64), encoder_hidden_states=(1, 512, 3584), timestep=(1,))
    return {**tensors, "img_shapes": [[(1, y // 2, x // 2)]], "encoder_hidden_states_mask": None}


def z_image_inputs(y: int, x: int) -> dict[str, Any]:
    return {"x": [torch.empty(16, 1, y, x)], "t": torch.empty(1), "cap_feats": [torch.empty(512, 2560)]}


def lumina2_inputs(y: int, x: int) -> dict[str, Any]:
    return {**latents(text=256, width=2304, channels=16)(y, x), "encoder_attention_mask": _mask(256)}


def lumina_next_inputs(y: int, x: int) -> dict[str, Any]:
    """256 tokens of Gemma, padding included, and the table of 384 positions along an axis that the pipeline has."""
    rotary = torch.empty(384, 384, 36, dtype=torch.complex64)
    inputs = {**latents(text=256, width=2048, channels=4)(y, x), "encoder_mask": torch.empty(1, 256)}
    return {**inputs, "image_rotary_emb": rotary, "cross_attention_kwargs": {}}


def pixart_inputs(y: int, x: int) -> dict[str, Any]:
    inputs = latents(text=300, width=4096, channels=4)(y, x)
    return {**inputs, "encoder_attention_mask": torch.empty(1, 300), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def fibo_inputs(y: int, x: int) -> dict[str, Any]:
    """2048 tokens of a structured prompt, with the hidden states of the text encoder for each of the 46 blocks."""
    tokens = packed(text=2048, width=4096, channels=48, patch=1)(y, x)
    return {**tokens, "text_encoder_layers": [torch.empty(1, 2048, 2048) for _ in range(46)]}


def ernie_inputs(y: int, x: int) -> dict[str, Any]:
    """2 x 2 latents of FLUX.2's autoencoder in a token."""
    tensors = _empty(hidden_states=(1, 128, y // 2, x // 2), timestep=(1,), text_bth=(1, 512, 3072))
    return {**tensors, "text_lens": torch.tensor([512], device="cpu")}


def hidream_inputs(y: int, x: int) -> dict[str, Any]:
    """128 tokens of T5, and of each of the 32 layers of Llama."""
    texts = {"encoder_hidden_states_t5": (1, 128, 4096), "encoder_hidden_states_llama3": (32, 1, 128, 4096), "pooled_embeds": (1, 2048)}
    return _empty(hidden_states=(1, 16, y, x), timesteps=(1,), **texts)


def hunyuan_dit_inputs(y: int, x: int) -> dict[str, Any]:
    """77 tokens of BERT and 256 of mT5."""
    texts = {"encoder_hidden_states": (1, 77, 1024), "encoder_hidden_states_t5": (1, 256, 2048)}
    tensors = _empty(hidden_states=(1, 4, y, x), timestep=(1,), image_meta_size=(1, 6), **texts)
    masks = {"text_embedding_mask": _mask(77), "text_embedding_mask_t5": _mask(256)}
    rotary = torch.empty(y * x // 4, 88), torch.empty(y * x // 4, 88)
    return {**tensors, **masks, "style": torch.zeros(1, dtype=torch.int64), "image_rotary_emb": rotary}


def hunyuan_image_inputs(y: int, x: int) -> dict[str, Any]:
    """1000 tokens of Qwen2.5-VL and 128 of ByT5, padding included."""
    inputs = latents(text=1000, width=3584, channels=64, encoder_hidden_states_2=(1, 128, 1472))(y, x)
    return {**inputs, "encoder_attention_mask": _mask(1000), "encoder_attention_mask_2": _mask(128)}


def krea2_inputs(y: int, x: int) -> dict[str, Any]:
    """512 tokens of each of 12 layers of Qwen3-VL."""
    tensors = _empty(hidden_states=(1, y * x // 4, 64), encoder_hidden_states=(1, 512, 12, 2560), timestep=(1,))
    return {**tensors, "position_ids": torch.cat([torch.zeros(512, 3, device="cpu"), _ids(y // 2, x // 2, 3)])}


def nucleus_inputs(y: int, x: int) -> dict[str, Any]:
    tensors = _empty(hidden_states=(1, y * x // 4, 64), encoder_hidden_states=(1, 512, 4096), timestep=(1,))
    return {**tensors, "img_shapes": [(1, y // 2, x // 2)], "encoder_hidden_states_mask": None}


def prx_inputs(y: int, x: int) -> dict[str, Any]:
    return {**latents(text=256, width=2304, channels=16)(y, x), "attention_mask": _mask(256)}
