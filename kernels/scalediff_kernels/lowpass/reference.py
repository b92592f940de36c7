"""The low-pass filters as they are defined, through `F.interpolate`; fp64 stays fp64.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def low_pass_resize(x: Tensor, *, coarse: tuple[int, int]) -> Tensor:
    """Antialiased bilinear down to the `coarse` grid, bilinear back up: `[B, C, Y, X]` in at least fp32.

    ScaleDiff, arXiv:2510.25818.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    down = F.interpolate(x, size=coarse, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(down, size=x.shape[-2:], mode="bilinear", align_corners=False)
