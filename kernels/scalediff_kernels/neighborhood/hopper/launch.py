"""Launches of the warp-specialised kernel of sm_90: descriptors, the numbers of tiles and programs, and its constants.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.call import Call
from scalediff_kernels.neighborhood.config import MIN_BLOCK, MULTIPROCESSORS, WARPGROUP_ROWS, LaunchConfig, ceil_power_of_two
from scalediff_kernels.neighborhood.hopper.constants import Constants
from scalediff_kernels.neighborhood.hopper.kernel import hopper_kernel
from scalediff_kernels.neighborhood.strides import descriptor_strides, in_vectors
from scalediff_kernels.neighborhood.text_sums import TextSums

TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
LEAST_SCALE = 1e-30  # instead of 0, which would turn the minus infinity of a masked score into NaN; weights are 1 in fp32 all the same


def image(out: Tensor, call: Call, config: LaunchConfig, lse: Tensor | None = None) -> Launch:
    """The launch for image queries, which writes `out`, contiguous `[B, Y, X, H, D]`, and `lse`, `[B, Y, X, H]`, if it is given."""
    store_boxes = all(p % b == 0 for p, b in zip(call.patch, config.query_box, strict=True))
    constants = _constants(call, config, store_boxes=store_boxes, lse=lse is not None)
    axes = zip(call.grid, call.patch, call.offset, config.query_box, constants.tiles, strict=True)
    (skip_y, rows), (skip_x, columns) = (_tiles(*axis) for axis in axes)
    box = constants.consumer_box
    tiles = call.q.shape[0] * call.q.shape[3] * rows * columns
    arguments = {
        "q_ref": _descriptor(call.q, (1, *box, 1)),
        "out_ref": _descriptor(out, (1, *box, 1)) if store_boxes else out,
        "out_strides": (0, 0, 0, 0) if store_boxes else in_vectors(out),
        "lse_ptr": out if lse is None else lse,
        "tiles": tiles,
        "rows": rows,
        "columns": columns,
        "skip_y": skip_y,
        "skip_x": skip_x,
    }
    return Launch(hopper_kernel, _programs(tiles, out), _shared_arguments(call, config, constants, out) | arguments, config)


def text(out: Tensor, call: Call, config: LaunchConfig) -> Launch:
    """The launch for text queries and the one that reduces their sums and writes `out`, contiguous `[B, T, H, D]`."""
    windows, blocks = prod(call.patches), _blocks(call, config)
    window_parts, block_parts = -(-windows // config.part_windows), -(-blocks // (config.part_blocks or blocks))
    assert min(window_parts, block_parts) == 1, f"parts are of windows or of blocks of keys, got {config=}"
    sums = TextSums.empty(call, prod(config.query_box), window_parts * block_parts, of_keys=block_parts > 1)
    constants = _constants(call, config, lse=block_parts > 1)
    tiles = call.q.shape[0] * call.q.shape[2] * sums.tiles * sums.parts
    arguments = {
        "q_ref": _descriptor(call.q, (1, prod(config.query_box) // constants.consumers, 1)),
        "out_ref": out,
        "out_strides": (0, 0, 0, 0),
        "sums_ptr": sums.sums,
        "tiles": tiles,
        "rows": sums.tiles,
        "columns": sums.parts,
        "skip_y": 0,
        "skip_x": 0,
    }
    arguments |= {} if sums.lse is None else {"lse_ptr": sums.lse}
    then = sums.mean(out, call, windows, config)
    return Launch(hopper_kernel, _programs(tiles, out), _shared_arguments(call, config, constants, out) | arguments, config, then=then)


def _constants(call: Call, config: LaunchConfig, *, store_boxes: bool = False, lse: bool = False) -> Constants:
    consumers = prod(config.query_box) // WARPGROUP_ROWS
    assert consumers == 2 or (consumers in (3, 4) and not config.ping_pong), f"two consumers, or three or four without turns, {config=}"
    assert config.num_stages > 1, f"a tile's second block of keys is loaded before its queries, {config=}"
    return Constants(
        query_box=config.query_box,
        key_box=config.key_box,
        window=call.cut_window,
        patch=call.patch,
        group=call.group,
        head_dim=call.q.shape[-1],
        block_d=call.block_d,
        stages=config.num_stages,
        consumers=consumers,
        registers=config.registers,
        text_queries=call.queries == "text",
        has_text=call.text is not None,
        rope=call.rope is not None,
        ragged_text=call.tokens % config.text_block != 0,
        negate=call.scale < 0,
        ping_pong=config.ping_pong,
        part=call.is_part,
        store_boxes=store_boxes,
        lse=lse,
    )


def _shared_arguments(call: Call, config: LaunchConfig, constants: Constants, out: Tensor) -> dict[str, Any]:
    """The arguments that both kinds of queries have in common. Triton 3.6 does not pass None to a partition: `out` takes its place."""
    k, v = (_descriptor(x, (1, *config.key_box, 1)) for x in call.keys)
    text_k, text_v = (_descriptor(x, (1, config.text_block, 1)) for x in call.text) if call.text else (k, v)
    cos, sin = call.rope or (out, out)
    blocks = _blocks(call, config)
    return {
        **call.query_numbers,
        **call.window_numbers,
        "k_ref": k,
        "v_ref": v,
        "text_k_ref": text_k,
        "text_v_ref": text_v,
        "sums_ptr": out,
        "lse_ptr": out,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "windows": prod(call.patches),
        "part_windows": config.part_windows,
        "blocks": blocks,
        "part_blocks": config.part_blocks or blocks,
        "text_blocks": -(-call.tokens // config.text_block),
        "scale": max(call.log2_scale, LEAST_SCALE),
        "C": constants,
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }


def _blocks(call: Call, config: LaunchConfig) -> int:
    """Blocks of keys of one window, with those of the text."""
    boxes = prod(-(-w // b) for w, b in zip(call.cut_window, config.key_box, strict=True))
    return -(-call.tokens // config.text_block) + boxes


def _tiles(length: int, patch: int, offset: int, box: int, tiles: int) -> tuple[int, int]:
    """Along one axis: tiles of the first patch that are outside the grid, and the number of tiles inside."""
    skipped = offset // box
    patches = -(-(length + offset) // patch)
    of_last = min(tiles, -(-(length + offset - (patches - 1) * patch) // box))
    return skipped, (patches - 1) * tiles + of_last - skipped


def _programs(tiles: int, out: Tensor) -> int:
    """One for each multiprocessor, as long as there are tiles."""
    device = out.device
    at_once = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS["sm_90"]
    return min(tiles, at_once)


def _descriptor(x: Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    block = (*box, max(MIN_BLOCK, ceil_power_of_two(x.shape[-1])))
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), list(block), _layout(block, x.dtype))


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), TYPES[dtype])
