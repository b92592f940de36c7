"""The bytes that a computation holds at its worst moment, counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that are alive at the worst moment of a computation on the meta device, beside those that it is given.

    Whole numbers, vectors and tables of positions are computed on the CPU, where the code looks at them.
    """
    tally = _Tally()
    with torch.no_grad(), _Fused(), tally:
        run()
    return tally.peak


class _Fused(TorchFunctionMode):
    """Attention that holds its output alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query, value = args[0] if args else kwargs["query"], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1], device="meta")
        return function(*args, **kwargs)


class _Tally(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, until they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in leaves:
            self._count(tensor.untyped_storage(), made=False)  # weights, of which the result may be a view
        if any(x.is_meta for x in leaves):
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs or {}))
            if kwargs.get("device") is not None:  # a table that the twin has without values, and would take to a device
                kwargs = {**kwargs, "device": torch.device("meta")}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), made=True)
        return out

    def _count(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
