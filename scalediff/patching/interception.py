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
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.patching.call import Call
from scalediff.patching.plan import AttentionPlan, Match
from scalediff.patching.record import ModuleCalls
from scalediff.patching.stack import depth_of


class Owner(Protocol):
    """The patched denoiser that a pass belongs to. It is notified of every attention call, except inside a compiled graph."""

    def on_intercepted(self, current_pass: Pass, call: Call) -> None: ...

    def on_skipped(self, current_pass: Pass, why: str, lengths: tuple[int, int]) -> None: ...

    def on_other(self, current_pass: Pass, lengths: tuple[int, int]) -> None: ...

    def on_observed(self, current_pass: Pass, call: Call | None, why: str, lengths: tuple[int, int]) -> None: ...


class Pass:
    """One forward pass in one thread. If `observes`, it only records the calls, and all run full attention.

    `depth` is the depth of the stack where the pass was opened, if gradients are recorded.
    """

    def __init__(
        self, owner: Owner, plan: AttentionPlan, weights: Tensor | None, outer: Pass | None, *, observes: bool, frame: FrameType
    ) -> None:
        self.owner, self.plan, self.weights, self.outer, self.observes = owner, plan, weights, outer, observes
        self.with_gradients = torch.is_grad_enabled()
        self.depth = depth_of(frame) if self.with_gradients else 0
        self.contains_passes = False  # of other owners, which count their own calls
        self.split: Any = None  # of a model whose forward is called with a part of its arguments; its `group` splits rows
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


def open_pass(owner: Owner, plan: AttentionPlan, weights: Tensor | None, *, frame: FrameType, observes: bool = False) -> Pass:
    """Start intercepting this thread's attention calls for a new pass. Passes may nest; calls belong to the innermost one.

    Args:
        owner: It is notified of the calls.
        plan: How calls are computed.
        weights: Score weights of the pass's layout.
        frame: The frame that runs the calls.
        observes: Only notify the owner: all calls run full attention.
    """
    _replacement.acquire()
    opened = Pass(owner, plan, weights, _passes.current, observes=observes, frame=frame)
    _passes.current = opened
    return opened


def close_pass(finished: Pass) -> None:
    """End a pass; calls belong to the outer pass again, if there is one."""
    _passes.current = finished.outer
    if finished.outer is not None:
        finished.outer.contains_passes = True
    _replacement.release()


class _Replacement:
    """The replaced functions, with a count of open passes: the first pass of any thread replaces them, the last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self.torch_function: Any = F.scaled_dot_product_attention
        self.original = self.torch_function
        self._backends: dict[Any, Any] = {}
        self._parallel: Any = None  # the dispatcher's attention over several devices

    def acquire(self) -> None:
        with self._lock:
            # Already replaced in another thread, unless another library has restored a value that it saved during a pass.
            if F.scaled_dot_product_attention is not scaled_dot_product_attention:
                self.original = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = scaled_dot_product_attention
            if self._users == 0:
                registry, dispatcher = _registry(), _dispatcher()
                self._backends = dict(registry)
                registry.update({name: _backend(function) for name, function in registry.items()})
                self._parallel = getattr(dispatcher, _PARALLEL, None)
                if self._parallel is not None:
                    setattr(dispatcher, _PARALLEL, _parallel_attention(self._parallel))
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if F.scaled_dot_product_attention is scaled_dot_product_attention:
                    F.scaled_dot_product_attention = self.original
                registry, dispatcher = _registry(), _dispatcher()
                registry.update({n: f for n, f in self._backends.items() if registry.get(n) is _backend(f)})
                if self._parallel is not None and getattr(dispatcher, _PARALLEL, None) is _parallel_attention(self._parallel):
                    setattr(dispatcher, _PARALLEL, self._parallel)


_replacement = _Replacement()


def torch_function() -> Callable[..., Any]:
    """torch's own scaled_dot_product_attention."""
    function: Callable[..., Any] = _replacement.torch_function
    return function


def _dispatcher() -> Any:
    """The module of diffusers' attention dispatcher; None if it has not been imported."""
    return sys.modules.get("diffusers.models.attention_dispatch")


def _registry() -> dict[Any, Any]:
    """The dictionary of diffusers' attention backends; empty if its dispatcher has not been imported."""
    registry = getattr(getattr(_dispatcher(), "_AttentionBackendRegistry", None), "_backends", None)
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
        parallel = arguments.get("_parallel_config") is not None  # these are the tokens of one device: `_forward_op` sees those of all
        if not _passes.bypass and _passes.current is not None and not parallel:
            out = _intercept(
                arguments["query"], arguments["key"], arguments["value"], _four_axes(arguments.get("attn_mask")),
                arguments.get("dropout_p", 0.0), arguments.get("is_causal", False), arguments.get("scale"),
                arguments.get("enable_gqa", False), heads_first=False,
            )  # fmt: skip
            if out is not None:
                return out
        before, _passes.bypass = _passes.bypass, True
        try:
            return function(**arguments)
        finally:
            _passes.bypass = before

    return backend


def _four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask for the dispatcher, which may also be a mask of the keys `[B, S]`, as `[B, 1, 1, S]`."""
    return mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask


_PARALLEL = "_templated_context_parallel_attention"  # the function through which all backends compute attention over several devices


@functools.cache
def _parallel_attention(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement for the dispatcher's attention over several devices.

    It exchanges tokens for heads, calls `forward_op` for all tokens and a part of the heads, and exchanges them back; `backward_op` gives
    the gradients in between. These two are replaced. Each backend has its own, which need not call another function that is replaced.
    If the rows of the picture are split over the ranks, nothing of this runs.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False, *, forward_op: Callable[..., Any],
        backward_op: Callable[..., Any], **options: Any,
    ) -> Any:  # fmt: skip
        given = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse
        current_pass = _passes.current
        if current_pass is None or current_pass.plan.group is None:
            return function(*given, forward_op=_forward_op(forward_op), backward_op=_backward_op(backward_op), **options)
        how: Any = query, key, value, _four_axes(attn_mask), dropout_p, is_causal, enable_gqa
        match = None if return_lse else _match(current_pass, *how, heads_first=False)
        if match is None:
            return function(*given, forward_op=forward_op, backward_op=backward_op, **options)
        return match.attend(scale)

    return attention


def _forward_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement for a `forward_op`, `[B, S, H, D]` in and out."""

    def forward_op(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
        scale: float | None, enable_gqa: bool, return_lse: bool, **options: Any,
    ) -> Any:  # fmt: skip
        current_pass = _passes.current
        if current_pass is not None and not return_lse:  # `bypass` is set: this is inside a backend
            match = _match(current_pass, query, key, value, _four_axes(attn_mask), dropout_p, is_causal, enable_gqa, heads_first=False)
            if match is not None:
                if current_pass.with_gradients and options.get("_save_ctx", True):
                    ctx.save_for_backward(match.q, match.k, match.v)
                    ctx.windows = match.call, match.weights, scale
                return match.attend(scale)
        return function(ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, **options)

    return forward_op


def _backward_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement for a `backward_op`: the gradients of a call that was computed in windows, by computing it again."""

    def backward_op(ctx: Any, grad_out: Tensor, *more: Any, **options: Any) -> Any:
        windows = getattr(ctx, "windows", None)
        if windows is None:
            return function(ctx, grad_out, *more, **options)
        call, weights, scale = windows
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            return torch.autograd.grad(Match(call, q, k, v, weights).attend(scale), (q, k, v), grad_out)

    return backward_op


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
    match = _match(current_pass, q, k, v, mask, dropout_p, is_causal, enable_gqa, heads_first=heads_first)
    if match is None:
        return None
    out = match.attend(scale)
    return out.transpose(1, 2) if heads_first else out


def _match(
    current_pass: Pass,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    *,
    heads_first: bool,
) -> Match | None:
    """Match a call with the plan of a pass, and record it; None if it runs full attention."""
    match, why = current_pass.plan.match(
        q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa,
        heads_first=heads_first, weights=current_pass.weights,
    )  # fmt: skip
    if torch.compiler.is_dynamo_compiling():
        _record_in_graph(current_pass, match, why)
    else:
        axis = -2 if heads_first or q.ndim != 4 else 1
        _notify(current_pass, match, why, (q.shape[axis], k.shape[axis]))
    return None if current_pass.observes else match


def _record_in_graph(current_pass: Pass, match: Match | None, why: str) -> None:
    if current_pass.observes or (match is None and not why):
        current_pass.other_in_graph = True
    elif match is None:
        current_pass.skipped_in_graph = why
    else:
        current_pass.intercepted_in_graph = True


def _notify(current_pass: Pass, match: Match | None, why: str, lengths: tuple[int, int]) -> None:
    owner = current_pass.owner
    if current_pass.observes:
        owner.on_observed(current_pass, None if match is None else match.call, why, lengths)
    elif match is not None:
        owner.on_intercepted(current_pass, match.call)
    elif why:
        owner.on_skipped(current_pass, why, lengths)
    else:
        owner.on_other(current_pass, lengths)
