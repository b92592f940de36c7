"""What the attention kernels need of a tensor's address and strides: rows that start at multiples of 16 bytes."""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR = 8  # elements of 16 bits in 16 bytes; `scalediff_kernels._common.VECTOR`


def aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its rows of D elements do not start at multiples of eight elements and 16 bytes.

    The kernels load 16 bytes at a time. A copy is cheap compared with attention; loads of two bytes are not.
    """
    suits = x.data_ptr() % 16 == 0 and _has_vector_strides(x)
    return x if suits else x.clone(memory_format=torch.contiguous_format)


def in_vectors(x: Tensor) -> tuple[int, ...]:
    """Strides of all axes but the last, in vectors."""
    assert _has_vector_strides(x), f"{x.stride()=}"
    return tuple(stride // VECTOR for stride in x.stride()[:-1])


def _has_vector_strides(x: Tensor) -> bool:
    """Whether all strides are multiples of VECTOR elements; that of an axis with one element is never used."""
    return all(stride % VECTOR == 0 for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)


def descriptor_strides(x: Tensor) -> list[int]:
    """Strides for a descriptor, in multiples of 16 bytes; the stride of an axis with one element is replaced."""
    return [s if n > 1 else max(16, x.shape[-1]) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)] + [1]


def suits_descriptor(x: Tensor) -> bool:
    """Whether TMA supports a tensor: 16-byte aligned address and strides, none of them zero."""
    strides = descriptor_strides(x)[:-1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
