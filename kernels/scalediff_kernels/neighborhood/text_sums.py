"""The fp32 sums of text queries: every part of the windows, or of the keys, has its own, and a small kernel reduces them.

Legend: B batch, H heads, T text tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.call import Call
from scalediff_kernels.neighborhood.config import LaunchConfig
from scalediff_kernels.neighborhood.kernel import mean_kernel
from scalediff_kernels.neighborhood.strides import in_vectors

MEAN_ELEMENTS = 8192  # of a program that reduces: 32 a thread of eight warps


@dataclass(frozen=True)
class TextSums:
    """Memory of the sums, and its layout.

    Attributes:
        sums: `[B, H, parts, tiles, rows, BLOCK_D]`, fp32.
        lse: `[B, H, parts, tiles, rows]`, fp32, log-sum-exp in units of log2, if the parts are of the keys of one window; otherwise None.
        tiles, rows: Tiles of text queries of a head, and rows of a tile.
        parts: Parts of the windows or keys.
    """

    sums: Tensor
    lse: Tensor | None
    tiles: int
    rows: int
    parts: int

    @staticmethod
    def empty(call: Call, rows: int, parts: int, *, of_keys: bool) -> TextSums:
        batch, text, heads, _ = call.q.shape
        tiles = -(-text // rows)
        count = batch * heads * parts * tiles * rows
        sums = torch.empty(count * call.block_d, dtype=torch.float32, device=call.q.device)
        return TextSums(sums, torch.empty_like(sums[:count]) if of_keys else None, tiles, rows, parts)

    def mean(self, out: Tensor, call: Call, windows: int, config: LaunchConfig) -> Launch:
        """The launch that writes `out`, contiguous `[B, T, H, D]`: the mean over windows, or parts of keys merged by their log-sum-exp."""
        batch, text, heads, head_dim = call.q.shape
        rows = min(self.rows, MEAN_ELEMENTS // call.block_d)
        arguments = {
            "sums_ptr": self.sums,
            "lse_ptr": self.lse,
            "out_ptr": out,
            "out_strides": in_vectors(out),
            "heads": heads,
            "text": text,
            "parts": self.parts,
            "count": windows,
            "TEXT_ROWS": self.rows,
            "ROWS": rows,
            "D": head_dim,
            "BLOCK_D": call.block_d,
            "WEIGHTED": self.lse is not None,
            "num_warps": 8,
            "enable_fp_fusion": True,
        }
        return Launch(mean_kernel, batch * heads * self.tiles * self.rows // rows, arguments, config)
