"""What the small kernels that test the emulator work on: blocks of 16 x 16 halves."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

N = gl.constexpr(16)


def blocks(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).half()


def descriptor(x: Tensor) -> TensorDescriptor:
    """For TMA of one block."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [16, 16], layout)
