"""An attention backend of diffusers with the name "scalediff", for software that selects backends by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.patching.target import any_active

NAME = "scalediff"


def register_backend() -> None:
    """Register the diffusers attention backend "scalediff", for `set_attention_backend` and `attention_backend`.

    A backend receives queries, keys and values but not the token grid, so the model must also be patched by `patch_model`. In a
    patched model, image self-attention above the native area is neighborhood patch attention with any backend; this backend
    computes all other attention calls by `torch.nn.functional.scaled_dot_product_attention`. It raises a RuntimeError when no
    model is patched. Registering twice has no effect.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if NAME in AttentionBackendName._value2member_map_:
        return
    # Enum has no public way to add a member, so this repeats what its constructor does.
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    AttentionBackendName._member_names_.append(NAME.upper())
    AttentionBackendName._member_map_[NAME.upper()] = member
    AttentionBackendName._value2member_map_[NAME] = member
    _AttentionBackendRegistry.register(member)(_attention)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention from and to `[B, S, H, D]`, the signature of a diffusers backend."""
    if _parallel_config is not None:
        raise NotImplementedError('the attention backend "scalediff" does not support context parallelism: choose "native"')
    if not torch.compiler.is_compiling() and not any_active():
        raise RuntimeError(
            'the attention backend "scalediff" needs a patched model, which provides the token grid: '
            "call scalediff.patch_model(model) first"
        )
    if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)
