"""Kernel launches of the attention: descriptors or strides, the number of programs, and the constants.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.call import Call
from scalediff_kernels.neighborhood.config import MIN_BLOCK, LaunchConfig, Path, ceil_power_of_two, launch_config
from scalediff_kernels.neighborhood.hopper import launch as hopper_launch
from scalediff_kernels.neighborhood.kernel import image_kernel, text_kernel
from scalediff_kernels.neighborhood.strides import descriptor_strides, in_vectors
from scalediff_kernels.neighborhood.text_sums import TextSums


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
    wrap: tuple[bool, bool] = (False, False),
    origin: tuple[int, int] = (0, 0),
    lse: Tensor | None = None,
    path: Path | None = None,
    config: LaunchConfig | None = None,
) -> Launch:
    """The launch for image queries, which writes `out`, contiguous `[B, Y, X, H, D]`. Arguments as in `api`, already checked.

    `lse`, contiguous `[B, Y, X, H]` in fp32, is written if it is given. `path` names the path to take, for tests and benchmarks; `config`
    replaces the configuration of the table, for tuning.
    """
    text = None if text_k is None or text_v is None else (text_k, text_v)
    call = Call("image", q, (k, v), text, rope, (q.shape[1], q.shape[2]), origin, window, patch, offset, scale, wrap)
    config = _config(call, device, path, config)
    if config.path == "warp-specialised":
        return hopper_launch.image(out, call, config, lse)
    rows, columns = config.query_box
    axes = zip(patch, q.shape[1:3], offset, wrap, strict=True)
    reach = [min(p, n if on else n + o) for p, n, o, on in axes]  # a patch may be larger than the grid
    tiles = -(-reach[0] // rows), -(-reach[1] // columns)
    store_boxes = config.path == "descriptor" and patch[0] % rows == 0 and patch[1] % columns == 0
    arguments = _references({"q": (q, (1, rows, columns, 1))}, boxes=config.path == "descriptor")
    arguments |= _references({"out": (out, (1, rows, columns, 1))}, boxes=store_boxes)
    arguments |= call.query_numbers | {
        "lse_ptr": lse,
        "LSE": lse is not None,
        "QUERY_BOX": config.query_box,
        "TILES": tiles,
        "HAS_TEXT": text is not None,
        "STORE_BOXES": store_boxes,
    }
    programs = q.shape[0] * q.shape[3] * prod(call.patches) * prod(tiles)
    return Launch(image_kernel, programs, _shared_arguments(call, config) | arguments, config)


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
    wrap: tuple[bool, bool] = (False, False),
    grid: tuple[int, int] | None = None,
    origin: tuple[int, int] = (0, 0),
    path: Path | None = None,
    config: LaunchConfig | None = None,
) -> Launch:
    """The launch for text queries, averaged over the windows, which writes `out`, contiguous `[B, T, H, D]`.

    `grid` is that of the patches; when None, that of k. With window = patch = grid this is the global rule. There are two kernels: the
    first writes fp32 sums over the windows, as large as `out` for each part of the windows, and the second computes the mean.
    """
    grid = grid or (k.shape[1], k.shape[2])
    call = Call("text", text_q, (k, v), (text_k, text_v), rope, grid, origin, window, patch, offset, scale, wrap)
    config = _config(call, device, path, config)
    if config.path == "warp-specialised":
        return hopper_launch.text(out, call, config)
    rows, windows = config.query_box[1], prod(call.patches)
    sums = TextSums.empty(call, rows, -(-windows // config.part_windows), of_keys=False)
    arguments = _references({"text_q": (text_q, (1, rows, 1))}, boxes=config.path == "descriptor")
    arguments |= {"sums_ptr": sums.sums, "TEXT_ROWS": rows, "part_windows": config.part_windows}
    programs = text_q.shape[0] * text_q.shape[2] * sums.tiles * sums.parts
    return Launch(text_kernel, programs, _shared_arguments(call, config) | arguments, config, then=sums.mean(out, call, windows, config))


def _config(call: Call, device: str, path: Path | None, config: LaunchConfig | None) -> LaunchConfig:
    if config and path not in (None, config.path):
        raise ValueError(f"path must be that of config where both are given, got {path=}, {config.path=}")
    return config or launch_config(call.problem, device, path)


def _shared_arguments(call: Call, config: LaunchConfig) -> dict[str, Any]:
    """The arguments that both kernels have in common."""
    rows, columns = config.key_box
    references: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    references = {name: (x, (1, rows, columns, 1)) for name, x in zip("kv", call.keys, strict=True)}
    references |= {f"text_{n}": (x, (1, config.text_block, 1)) for n, x in zip("kv", call.text or (None, None), strict=True)}
    return _references(references, boxes=config.path == "descriptor") | {
        **call.window_numbers,
        "cos_ptr": call.rope and call.rope[0],
        "sin_ptr": call.rope and call.rope[1],
        "patches_y": call.patches[0],
        "scale": call.log2_scale,
        "KEY_BOX": config.key_box,
        "WINDOW": call.cut_window,
        "PATCH": call.patch,
        "GROUP": call.group,
        "D": call.q.shape[-1],
        "BLOCK_D": call.block_d,
        "TEXT_BLOCK": config.text_block,
        "RAGGED_TEXT": call.tokens % config.text_block != 0,
        "ROPE": call.rope is not None,
        "NEGATE": call.scale < 0,
        "WRAP": call.wrap,
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
        arguments[f"{name}_strides"] = None if x is None else in_vectors(x)
        if x is not None and boxes:
            block = [*box, max(MIN_BLOCK, ceil_power_of_two(x.shape[-1]))]
            arguments[f"{name}_ref"] = TensorDescriptor(x, list(x.shape), descriptor_strides(x), block)
    return arguments
