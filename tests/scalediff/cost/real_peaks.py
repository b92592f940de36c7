"""The tally of live bytes where tensors have values: what estimates on the meta device are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from scalediff.cost import tally


class RealTally(tally._Tally):
    """The same tally of tensors that have values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), is_new=False)
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), is_new=True)
        return out


class RealAttention(TorchFunctionMode):
    """Attention that holds its output alone, of zeros."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, value = args[0] if args else kwargs["query"], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        return function(*args, **kwargs)


def real_peak_of(run: Callable[[], Any]) -> int:
    tally = RealTally()
    with torch.no_grad(), RealAttention(), tally:
        run()
    return tally.peak
