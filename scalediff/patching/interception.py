"""The swap: while a patched denoiser runs, its attention calls come here first.

Two places lead from a model to attention: `torch.nn.functional.scaled_dot_product_attention`, and the registry of backends of
diffusers' dispatcher, whose entries other than torch's never reach that function. Both are replaced only while a patched
denoiser runs, and even then another thread, another model or a call that is not image self-attention reaches the original.

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

from scalediff.patching.plan import Call, Plan, got, with_weights


class Owner(Protocol):
    """Whose pass it is, and who hears of its calls; nothing is said from inside a compiled graph."""

    def took(self, entered: Pass, call: Call) -> None: ...

    def left(self, entered: Pass, why: str) -> None: ...


class Pass:
    """One forward pass of one patched denoiser in one thread."""

    def __init__(self, owner: Owner, plan: Plan, weights: Tensor | None, around: Pass | None) -> None:
        self.owner, self.plan, self.weights, self.around = owner, plan, weights, around
        self.with_gradients = torch.is_grad_enabled()
        self.taken = 0
        self.left: dict[str, str] = {}  # callers that were not taken, and why
        # Inside a compiled graph nothing is counted and no module is known: there remains that a call was taken, and why one was not.
        self.traced = False
        self.untaken = ""


class _Passes(threading.local):
    def __init__(self) -> None:  # once in every thread: attributes that came later would be news to a compiled graph
        self.current: Pass | None = None
        self.through = False  # a call is on its way to whatever stood in our place


_passes = _Passes()


def current() -> Pass | None:
    """The pass that this thread is in."""
    return _passes.current


def open_pass(owner: Owner, plan: Plan, weights: Tensor | None) -> Pass:
    """From here on this thread's attention calls belong to a new pass; passes may nest, and the inner one counts.

    The weights are those of the pass's layout.
    """
    _swap.acquire()
    entered = Pass(owner, plan, weights, _passes.current)
    _passes.current = entered
    return entered


def close_pass(entered: Pass) -> None:
    """The calls belong to the pass around this one again, or to nobody."""
    _passes.current = entered.around
    _swap.release()


class _Swap:
    """The replaced places, counted: the first pass in any thread puts us in, the last one takes us out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self.first: Any = F.scaled_dot_product_attention
        self.original = self.first
        self._backends: dict[Any, Any] = {}

    def acquire(self) -> None:
        with self._lock:
            if F.scaled_dot_product_attention is not scaled_dot_product_attention:  # who saved it in a pass may have put it back
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


_swap = _Swap()


def _registry() -> dict[Any, Any]:
    """diffusers' backends by name, once its dispatcher has been imported; the dictionary itself."""
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
    """Stands in for `F.scaled_dot_product_attention`: same contract, `[B, H, S, D]` in and out."""
    if not _passes.through and _passes.current is not None:
        out = _take(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, heads_first=True)
        if out is not None:
            return out
    options = {"enable_gqa": True} if enable_gqa else {}
    # Whoever wrapped the attribute during a pass, and stayed, may lead back here: then it is torch's own turn.
    target = _swap.first if _passes.through else _swap.original
    before, _passes.through = _passes.through, True
    try:
        result: Tensor = target(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    finally:
        _passes.through = before
    return result


@functools.cache
def _backend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Stands in for one backend of diffusers' dispatcher, `[B, S, H, D]` in and out; it is called with keywords alone."""

    def backend(**arguments: Any) -> Tensor:
        if not _passes.through and _passes.current is not None and arguments.get("_parallel_config") is None:
            mask = arguments.get("attn_mask")
            if mask is not None and mask.ndim == 2:  # of the keys, for the dispatcher
                mask = mask[:, None, None, :]
            out = _take(
                arguments["query"], arguments["key"], arguments["value"], mask, arguments.get("dropout_p", 0.0),
                arguments.get("is_causal", False), arguments.get("scale"), arguments.get("enable_gqa", False), heads_first=False,
            )  # fmt: skip
            if out is not None:
                return out
        before, _passes.through = _passes.through, True
        try:
            return function(**arguments)
        finally:
            _passes.through = before

    return backend


def _take(
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
    """The call's result in the pass's plan, or None where it is none of the plan's calls."""
    entered = _passes.current
    if entered is None:
        return None
    refusal, plan = "", entered.plan
    if q.ndim != 4:
        refusal = "q, k and v must be [B, H, S, D]" + got(q)
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v)) if heads_first else (q, k, v)
        call = plan.call(q.shape[1], k.shape[1])
        if call is None:
            refusal = plan.unexpected(q.shape[1], k.shape[1])
            if not refusal:
                return None  # cross-attention, or text alone
        else:
            told = mask is None or plan.masked or says_nothing(mask)  # the plan knows what the mask says
            hidden = None if told or mask is None else key_mask(mask, k)
            refusal = _refusal(entered, call, q, k, v, mask, dropout_p, is_causal, enable_gqa, readable=told or hidden is not None)
            if not refusal:
                if torch.compiler.is_compiling():
                    entered.traced = True
                else:
                    entered.owner.took(entered, call)
                weights = None if entered.weights is None else (entered.weights, entered.weights)
                if hidden is not None:
                    weights = torch.ones_like(hidden), hidden
                out = _attend(call, *_of_one_dtype(q, k, v), scale, weights)
                return out.transpose(1, 2) if heads_first else out
    if torch.compiler.is_compiling():
        entered.untaken = refusal
    else:
        entered.owner.left(entered, refusal)
    return None


def _of_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast normalised queries and keys may be fp32 beside values of 16 bits: torch's attention casts all of them."""
    if q.dtype == k.dtype == v.dtype:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float | None, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    if weights is None:
        return call.attend(q, k, v, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_queries, of_keys = (x.expand(q.shape[0], -1) for x in weights)
    if of_queries.shape[1] != q.shape[1]:  # of image queries that see text keys
        of_queries = of_queries[:, :1].expand(-1, q.shape[1])
    return call.attend(*with_weights(q, k, v, of_queries, of_keys, scale), scale)[..., : q.shape[-1]]


_HIDDEN = -1e4  # added to a score: nothing is left of its exponential, and fp16 can hold it


def key_mask(mask: Tensor, k: Tensor) -> Tensor | None:
    """`[B or 1, S]` to be added to the scores, of a mask `[B or 1, 1, 1, S]` that hides keys from all queries alike; None of others."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, k.shape[1]):
        return None
    return torch.where(mask[:, 0, 0], 0.0, _HIDDEN)


def _refusal(
    entered: Pass,
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    *,
    readable: bool,
) -> str:
    """Why a call of a known length cannot be taken; empty where it can."""
    if is_causal:
        return "causal attention has no windows"
    if dropout_p != 0.0:
        return "attention with dropout is not windowed"
    if k.shape != v.shape or (k.shape[2] != q.shape[2] and not enable_gqa) or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        return "q, k and v must be of one shape but for their lengths" + got(q, k, v)
    if call.real and len(call.real) != q.shape[0]:
        return f"the text lengths are those of {len(call.real)} samples" + got(q)
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return "q, k and v must be of one dtype" + got(q, k, v)
    if entered.weights is not None and entered.weights.shape != q.shape[:2]:
        return "weights of the scores must be [B, S]" + got(entered.weights, q)
    if call.padded and mask is None:
        return f"text of {call.real} tokens is padded, and there is no mask"
    if mask is not None and not readable:
        return "a mask that may hold anything is not windowed" + got(mask)
    return ""


_READABLE = 1 << 20  # different elements of a mask that is looked through at every call; a larger one is not


def says_nothing(mask: Tensor) -> bool:
    """Whether a mask is one value all over: all True, or one number added to every score. Inside a compiled graph nobody can look."""
    if torch.compiler.is_compiling():
        return False
    distinct = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]  # an expanded axis repeats itself
    if distinct.numel() > _READABLE:
        return False
    return bool(distinct.all()) if mask.dtype == torch.bool else bool((distinct == distinct.flatten()[0]).all())
