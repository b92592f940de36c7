"""The name "scalediff" among diffusers' attention backends, for stacks that choose a backend by its name and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.patching.target import any_active

NAME = "scalediff"


def register_backend() -> None:
    """Let `set_attention_backend("scalediff")` and `attention_backend("scalediff")` be called; a second call does nothing.

    A backend is told queries, keys and values, and not how they lie on the picture: that comes from `patch_model`. In a patched
    model calls of image self-attention are those of `patch_model`, whatever the backend; under this one all others, and all
    up to the native size, are torch's own. With no model patched, a call raises RuntimeError: the name alone does nothing.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if NAME in AttentionBackendName._value2member_map_:
        return
    # The enumeration is closed; a member is added as its own constructor would.
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
) -> Tensor:
    """`[B, S, H, D]` in and out, as diffusers' backends."""
    if not torch.compiler.is_compiling() and not any_active():
        raise RuntimeError(
            'the attention backend "scalediff" needs to know how tokens lie on the picture, and no model is patched: '
            "call scalediff.patch_model(model) first"
        )
    if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)
