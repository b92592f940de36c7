"""FLOPs of a run that has been drawn: the calls of its denoiser and autoencoder are recorded, and then counted on the meta device.

Counted are matrix products and convolutions at 2 FLOPs per multiply-add, as in `scalediff.cost.flops`: of the denoiser, with attention by
formula, and of the autoencoder, in tiles where it ran in tiles. Bands of the autoencoder are counted as one piece, although some of its
layers run more than once there. Text encoders, ControlNets, upsamplers and filters are not counted. Blocks that a feature cache skips, and
padding of texts, are counted as if they had been computed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scalediff.cost.flops import _count_flops, forward_work
from scalediff.cost.stand_ins import runnable_on_meta
from scalediff.families import family_of
from scalediff.families.grid import UnknownLayout
from scalediff.patching.networks import denoiser_of, handle_of
from scalediff.patching.subclass import original_class


@dataclass
class _Calls:
    """Calls with arguments of the same shapes: how many, and the arguments of the first of them.

    Attributes:
        batch: Number of samples in a call.
        options: Keyword arguments of `forward_work`.
        attributes: What a stage has set in the denoiser.
    """

    count: int
    arguments: dict[str, Any]
    batch: int
    options: Mapping[str, Any]
    attributes: Mapping[str, Any]


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
            NotImplementedError: The denoiser belongs to no known family, its token layout is not known, or its code does not run on the
                meta device.
        """
        attention = total = 0.0
        try:
            denoiser, vae = _without_weights(denoiser_of(self.pipe)), _without_weights(self.pipe.vae)
            for calls in self._forwards.values():
                vars(denoiser).update(calls.attributes)
                one = forward_work(denoiser, calls.arguments, **calls.options)
                attention += calls.count * calls.batch * one.attention  # by formula, for one sample
                total += calls.count * (calls.batch * (one.attention + one.cross) + one.linear + one.convolution)
            for (name, shape, tiled), count in self._coded.items():
                if tiled:
                    vae.enable_tiling()
                given = torch.empty(shape, device="meta", dtype=vae.dtype)
                total += count * sum(_count_flops(functools.partial(getattr(vae, name), given)).values())
        except (RuntimeError, NotImplementedError, UnknownLayout) as error:
            raise NotImplementedError(f"the FLOPs of {type(self.pipe).__name__} cannot be counted: {error}") from error
        return attention, total

    def _record_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = list(inspect.signature(original_class(type(module)).forward).parameters)[1:]  # type: ignore[attr-defined]
        arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
        handle, options = handle_of(module), dict[str, Any](attention="full")
        if handle is not None:
            options = {"attention": handle.attention, "text_queries": handle.options.text_queries, "native": handle.window}
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(arguments))
        attributes = {name: getattr(module, name) for name in _set_by_a_stage(self.pipe, module)}
        key = tuple(options.items()), tuple(attributes.items()), shapes
        calls = _Calls(0, arguments, len(arguments[names[0]]), options, attributes)
        self._forwards.setdefault(key, calls).count += 1

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


def _set_by_a_stage(pipe: Any, denoiser: nn.Module) -> list[str]:
    """Names of the denoiser's attributes that the cascade sets for the size of a stage."""
    family = family_of(denoiser)
    if family is None or family.cascade is None:
        return []
    return [name.removeprefix("transformer.") for name in family.cascade.attributes(pipe, 1, 1) if name.startswith("transformer.")]


def _without_weights(network: Any) -> Any:
    """The same network on the meta device, in its own dtype."""
    kind: Any = original_class(type(network))
    if not hasattr(kind, "from_config"):
        raise NotImplementedError(f"{kind.__name__} has no from_config, by which it is built without weights")
    with torch.device("meta"):
        twin: Any = runnable_on_meta(kind.from_config(network.config))
    return nn.Module.to(twin, network.dtype).eval()
