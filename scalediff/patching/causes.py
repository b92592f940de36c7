"""Why no attention call of a model was replaced, as text for an error: which calls there were, and what else computes attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from scalediff.patching.record import ModuleCalls

_SWITCH = "switch the model to F.scaled_dot_product_attention"
_SOFTMAX = "a softmax of its own"
_OTHER_FUNCTIONS = {
    "memory_efficient_attention": f"xformers' memory_efficient_attention: {_SWITCH}",
    "flash_attn_func": f"flash_attn's flash_attn_func: {_SWITCH}",
    "flash_attn_qkvpacked_func": f"flash_attn's flash_attn_qkvpacked_func: {_SWITCH}",
    "flash_attn_varlen_func": f"flash_attn's flash_attn_varlen_func: {_SWITCH}",
    "flash_attn_varlen_qkvpacked_func": f"flash_attn's flash_attn_varlen_qkvpacked_func: {_SWITCH}",
    "flex_attention": f"flex_attention: {_SWITCH}",
    "_scaled_dot_product_flash_attention": f"an operator of torch.ops.aten: {_SWITCH}",
    "_scaled_dot_product_efficient_attention": f"an operator of torch.ops.aten: {_SWITCH}",
    "softmax": f"{_SOFTMAX}: {_SWITCH}",
}


def describe_calls(calls: Mapping[str, ModuleCalls], *, most: int = 3) -> str:
    """The calls of scaled_dot_product_attention in a pass: their lengths and their modules."""
    seen: dict[tuple[int, int], list[str]] = {}
    for name, of_module in calls.items():
        for lengths in of_module.lengths:
            seen.setdefault(lengths, []).append(name)
    if not seen:
        return "scaled_dot_product_attention was not called"
    parts = [
        f"{queries} queries and {keys} keys by {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for (queries, keys), names in list(seen.items())[:most]
    ]
    more = f", and {len(seen) - most} other lengths" if len(seen) > most else ""
    return f"scaled_dot_product_attention was called with {'; '.join(parts)}{more}"


def other_attention(model: nn.Module, original: Callable[..., Any], *, certain: bool = False) -> list[str]:
    """What in a model computes attention without calling `F.scaled_dot_product_attention` by that name, and what to switch.

    Args:
        model: The model.
        original: torch's scaled_dot_product_attention.
        certain: Leave out what may be something else than attention: a softmax.
    """
    found: dict[str, None] = {}
    classes: dict[type, Any] = {type(module): module for module in model.modules()}
    classes |= {type(one): one for module in model.modules() if (one := getattr(module, "processor", None)) is not None}
    for cls, module in classes.items():
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            if not module.training and torch.backends.mha.get_fastpath_enabled():
                found[f"the fast path of nn.{cls.__name__}: torch.backends.mha.set_fastpath_enabled(False)"] = None
            elif isinstance(module, nn.MultiheadAttention):
                found["nn.MultiheadAttention: call it with need_weights=False"] = None
        if cls.__module__.startswith("torch.nn."):
            continue
        for function in _functions(cls):
            names, known = function.__code__.co_names, function.__globals__
            for name in names:
                if name in _OTHER_FUNCTIONS:
                    found[f"{_OTHER_FUNCTIONS[name]} ({cls.__name__})"] = None
                elif known.get(name) is original:
                    found[f"{name}, imported by name: call it as F.{original.__name__} ({cls.__name__})"] = None
    return [cause for cause in found if not (certain and cause.startswith(_SOFTMAX))]


def _functions(cls: type) -> Iterator[Any]:
    """The methods of a class and the functions of its source file that they name."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for method in vars(base).values():
            if not inspect.isfunction(method) or method.__name__.startswith("set_"):  # these change a module and compute nothing
                continue
            yield method
            for name in method.__code__.co_names:
                function = method.__globals__.get(name)
                if inspect.isfunction(function) and function.__module__ == base.__module__:
                    yield function
