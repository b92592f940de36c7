"""Kernel launches of the attention: descriptors or strides, the number of programs, and the constants.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import math
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalediff_kernels._common import VECTOR
from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.config import MIN_BLOCK, LaunchConfig, Problem, ceil_power_of_two, launch_config
from scalediff_kernels.neighborhood.kernel import image_kernel, mean_kernel, text_kernel


def image_launch(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor | None = None,
    text_v: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    scale: float,
    device: str,
    config: LaunchConfig | None = None,
) -> Launch:
    """The launch for image queries, which writes `out`, contiguous `[B, Y, X, H, D]`. Arguments as in `api`, already checked.

    `config` replaces the configuration of the table, for tuning.
    """
    batch, _, _, heads, _ = q.shape
    text = None if text_k is None or text_v is None else (text_k, text_v)
    config, shared = _shared_arguments(
        "image", q, (k, v), text, rope, window=window, patch=patch, offset=offset, scale=scale, device=device, config=config
    )
    rows, columns = config.query_box
    reach = [min(p, n + o) for p, n, o in zip(patch, q.shape[1:3], offset, strict=True)]  # a patch may be larger than the grid
    tiles = -(-reach[0] // rows), -(-reach[1] // columns)
    store_boxes = config.path == "descriptor" and patch[0] % rows == 0 and patch[1] % columns == 0
    arguments = _references({"q": (q, (1, rows, columns, 1))}, boxes=config.path == "descriptor")
    arguments |= _references({"out": (out, (1, rows, columns, 1))}, boxes=store_boxes)
    arguments |= {"QUERY_BOX": config.query_box, "TILES": tiles, "HAS_TEXT": text is not None, "STORE_BOXES": store_boxes}
    return Launch(image_kernel, batch * heads * shared["patches_y"] * shared["patches_x"] * prod(tiles), shared | arguments, config)


def text_launch(
    out: Tensor,
    text_q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    scale: float,
    device: str,
    config: LaunchConfig | None = None,
) -> Launch:
    """The launch for text queries, averaged over the windows, which writes `out`, contiguous `[B, T, H, D]`.

    With window = patch = grid this is the global rule. There are two kernels: the first writes fp32 sums over the windows, as large as
    `out` for each part of the windows, and the second computes the mean.
    """
    batch, text, heads, _ = text_q.shape
    config, shared = _shared_arguments(
        "text", text_q, (k, v), (text_k, text_v), rope, window=window, patch=patch, offset=offset, scale=scale, device=device, config=config
    )
    rows, count = config.query_box[1], shared["patches_y"] * shared["patches_x"]
    tiles, parts = batch * heads * -(-text // rows), -(-count // config.part_windows)
    sums = torch.empty(tiles * parts * rows * shared["BLOCK_D"], dtype=torch.float32, device=out.device)
    ours = {"sums_ptr": sums, "TEXT_ROWS": rows}
    arguments = _references({"text_q": (text_q, (1, rows, 1))}, boxes=config.path == "descriptor")
    arguments |= ours | {"part_windows": config.part_windows}
    mean = ours | {name: shared[name] for name in ("heads", "text", "D", "BLOCK_D")}
    mean |= {
        "out_ptr": out,
        "out_strides": _in_vectors(out),
        "parts": parts,
        "count": count,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }
    return Launch(text_kernel, tiles * parts, shared | arguments, config, then=Launch(mean_kernel, tiles, mean, config))


def _shared_arguments(
    queries: Literal["image", "text"],
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor] | None,
    rope: tuple[Tensor, Tensor] | None,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    scale: float,
    device: str,
    config: LaunchConfig | None,
) -> tuple[LaunchConfig, dict[str, Any]]:
    """The launch configuration, and the arguments that both kernels have in common."""
    height, width, groups, head_dim = keys[0].shape[1:]
    window = min(window[0], height), min(window[1], width)
    tokens = 0 if text is None else text[0].shape[1]
    tensors = (q, *keys, *(text or ()))
    descriptors = all(_suits_descriptor(x) for x in tensors)
    patches = -(-(height + offset[0]) // patch[0]), -(-(width + offset[1]) // patch[1])
    sums = {"heads": q.shape[0] * q.shape[-2], "windows": prod(patches)} if queries == "text" else {}
    problem = Problem((height, width), window, patch, head_dim, q.element_size(), tokens, queries, descriptors, **sums)
    config = config or launch_config(problem, device)
    rows, columns = config.key_box
    references: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    references = {name: (x, (1, rows, columns, 1)) for name, x in zip("kv", keys, strict=True)}
    references |= {f"text_{n}": (x, (1, config.text_block, 1)) for n, x in zip("kv", text or (None, None), strict=True)}
    return config, _references(references, boxes=config.path == "descriptor") | {
        "cos_ptr": rope and rope[0],
        "sin_ptr": rope and rope[1],
        "grid_y": height,
        "grid_x": width,
        "patches_y": patches[0],
        "patches_x": patches[1],
        "offset_y": offset[0],
        "offset_x": offset[1],
        "heads": q.shape[-2],
        "text": tokens,
        "scale": abs(scale) * math.log2(math.e),
        "KEY_BOX": config.key_box,
        "WINDOW": window,
        "PATCH": patch,
        "GROUP": q.shape[-2] // groups,
        "D": head_dim,
        "BLOCK_D": max(MIN_BLOCK, ceil_power_of_two(head_dim)),
        "TEXT_BLOCK": config.text_block,
        "RAGGED_TEXT": tokens % config.text_block != 0,
        "ROPE": rope is not None,
        "NEGATE": scale < 0,
        "BOXES": config.path == "descriptor",
        "PRECISION": "ieee",
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _references(tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]], *, boxes: bool) -> dict[str, Any]:
    """Arguments `name_ref` and `name_strides` of each tensor; `name_ref` is a descriptor for boxes of one head, or the tensor."""
    arguments: dict[str, Any] = {}
    for name, (x, box) in tensors.items():
        arguments[f"{name}_ref"] = x
        arguments[f"{name}_strides"] = None if x is None else _in_vectors(x)
        if x is not None and boxes:
            block = [*box, max(MIN_BLOCK, ceil_power_of_two(x.shape[-1]))]
            arguments[f"{name}_ref"] = TensorDescriptor(x, list(x.shape), _descriptor_strides(x), block)
    return arguments


def aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its rows of D elements do not start at multiples of eight elements and 16 bytes.

    The kernels load 16 bytes at a time. A copy is cheap compared with attention; loads of two bytes are not.
    """
    suits = x.data_ptr() % 16 == 0 and _has_vector_strides(x)
    return x if suits else x.clone(memory_format=torch.contiguous_format)


def _has_vector_strides(x: Tensor) -> bool:
    """Whether all strides are multiples of VECTOR elements; that of an axis with one element is never used."""
    return all(stride % VECTOR.value == 0 for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)


def _in_vectors(x: Tensor) -> tuple[int, ...]:
    assert _has_vector_strides(x), f"{x.stride()=}"
    return tuple(stride // VECTOR.value for stride in x.stride()[:-1])


def _descriptor_strides(x: Tensor) -> list[int]:
    """Strides for a descriptor, in multiples of 16 bytes; the stride of an axis with one element is replaced."""
    return [s if n > 1 else max(16, x.shape[-1]) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)] + [1]


def _suits_descriptor(x: Tensor) -> bool:
    """Whether TMA supports a tensor: 16-byte aligned address and strides, none of them zero."""
    strides = _descriptor_strides(x)[:-1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
