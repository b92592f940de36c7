"""How a run borrows a pipeline: everything is given back as it was found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scalediff.cascade.pipeline import cascade_of, native_size
from scalediff.patching.handle import Handle
from scalediff.patching.hooks import patch_networks
from scalediff.patching.networks import handle_of, networks_of
from scalediff.patching.subclass import is_patched
from scalediff.settings import Attention, Settings


@contextmanager
def kept(pipe: Any) -> Iterator[None]:
    """Give back a pipeline's scheduler, its bar and the size that it thinks it was trained at."""
    scheduler, bar = pipe.scheduler, pipe.__dict__.get("_progress_bar_config")
    trained_size = cascade_of(pipe).trained_size
    pixels = getattr(pipe, trained_size) if trained_size else None
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        if trained_size:
            setattr(pipe, trained_size, pixels)
        if bar is not None:
            pipe._progress_bar_config = bar
        else:
            pipe.__dict__.pop("_progress_bar_config", None)


@contextmanager
def borrowed(pipe: Any, settings: Settings, vae_attention: Attention = "full") -> Iterator[Handle | None]:
    """Give the pipeline back as it was; inside, the handle whose attention the stages switch (None: nothing is patched).

    A pipeline that is not patched gets its denoiser patched for the run, before anything is drawn, so that a model with
    nothing to patch is known at once.
    """
    handle = handle_of(pipe)
    with ExitStack() as undo:
        undo.enter_context(kept(pipe))
        if handle is None and settings.attention == "npa":
            nets = networks_of(pipe)  # ControlNets that the caller has patched by themselves stay as they are
            whole = pipe if len(nets) > 1 and not any(map(is_patched, nets)) else nets[0]
            handle = undo.enter_context(patch_networks(whole, jitter=settings.jitter or "none"))
        if vae_attention not in get_args(Attention):
            raise ValueError(f"vae_attention must be one of {', '.join(get_args(Attention))}, got {vae_attention=}")
        if vae_attention == "npa":
            undo.enter_context(_windowed_vae(pipe))
        attention = handle.attention if handle is not None else None
        jitter = handle.jitter if handle is not None else None
        try:
            if handle is not None and settings.jitter is not None:
                handle.jitter = settings.jitter
            yield handle
        finally:
            if handle is not None and attention is not None and jitter is not None:
                handle.attention, handle.jitter = attention, jitter


@contextmanager
def _windowed_vae(pipe: Any) -> Iterator[None]:
    """Neighborhood patch attention in the middle of both halves of the autoencoder, windows as large as the native latents."""
    height, width = native_size(pipe)
    factor = pipe.vae_scale_factor
    window = height // factor, width // factor
    parts = [(part, patch) for part, patch in ((pipe.vae.encoder, factor), (pipe.vae.decoder, 1)) if _attends(part)]
    if not parts:
        raise NotImplementedError(f"vae_attention='npa' is for autoencoders of pictures with attention, got {type(pipe.vae).__name__}")
    with ExitStack() as undo:
        for part, patch in parts:
            undo.enter_context(patch_networks(part, patch_size=patch, window=window))
        yield


def _attends(part: nn.Module) -> bool:
    return any(hasattr(module, "to_q") for module in part.modules())


DenoiserInterceptor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_INTERCEPTOR = "_scalediff_respond"


@contextmanager
def intercept_denoiser(pipe: Any, respond: DenoiserInterceptor) -> Iterator[None]:
    """Within, every call that the pipeline makes of its denoiser is `respond(the call as it was, args, kwargs)`.

    The denoiser gets a class with another call for that long, on top of whatever it is: patched, compiled, offloaded. What responds is
    no part of a compiled graph.
    """
    owner: Any = next(part for name in ("unet", "transformer") if isinstance(part := getattr(pipe, name, None), nn.Module))
    cls: Any = type(owner)
    owner.__dict__[_INTERCEPTOR] = respond
    owner.__class__ = _intercepting_subclass(cls)
    try:
        yield
    finally:
        owner.__class__ = cls
        del owner.__dict__[_INTERCEPTOR]


@functools.cache  # a graph that was compiled for the class serves the next run
def _intercepting_subclass(cls: type) -> type:
    forward: Any = cls.__call__

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_INTERCEPTOR](functools.partial(forward, self), args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


@contextmanager
def guidance_in_halves(pipe: Any, *, unguided_from: int | None, split: bool) -> Iterator[None]:
    """Change how a batch that classifier-free guidance has doubled is run; a model that is guided otherwise is left alone.

    Args:
        pipe: The pipeline.
        unguided_from: From this model call of its scheduler on only the half with the prompt is run. The other half of the output is a
            copy: whatever the guidance scale, `u + s (c - u)` is then c.
        split: The two halves run one after the other, with half the memory.
    """
    conditional = cascade_of(pipe).conditional
    if not conditional or (unguided_from is None and not split):
        yield
        return

    def respond(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = sample_of(args, kwargs).shape[0]
        first, second = slice(0, batch // 2), slice(batch // 2, None)

        def run(half: slice) -> Any:
            cut = functools.partial(_cut, batch=batch, kept=half)
            return forward(*_mapped(args, cut), **_mapped(kwargs, cut))

        if batch % 2 or not pipe.do_classifier_free_guidance:
            return forward(*args, **kwargs)
        if unguided_from is not None and pipe.scheduler.calls_done >= unguided_from:
            output = run(second if conditional == "last" else first)
            return _joined(output, output)
        return _joined(run(first), run(second)) if split else forward(*args, **kwargs)

    with intercept_denoiser(pipe, respond):
        yield


def sample_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    sample: Tensor = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    return sample


def _cut(x: Tensor, *, batch: int, kept: slice) -> Tensor:
    return x[kept] if x.ndim and x.shape[0] == batch else x


def _joined(first: Any, second: Any) -> Any:
    """Two nests of tensors as one, with the batch of both."""
    others = iter(x for x in tree_leaves(second) if isinstance(x, Tensor))
    return _mapped(first, lambda x: torch.cat([x, next(others)]))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and mappings (a model's output is one) with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(one, change) for one in value)
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    if isinstance(value, Mapping):
        changed = {name: _mapped(one, change) for name, one in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    return value


@contextmanager
def tiled(vae: Any, *, on: bool | None) -> Iterator[None]:
    """With the autoencoder's tiling switched on or off; None leaves it as it is."""
    before = getattr(vae, "use_tiling", False)
    if on is None or on == before:
        yield
        return
    (vae.enable_tiling if on else vae.disable_tiling)()
    try:
        yield
    finally:
        (vae.disable_tiling if on else vae.enable_tiling)()
