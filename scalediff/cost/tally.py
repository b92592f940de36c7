"""Peak memory of a computation on the meta device, in bytes of live tensors, and its FLOPs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
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
    with torch.no_grad(), FusedAttention(), KnownResults(), tally:
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


class KnownResults(TorchDispatchMode):
    """Repeats an operator on the meta device without running it: its kernels there are Python, and most layers of a network are alike.

    The first call with such shapes, strides and dtypes runs; later ones get new tensors like those that it returned. Operators that return
    views, or write to an argument, always run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = function, _signature(args), _signature(kwargs)
        if key in self._known:
            return tree_map_only(Tensor, _like, self._known[key])
        out = function(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        if inputs and not function._schema.is_mutable and _all_new(tree_leaves(out), inputs):
            self._known[key] = tree_map_only(Tensor, _like, out)
        return out


def _signature(value: Any) -> Any:
    """What the result on the meta device depends on, hashable."""
    if isinstance(value, Tensor):
        return value.device, value.dtype, value.shape, value.stride(), value.is_conj(), value.is_neg()
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(part)) for name, part in value.items())
    return type(value), value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an operator, which may be in lists."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for part in parts for x in _tensors(part)]


def _all_new(outputs: list[Any], inputs: list[Tensor]) -> bool:
    """Whether the outputs are tensors on the meta device, each in a storage of its own and of its own size."""
    if not all(isinstance(x, Tensor) and x.is_meta for x in (*outputs, *inputs)):
        return False
    storages = [x.untyped_storage() for x in outputs]
    taken = {x.untyped_storage()._cdata for x in inputs}
    distinct = len(taken | {storage._cdata for storage in storages}) == len(taken) + len(storages)
    whole = all(_like(x).untyped_storage().nbytes() == storage.nbytes() for x, storage in zip(outputs, storages, strict=True))
    return distinct and whole and not any(x.is_conj() or x.is_neg() for x in outputs)


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Tally(TorchDispatchMode):
    """Counts the bytes of storages created while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = _tensors((args, kwargs))
        for tensor in leaves:
            self._count(tensor.untyped_storage(), is_new=False)  # inputs such as weights, because the result may be a view of them
        args, kwargs = _on_one_device(function, args, kwargs, leaves)
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
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


class OneDevice(TorchDispatchMode):
    """Lets code mix tensors on the meta device with real ones, such as masks and positions, and move them to a real device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _on_one_device(function, args, kwargs or {}, _tensors((args, kwargs or {})))
        return function(*args, **kwargs)


class Flops(OneDevice):
    """Counts the FLOPs of every operator beside that, by torch's formulas.

    `formulas` are those of `torch.utils.flop_counter`, whose own mode also counts them for every module and takes as long as the run.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()
        self._formulas = formulas
        self.by_operator: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, function._overloadpacket
        if operator not in self._formulas and _is_composite(function):
            with self:
                return function.decompose(*args, **kwargs)
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if operator in self._formulas:
            flops = self._formulas[operator](*args, **kwargs, out_val=out)
            self.by_operator[str(operator)] = self.by_operator.get(str(operator), 0) + flops
        return out


@functools.cache
def _is_composite(function: Any) -> bool:
    """Whether an operator is written in others, which a mode sees in its place unless `torch.inference_mode` is on."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def _on_one_device(function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> tuple[Any, dict[str, Any]]:
    """The arguments of an operator, on the meta device if one of its tensors is there."""
    on_meta = [x.is_meta for x in tensors]
    if not any(on_meta):
        return args, kwargs
    if not all(on_meta):
        if function is torch.ops.aten.index.Tensor:
            args = args[0], _positions(args[1])
        args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
    if kwargs.get("device") is not None:  # the code wants to move a tensor without values to a real device
        kwargs = {**kwargs, "device": torch.device("meta")}
    return args, kwargs


def _positions(indices: Any) -> list[Any]:
    """Indices of a tensor, with masks of known values as the positions that they choose: the meta device could not tell how many."""
    known = [x.nonzero(as_tuple=True) if isinstance(x, Tensor) and x.dtype == torch.bool and not x.is_meta else (x,) for x in indices]
    return [x for part in known for x in part]


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else _like(x)
