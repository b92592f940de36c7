"""Peak memory of a computation on the meta device, in bytes of live tensors."""

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
    """Peak bytes of live tensors that a computation on the meta device allocates, not counting its inputs.

    Tensors that the code creates on other devices, such as position tables on the CPU, are counted too.
    """
    tally = _Tally()
    with torch.no_grad(), FusedAttention(), tally:
        run()
    return tally.peak


class FusedAttention(TorchFunctionMode):
    """Replaces attention by an allocation of its output, as a fused kernel would."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query, value = args[0] if args else kwargs["query"], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1], device="meta")
        return function(*args, **kwargs)


class _Tally(TorchDispatchMode):
    """Counts the bytes of storages created while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in leaves:
            self._count(tensor.untyped_storage(), is_new=False)  # inputs such as weights, because the result may be a view of them
        on_meta = [x.is_meta for x in leaves]
        if any(on_meta):
            if not all(on_meta):
                args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
            if kwargs.get("device") is not None:  # the code wants to move a tensor without values to a real device
                kwargs = {**kwargs, "device": torch.device("meta")}
        out = function(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), is_new=True)
        return out

    def _count(self, storage: torch.UntypedStorage, *, is_new: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if is_new else 0
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
