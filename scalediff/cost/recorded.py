"""FLOPs of a run that has been drawn: the calls of its denoiser and autoencoder are recorded, and then counted on the meta device.

Counted are matrix products and convolutions at 2 FLOPs per multiply-add, as in `scalediff.cost.flops`: of the denoiser, with attention by
formula, and of the autoencoder, in tiles where it ran in tiles. Bands of the autoencoder are counted as one piece, although some of its
layers run more than once there. Text encoders, ControlNets, upsamplers and filters are not counted. Blocks that a feature cache skips are
counted as if they had been computed.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from scalediff.cost.flops import _count_flops, forward_work, set_attributes
from scalediff.cost.stand_ins import runnable_on_meta
from scalediff.families import family_of
from scalediff.patching.networks import denoiser_of, handle_of
from scalediff.patching.subclass import original_class
from scalediff.settings import Attention


@dataclass
class _Calls:
    """Calls with arguments of the same shapes: how many, the arguments of the first of them, and attributes that the cascade sets."""

    count: int
    arguments: Mapping[str, Any]
    attention: Attention = "full"
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class RecordedWork:
    """The calls of a run; `recorded_work` fills it, `tflops` counts them.

    Attributes:
        pipe: The pipeline.
    """

    pipe: Any
    _forwards: dict[Any, _Calls] = field(default_factory=dict)
    _coded: dict[tuple[str, tuple[int, ...], bool], int] = field(default_factory=dict)

    def tflops(self) -> float:
        """TFLOPs of all recorded calls; raises as `count`."""
        return self.count()[1]

    def count(self) -> tuple[float, float]:
        """TFLOPs of the denoiser's self-attention, and of all recorded calls.

        Raises:
            NotImplementedError: The denoiser's code does not run on the meta device.
        """
        denoiser, vae = _without_weights(denoiser_of(self.pipe)), _without_weights(self.pipe.vae)
        attention = total = 0.0
        try:
            for calls in self._forwards.values():
                batch = _batch(calls.arguments)
                set_attributes(denoiser, calls.attributes)
                one = forward_work(denoiser, _first_sample(dict(calls.arguments), batch), attention=calls.attention)
                attention += calls.count * batch * one.attention
                total += calls.count * batch * sum(one)
            for (name, shape, tiled), count in self._coded.items():
                if tiled:
                    vae.enable_tiling()
                given = torch.empty(shape, device="meta", dtype=vae.dtype)
                total += count * sum(_count_flops(functools.partial(getattr(vae, name), given)).values())
        except (RuntimeError, NotImplementedError) as error:
            raise NotImplementedError(f"the FLOPs of {type(self.pipe).__name__} cannot be counted: {error}") from error
        return attention, total

    def _record_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = list(inspect.signature(original_class(type(module)).forward).parameters)[1:]  # type: ignore[attr-defined]
        arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
        handle = handle_of(module)
        attention: Attention = "full" if handle is None else handle.attention
        key = attention, tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(arguments))
        family = family_of(module)
        names = list(family.cascade.attributes(self.pipe, 1, 1)) if family is not None and family.cascade is not None else []
        attributes = {name: operator.attrgetter(name)(self.pipe) for name in names}
        self._forwards.setdefault(key, _Calls(0, arguments, attention, attributes)).count += 1

    def _recording(self, name: str) -> Callable[..., Any]:
        vae = self.pipe.vae
        call = getattr(vae, name)

        def record(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = name, tuple(x.shape), bool(getattr(vae, "use_tiling", False))
            self._coded[key] = self._coded.get(key, 0) + 1
            return call(x, *args, **kwargs)

        return record


@contextmanager
def recorded_work(pipe: Any) -> Iterator[RecordedWork]:
    """Record the calls of a pipeline's denoiser and autoencoder; the pipeline is restored on exit."""
    work = RecordedWork(pipe)
    remover = denoiser_of(pipe).register_forward_pre_hook(work._record_forward, with_kwargs=True)
    wrapped = {name: work._recording(name) for name in ("decode", "encode")}
    pipe.vae.__dict__.update(wrapped)
    try:
        yield work
    finally:
        for name in wrapped:
            del pipe.vae.__dict__[name]
        remover.remove()


def _without_weights(network: Any) -> Any:
    """The same network on the meta device, in its own dtype."""
    with torch.device("meta"):
        twin: Any = original_class(type(network)).from_config(network.config)  # type: ignore[attr-defined]
    return runnable_on_meta(nn.Module.to(twin, network.dtype).eval())


def _batch(arguments: Mapping[str, Any]) -> int:
    sample: Any = arguments.get("sample", arguments.get("hidden_states"))
    return len(sample)


def _first_sample(arguments: dict[str, Any], batch: int) -> dict[str, Any]:
    """The arguments for the first of the batch's samples: the count of one sample is that of any."""
    if batch == 1:
        return arguments
    found: dict[str, Any] = tree_map_only(Tensor, lambda x: x[:1] if x.ndim and len(x) == batch else x, arguments)
    return found
