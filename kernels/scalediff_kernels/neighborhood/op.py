"""The Triton kernels as torch operators: `torch.ops.scalediff.image_attention`, `image_attention_lse` and `text_attention`.

Each is one opaque operator, so that torch.compile keeps a single graph, FakeTensors know the shapes, and autocast applies.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scalediff_kernels._launch import DTYPES, device_name, device_refusal, on
from scalediff_kernels._ops import NAMESPACE, add_op_namespace_prefix, ops


@torch.library.custom_op(add_op_namespace_prefix("image_attention"), mutates_args=())
def image_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor | None,
    text_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    patch: Sequence[int],
    offset: Sequence[int],
    wrap: Sequence[bool],
    scale: float,
    origin: Sequence[int] | None = None,
) -> Tensor:
    """Attention of the image queries; arguments as in `api.joint_neighborhood_patch_attention`, already checked."""
    return _launched("image_launch", (q, k, v, text_k, text_v), cos, sin, (window, patch, offset, wrap, scale), origin)


@torch.library.custom_op(add_op_namespace_prefix("image_attention_lse"), mutates_args=())
def image_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor | None,
    text_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    patch: Sequence[int],
    offset: Sequence[int],
    wrap: Sequence[bool],
    scale: float,
    origin: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `image_attention`, and the log-sum-exp of the scores, `[B, Y, X, H]` in fp32."""
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    return _launched("image_launch", (q, k, v, text_k, text_v), cos, sin, (window, patch, offset, wrap, scale), origin, lse=lse), lse


@torch.library.custom_op(add_op_namespace_prefix("text_attention"), mutates_args=())
def text_attention(
    text_q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    patch: Sequence[int],
    offset: Sequence[int],
    wrap: Sequence[bool],
    scale: float,
    origin: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
) -> Tensor:
    """Attention of the text queries, averaged over the windows; arguments as in `image_attention`. `grid`: that of the image queries."""
    patches = {} if grid is None else {"grid": _two(grid)}
    return _launched("text_launch", (text_q, k, v, text_k, text_v), cos, sin, (window, patch, offset, wrap, scale), origin, **patches)


@image_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@image_attention_lse.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@text_attention.register_fake
def _(text_q: Tensor, *_: Any) -> Tensor:
    return text_q.new_empty(text_q.shape)


def refusal(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels do not support these tensors; None if they do."""
    q = tensors[0]
    if refused := device_refusal(q.device):
        return refused
    if dtype_under_autocast(q) not in DTYPES:
        return f"the kernel supports fp16, bf16 and fp32, got {q.dtype=}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 256:
        return f"the kernel supports head dims that are multiples of 8 from 8 to 256, got D={q.shape[-1]}"
    if any(x.stride(-1) != 1 for x in tensors):
        return f"the kernel needs a contiguous last axis, got strides {[x.stride() for x in tensors]}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the kernel does not support gradients: use torch.no_grad() or impl='auto'"
    return None


def dtype_under_autocast(x: Tensor) -> torch.dtype:
    """The dtype to which autocast casts x; the dtype of x without autocast, or for fp64."""
    kind = x.device.type
    cast = x.dtype in DTYPES and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def _autocast_rule(operator: Callable[..., Any], key: torch._C.DispatchKey) -> Callable[..., Any]:
    """Cast image and text tensors, but not the rotary tables, to autocast's current dtype, and call the operator without autocast.

    `torch.library.register_autocast` would cast every argument, and to a fixed dtype.
    """

    def rule(*arguments: Any) -> Any:
        cast = [x.to(dtype_under_autocast(x)) if isinstance(x, Tensor) and i < 5 else x for i, x in enumerate(arguments)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*cast)

    return rule


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name in ("image_attention", "image_attention_lse", "text_attention"):
    for _key in (torch._C.DispatchKey.AutocastCUDA, torch._C.DispatchKey.AutocastCPU):
        _library.impl(_name, _autocast_rule(getattr(ops, _name), _key), _key.name)


def _launched(
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    numbers: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool], float],
    origin: Sequence[int] | None,
    **more: Any,
) -> Tensor:
    """Run `image_launch` or `text_launch`, with what only one of them has in `more`. Triton is imported at the first call."""
    from scalediff_kernels.neighborhood import launch
    from scalediff_kernels.neighborhood.strides import aligned

    q = tensors[0]
    window, patch, offset, wrap, scale = numbers
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rope = None if cos is None or sin is None else (cos.float().contiguous(), sin.float().contiguous())
    how: dict[str, Any] = {"window": _two(window), "patch": _two(patch), "offset": _two(offset), "origin": _two(origin or (0, 0))}
    how |= {"wrap": (bool(wrap[0]), bool(wrap[1])), "scale": scale, **more}
    with on(q.device):
        ready = (None if x is None else aligned(x) for x in tensors)
        getattr(launch, name)(out, *ready, rope, **how, device=device_name(q.device)).run()
    return out


def _two(pair: Sequence[int]) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])
