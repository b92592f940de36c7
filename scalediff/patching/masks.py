"""Attention masks that windows can keep: masks without effect, and masks of keys, which become a score bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_MASK_ELEMENTS = 1 << 20  # a mask with more distinct elements is not read, because reading happens at every call
_MASKED = -1e4  # score bias of a masked key: its softmax weight underflows to zero, and fp16 can represent it
_EXTRA_CHANNELS = 8  # the kernel needs head dims that are multiples of 8


def is_constant(mask: Tensor) -> bool:
    """Whether a mask has no effect: all True, or one number for every score. False inside a compiled graph, where values are unknown."""
    if torch.compiler.is_compiling():
        return False
    distinct = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]  # one element of each expanded axis
    if distinct.numel() > _MAX_MASK_ELEMENTS:
        return False
    return bool(distinct.all()) if mask.dtype == torch.bool else bool((distinct == distinct.flatten()[0]).all())


def key_mask_bias(mask: Tensor, k: Tensor) -> Tensor | None:
    """Convert a boolean mask `[B or 1, 1, 1, S]` of the keys to a score bias `[B or 1, S]`; None for any other mask."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, k.shape[1]):
        return None
    return torch.where(mask[:, 0, 0], 0.0, _MASKED)


def with_score_bias(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Extend q, k and v to `[B, S, H, D + 8]` so that attention adds a_i b_j to the score of query i and key j; a and b are `[B, S]`.

    The product is one more channel: a / scale in the queries, b in the keys, zero in the values.
    """

    def longer(x: Tensor, channel: Tensor | None) -> Tensor:
        x = F.pad(x, (0, _EXTRA_CHANNELS))
        if channel is not None:
            x[..., -_EXTRA_CHANNELS] = channel[:, :, None].to(x.device, x.dtype)
        return x

    return longer(q, of_queries / scale), longer(k, of_keys), longer(v, None)
