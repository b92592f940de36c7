"""Intercept the attention calls of a patched denoiser while its forward runs.

A model computes attention through `torch.nn.functional.scaled_dot_product_attention`, or through the backend registry of diffusers'
dispatcher, whose other backends never call that function. Both are replaced while a patched denoiser runs. Calls from other threads and
other models, and calls that are not image self-attention, are passed on to the original functions.

Legend: B batch, S tokens of a sequence, H heads, D head dim.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.patching.plan import Call, Plan, got, with_score_bias
from scalediff.patching.record import ModuleCalls


class Owner(Protocol):
    """The patched denoiser that a pass belongs to. It is notified of every attention call, except inside a compiled graph."""

    def on_intercepted(self, current_pass: Pass, call: Call) -> None: ...

    def on_skipped(self, current_pass: Pass, why: str, lengths: tuple[int, int]) -> None: ...

    def on_other(self, current_pass: Pass, lengths: tuple[int, int]) -> None: ...


class Pass:
    """One forward pass of one patched denoiser in one thread. If `observes`, it only records the calls, and all run full attention."""

    def __init__(self, owner: Owner, plan: Plan, weights: Tensor | None, outer: Pass | None, *, observes: bool = False) -> None:
        self.owner, self.plan, self.weights, self.outer, self.observes = owner, plan, weights, outer, observes
        self.with_gradients = torch.is_grad_enabled()
        self.intercepted = 0  # calls
        self.skipped: dict[str, str] = {}  # callers whose calls ran full attention, and why
        self.calls: dict[str, ModuleCalls] = {}  # by the name of the module
        # Inside a compiled graph calls cannot be counted and the calling module is unknown. These record what happened there.
        self.intercepted_in_graph = False
        self.skipped_in_graph = ""  # why
        self.other_in_graph = False

    @property
    def in_graph(self) -> bool:
        """Whether a compiled graph made calls, which are not counted."""
        return self.intercepted_in_graph or self.other_in_graph or bool(self.skipped_in_graph)


class _Passes(threading.local):
    def __init__(self) -> None:  # runs once per thread; an attribute added later would make torch.compile recompile
        self.current: Pass | None = None
        self.bypass = False  # the original function is running: do not intercept


_passes = _Passes()


def current() -> Pass | None:
    """The pass that this thread is in; None outside of any."""
    return _passes.current


def open_pass(owner: Owner, plan: Plan, weights: Tensor | None, *, observes: bool = False) -> Pass:
    """Start intercepting this thread's attention calls for a new pass. Passes may nest; calls belong to the innermost one.

    `weights` are the score weights of the pass's layout.
    """
    _replacement.acquire()
    opened = Pass(owner, plan, weights, _passes.current, observes=observes)
    _passes.current = opened
    return opened


def close_pass(finished: Pass) -> None:
    """End a pass; calls belong to the outer pass again, if there is one."""
    _passes.current = finished.outer
    _replacement.release()


class _Replacement:
    """The replaced functions, with a count of open passes: the first pass of any thread replaces them, the last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self.torch_function: Any = F.scaled_dot_product_attention
        self.original = self.torch_function
        self._backends: dict[Any, Any] = {}

    def acquire(self) -> None:
        with self._lock:
            # Already replaced in another thread, unless another library has restored a value that it saved during a pass.
            if F.scaled_dot_product_attention is not scaled_dot_product_attention:
                self.original = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = scaled_dot_product_attention
            if self._users == 0:
                registry = _registry()
                self._backends = dict(registry)
                registry.update({name: _backend(function) for name, function in registry.items()})
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if F.scaled_dot_product_attention is scaled_dot_product_attention:
                    F.scaled_dot_product_attention = self.original
                registry = _registry()
                registry.update({n: f for n, f in self._backends.items() if registry.get(n) is _backend(f)})


_replacement = _Replacement()


def torch_function() -> Callable[..., Any]:
    """torch's own scaled_dot_product_attention."""
    function: Callable[..., Any] = _replacement.torch_function
    return function


def _registry() -> dict[Any, Any]:
    """The dictionary of diffusers' attention backends; empty if its dispatcher has not been imported."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(getattr(module, "_AttentionBackendRegistry", None), "_backends", None)
    return registry if isinstance(registry, dict) else {}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replacement for `F.scaled_dot_product_attention`, with the same arguments and result: `[B, H, S, D]` in and out."""
    if not _passes.bypass and _passes.current is not None:
        out = _intercept(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, heads_first=True)
        if out is not None:
            return out
    options = {"enable_gqa": True} if enable_gqa else {}
    # If another library wrapped this function during a pass and kept the wrapper, `original` leads back here: then call torch's function.
    target = _replacement.torch_function if _passes.bypass else _replacement.original
    before, _passes.bypass = _passes.bypass, True
    try:
        result: Tensor = target(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    finally:
        _passes.bypass = before
    return result


@functools.cache
def _backend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Replacement for one backend of diffusers' dispatcher, `[B, S, H, D]` in and out. The dispatcher passes keyword arguments only."""

    def backend(**arguments: Any) -> Tensor:
        if not _passes.bypass and _passes.current is not None and arguments.get("_parallel_config") is None:
            mask = arguments.get("attn_mask")
            if mask is not None and mask.ndim == 2:  # the dispatcher also accepts [B, S], a mask of the keys
                mask = mask[:, None, None, :]
            out = _intercept(
                arguments["query"], arguments["key"], arguments["value"], mask, arguments.get("dropout_p", 0.0),
                arguments.get("is_causal", False), arguments.get("scale"), arguments.get("enable_gqa", False), heads_first=False,
            )  # fmt: skip
            if out is not None:
                return out
        before, _passes.bypass = _passes.bypass, True
        try:
            return function(**arguments)
        finally:
            _passes.bypass = before

    return backend


def _intercept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    heads_first: bool,
) -> Tensor | None:
    """Compute a call by the plan of the current pass; None if the plan has no such call."""
    current_pass = _passes.current
    if current_pass is None:
        return None
    problem, plan = "", current_pass.plan
    if current_pass.observes:
        _notify_of_other(current_pass, q, k, heads_first=heads_first)
        return None
    if q.ndim != 4:
        problem = "q, k and v must be [B, H, S, D]" + got(q)
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v)) if heads_first else (q, k, v)
        call = plan.call(q.shape[1], k.shape[1])
        if call is None:
            problem = plan.unexpected(q.shape[1], k.shape[1])
            if not problem:  # cross-attention, or attention among text tokens
                _notify_of_other(current_pass, q, k, heads_first=False)
                return None
        else:
            without_mask = mask is None or plan.masked or is_constant(mask)  # plan.masked: the plan already accounts for the mask
            key_bias = None if without_mask or mask is None else key_mask_bias(mask, k)
            supported = without_mask or key_bias is not None
            problem = _find_problem(current_pass, call, q, k, v, mask, dropout_p, is_causal, enable_gqa, mask_supported=supported)
            if not problem:
                if torch.compiler.is_compiling():
                    current_pass.intercepted_in_graph = True
                else:
                    current_pass.owner.on_intercepted(current_pass, call)
                weights = None if current_pass.weights is None else (current_pass.weights, current_pass.weights)
                if key_bias is not None:
                    weights = torch.ones_like(key_bias), key_bias
                out = _attend(call, *_cast_to_one_dtype(q, k, v), scale, weights)
                return out.transpose(1, 2) if heads_first else out
    if torch.compiler.is_compiling():
        current_pass.skipped_in_graph = problem
    else:
        current_pass.owner.on_skipped(current_pass, problem, _lengths(q, k, heads_first=heads_first and q.ndim != 4))
    return None


def _notify_of_other(current_pass: Pass, q: Tensor, k: Tensor, *, heads_first: bool) -> None:
    if torch.compiler.is_compiling():
        current_pass.other_in_graph = True
    else:
        current_pass.owner.on_other(current_pass, _lengths(q, k, heads_first=heads_first))


def _lengths(q: Tensor, k: Tensor, *, heads_first: bool) -> tuple[int, int]:
    """Numbers of queries and keys of `[..., S, D]`, or of `[B, S, H, D]`."""
    axis = -2 if heads_first else 1
    return q.shape[axis], k.shape[axis]


def _cast_to_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as torch's attention does under autocast, where normalised queries and keys may be fp32 and values 16-bit."""
    if q.dtype == k.dtype == v.dtype:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float | None, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    if weights is None:
        return call.attend(q, k, v, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_queries, of_keys = (x.expand(q.shape[0], -1) for x in weights)
    if of_queries.shape[1] != q.shape[1]:  # only the image has queries, and text is among the keys
        of_queries = of_queries[:, :1].expand(-1, q.shape[1])
    return call.attend(*with_score_bias(q, k, v, of_queries, of_keys, scale), scale)[..., : q.shape[-1]]


_MASKED = -1e4  # score bias of a masked key: its softmax weight underflows to zero, and fp16 can represent it


def key_mask_bias(mask: Tensor, k: Tensor) -> Tensor | None:
    """Convert a boolean mask `[B or 1, 1, 1, S]` of the keys to a score bias `[B or 1, S]`; None for any other mask."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, k.shape[1]):
        return None
    return torch.where(mask[:, 0, 0], 0.0, _MASKED)


def _find_problem(
    current_pass: Pass,
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    *,
    mask_supported: bool,
) -> str:
    """Why a call of the expected lengths cannot be computed in windows; empty if it can."""
    if is_causal:
        return "causal attention is not supported"
    if dropout_p != 0.0:
        return "attention with dropout is not supported"
    if k.shape != v.shape or (k.shape[2] != q.shape[2] and not enable_gqa) or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        return "q, k and v must have the same shape except for their lengths" + got(q, k, v)
    if call.real and len(call.real) != q.shape[0]:
        return f"the text lengths are for a batch of {len(call.real)} samples" + got(q)
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return "q, k and v must have the same dtype" + got(q, k, v)
    if current_pass.weights is not None and current_pass.weights.shape != q.shape[:2]:
        return "score weights must be [B, S]" + got(current_pass.weights, q)
    if call.padded and mask is None:
        return f"text of {call.real} tokens is padded, but the call has no mask"
    if mask is not None and not mask_supported:
        return "this attention mask is not supported" + got(mask)
    return ""


_MAX_MASK_ELEMENTS = 1 << 20  # a mask with more distinct elements is not read, because reading happens at every call


def is_constant(mask: Tensor) -> bool:
    """Whether a mask has no effect: all True, or one number for every score. False inside a compiled graph, where values are unknown."""
    if torch.compiler.is_compiling():
        return False
    distinct = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]  # one element of each expanded axis
    if distinct.numel() > _MAX_MASK_ELEMENTS:
        return False
    return bool(distinct.all()) if mask.dtype == torch.bool else bool((distinct == distinct.flatten()[0]).all())
