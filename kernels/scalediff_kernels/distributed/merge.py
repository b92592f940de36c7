"""The output of text queries from the parts of all ranks, summed in the order of the ranks: the same bits on every rank and in every run.

Each rank merges its share of the text tokens from the parts of all, and then all gather the results. Sums over the ranks would be fewer
calls, but their order is the backend's.

Legend: B batch, H heads, T text tokens, D head dim, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from scalediff_kernels.distributed.groups import all_gather
from scalediff_kernels.distributed.losses import naming_losses


def merge_sums(total: Tensor, count: int, dtype: torch.dtype, group: Any) -> Tensor:
    """The mean over the windows of all ranks, `[B, T, H, D]`, from this rank's sum in at least fp32 and the number of all windows."""
    parts = _share(total, group)
    return _gather(sum(parts[1:], parts[0]) / count, total.shape[1], dtype, group)


def merge_softmax(out: Tensor, lse: Tensor, group: Any) -> Tensor:
    """Attention to the keys of all ranks, `[B, T, H, D]`, from that to this rank's keys and its log-sum-exp `[B, T, H]`."""
    parts = _share(torch.cat([out.to(lse.dtype), lse[..., None]], dim=-1), group)
    weights = (parts[..., -1:] - parts[..., -1:].logsumexp(0)).exp()
    weighted = weights * parts[..., :-1]
    return _gather(sum(weighted[1:], weighted[0]), out.shape[1], out.dtype, group)


def _share(x: Tensor, group: Any) -> Tensor:
    """`[R, T / R, B, H, D]`: from every rank, its `[B, T, H, D]` at this rank's share of the tokens. T is padded with zeros."""
    ranks = distributed.get_world_size(group)
    x = F.pad(x.movedim(1, 0), (0, 0, 0, 0, 0, 0, 0, -x.shape[1] % ranks)).contiguous()
    parts = torch.empty_like(x)
    with naming_losses(group, "exchanging the parts of the text"):
        distributed.all_to_all_single(parts, x, group=group)
    return parts.view(ranks, -1, *x.shape[1:])


def _gather(share: Tensor, tokens: int, dtype: torch.dtype, group: Any) -> Tensor:
    """`[B, T, H, D]` in one piece, from every rank's share of the tokens."""
    share = share.to(dtype).contiguous()
    whole = share.new_empty(distributed.get_world_size(group) * share.shape[0], *share.shape[1:])
    all_gather(whole, share, group)
    return whole[:tokens].movedim(0, 1)
