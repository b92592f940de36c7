"""Feature caches in a network, of diffusers and of cache-dit: which there are, what they allow, and how they are emptied.

A cache skips blocks or attention modules in some steps, and reuses or extrapolates what they computed in earlier ones. diffusers keeps the
state of a cache in hooks of the modules, one registry for each module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from scalediff.settings import Jitter

# The caches by the names of their hooks' classes. A hook of another class belongs to a cache if it has a state.
_CACHES = {
    "FBCHeadBlockHook": "FirstBlockCache",
    "MagCacheHeadHook": "MagCache",
    "MagCacheBlockHook": "MagCache",
    "TaylorSeerCacheHook": "TaylorSeerCache",
    "PyramidAttentionBroadcastHook": "PyramidAttentionBroadcast",
    "FasterCacheDenoiserHook": "FasterCache",
    "FasterCacheBlockHook": "FasterCache",
    "SeaCacheRootHook": "SeaCache",
    "TextKVCacheTransformerHook": "TextKVCache",
    "TextKVCacheBlockHook": "TextKVCache",
}
_EXTRAPOLATING = {"TaylorSeerCache", "FasterCache", "SeaCache", "cache-dit"}  # cache-dit by its calibrators
_DECIDING = {"FirstBlockCache", "SeaCache", "cache-dit"}  # whether they skip depends on what they see
EXACT = {"TextKVCache"}  # they skip nothing that depends on the picture


def cache_hooks(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks of all caches in a network, each with the name of its cache."""
    for module in net.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            kind = type(hook).__name__
            if kind in _CACHES or hook._is_stateful:
                yield _CACHES.get(kind, kind), hook


def cache_names(net: nn.Module) -> list[str]:
    """The names of the caches in a network. cache-dit has no hooks: it replaces the blocks during a pass."""
    names = [name for name, _ in cache_hooks(net)]
    return list(dict.fromkeys(["cache-dit"] * ("_context_manager" in net.__dict__) + names))


def reset_caches(net: nn.Module) -> None:
    """Empty the caches of a network, so that its next pass computes everything."""
    for module in net.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)


@contextmanager
def empty_caches(net: Any) -> Iterator[None]:
    """Run passes of a network that neither see what its caches hold nor leave anything in them."""
    if not cache_names(net):
        yield
        return
    reset_caches(net)
    try:
        if hasattr(net, "cache_context"):
            with net.cache_context("scalediff"):
                yield
        else:
            yield
    finally:
        reset_caches(net)


def check_jitter(net: nn.Module, jitter: Jitter) -> None:
    """Check that no cache of a network combines features of patch grids that it must not combine.

    Raises:
        ValueError: A cache extrapolates and the patch grid moves, or a cache reuses features and the grid moves at random.
    """
    for name in cache_names(net) if jitter != "none" else ():
        if name in _EXTRAPOLATING:
            raise ValueError(f"{name} extrapolates from steps that must have the same patch grid: jitter must be 'none', got {jitter=}")
        if jitter == "random" and name not in EXACT:
            raise ValueError(f"{name} reuses what earlier steps computed: jitter must be 'none' or 'alternate', got {jitter=}")


def check_ranks(net: nn.Module) -> None:
    """Check that no cache of a network lets each rank decide by its own tokens whether it skips attention, for which the others would wait.

    Raises:
        NotImplementedError: A cache does.
    """
    for name in cache_names(net):
        if name in _DECIDING:
            raise NotImplementedError(
                f"mesh= and context parallelism do not support caches that look at a rank's own tokens to skip computations, got {name}"
            )
