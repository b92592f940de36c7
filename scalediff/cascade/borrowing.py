"""Context managers that change a pipeline for a run and restore it afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scalediff.cascade.pipeline import cascade_of, latent_size, native_size, pixels_per_latent, wrap_of
from scalediff.cascade.ranks import check_ranks
from scalediff.cascade.streaming import is_streamed, stream_obstacle, streamed
from scalediff.patching.circular import wrapped
from scalediff.patching.handle import Handle
from scalediff.patching.networks import changes_picture, handle_of, networks_of, padding_parts
from scalediff.patching.patch_networks import patch_networks
from scalediff.patching.subclass import is_patched
from scalediff.settings import Attention, Settings


@contextmanager
def restored_pipeline(pipe: Any) -> Iterator[None]:
    """Restore a pipeline's scheduler, progress bar and trained size on exit."""
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
def borrowed(pipe: Any, settings: Settings, vae_attention: Attention = "full", *, mesh: Any = None) -> Iterator[Handle | None]:
    """Prepare a pipeline for a run of the cascade, and restore it on exit.

    Yields the handle by which the stages switch the attention, or None if nothing is patched. A pipeline that is not patched is patched
    here for the run, so that a model with nothing to patch raises its error before anything is computed; with a mesh, it is split too.

    Raises:
        ValueError: There is a mesh, and the pipeline is patched already.
    """
    handle, wrap = handle_of(pipe), wrap_of(pipe, settings)
    if mesh is not None and handle is not None:
        raise ValueError("mesh= of a run is for a pipeline that is not patched: pass it to patch_model, got a patched pipeline")
    with ExitStack() as undo:
        undo.enter_context(restored_pipeline(pipe))
        if handle is None and (settings.attention == "npa" or mesh is not None):
            nets = networks_of(pipe)  # ControlNets that the caller patched separately are left alone
            whole = pipe if len(nets) > 1 and not any(map(is_patched, nets)) else nets[0]
            if mesh is not None:
                check_ranks(nets[0], mesh, {"jitter": settings.jitter})
            handle = undo.enter_context(patch_networks(whole, jitter=settings.jitter or "none", mesh=mesh))
        _wrap(pipe, handle, wrap, undo)
        if vae_attention == "npa":
            undo.enter_context(_windowed_vae(pipe, wrap))
        attention = handle.attention if handle is not None else None
        jitter = handle.jitter if handle is not None else None
        try:
            if handle is not None and settings.jitter is not None:
                handle.jitter = settings.jitter
            yield handle
        finally:
            if handle is not None and attention is not None and jitter is not None:
                handle.attention, handle.jitter = attention, jitter


def _wrap(pipe: Any, handle: Handle | None, wrap: tuple[bool, bool], undo: ExitStack) -> None:
    """Let windows and convolutions continue on the other side along these axes, or along none, until `undo` closes."""
    before = handle.wrap if handle is not None else (False, False)
    if handle is not None and before != wrap:
        undo.callback(handle.wrap_attention, before)
        handle.wrap_attention(wrap)
    if any(wrap) or any(before):  # the pipeline's own parts: the handle's may be others, as an autoencoder that was replaced since
        undo.enter_context(wrapped(padding_parts(pipe), wrap))


@contextmanager
def _windowed_vae(pipe: Any, wrap: tuple[bool, bool]) -> Iterator[None]:
    """Use neighborhood patch attention in the mid blocks of the autoencoder, with the native latent size as the window."""
    factor, window = pixels_per_latent(pipe), latent_size(pipe, native_size(pipe))
    parts = [(part, patch) for part, patch in ((pipe.vae.encoder, factor), (pipe.vae.decoder, 1)) if _attends(part)]
    if not parts:
        raise NotImplementedError(f"vae_attention='npa' needs an image autoencoder with attention, got {type(pipe.vae).__name__}")
    with ExitStack() as undo:
        for part, patch in parts:
            handle = undo.enter_context(patch_networks(part, patch_size=patch, window=window))
            undo.callback(handle.wrap_attention, handle.wrap)
            handle.wrap_attention(wrap)
        yield


def _attends(part: nn.Module) -> bool:
    return any(hasattr(module, "to_q") for module in part.modules())


# Called in place of the denoiser, with the original call, its positional and its keyword arguments.
DenoiserInterceptor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_INTERCEPTOR = "_scalediff_interceptor"


@contextmanager
def intercept_denoiser(pipe: Any, interceptor: DenoiserInterceptor) -> Iterator[None]:
    """Replace every call of the pipeline's denoiser by `interceptor(original_call, args, kwargs)`.

    The denoiser temporarily gets a subclass of its class, which also works if it is patched, compiled or offloaded. The interceptor is
    never part of a compiled graph.
    """
    owner: Any = next(part for name in ("unet", "transformer") if isinstance(part := getattr(pipe, name, None), nn.Module))
    cls: Any = type(owner)
    owner.__dict__[_INTERCEPTOR] = interceptor
    owner.__class__ = _intercepting_subclass(cls)
    try:
        yield
    finally:
        owner.__class__ = cls
        del owner.__dict__[_INTERCEPTOR]


@functools.cache  # torch.compile can then reuse a graph in the next run
def _intercepting_subclass(cls: type) -> type:
    forward: Any = cls.__call__

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_INTERCEPTOR](functools.partial(forward, self), args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def runs_in_halves(pipe: Any, settings: Settings, *, split: bool) -> bool:
    """Whether some denoiser calls of a run have only half of the batch that classifier-free guidance has doubled.

    Raises:
        NotImplementedError: The batch has a third part, for perturbed-attention guidance.
    """
    until = settings.guidance_until
    halves = bool(cascade_of(pipe).conditional) and (split or min(until if isinstance(until, tuple) else (until,)) < 1)
    if halves and hasattr(type(pipe), "do_perturbed_attention_guidance"):
        raise NotImplementedError(
            f"the batch of {type(pipe).__name__} has three parts: it needs split_guidance=False and guidance_until=1, got "
            f"split_guidance={split} and guidance_until={until}"
        )
    return halves


@contextmanager
def guidance_in_halves(pipe: Any, *, unguided_from: int | None, split: bool, guidance_scale: float = 1.0) -> Iterator[None]:
    """Run the two halves of a batch that classifier-free guidance has doubled one after the other, or only the conditional half.

    Has no effect on models whose guidance does not double the batch.

    Args:
        pipe: The pipeline.
        unguided_from: Number of the first model call that runs only the conditional half. Its output is used for both halves, so for
            any guidance scale s, `u + s (c - u)` equals c.
        split: Run the two halves one after the other, in half the memory.
        guidance_scale: Scale of the run; above 1 it is guided, if the pipeline does not say whether it is.
    """
    cascade = cascade_of(pipe)
    conditional = cascade.conditional
    if not conditional or (unguided_from is None and not split):
        yield
        return

    def run_in_halves(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = sample_of(args, kwargs).shape[0]
        first, second = slice(0, batch // 2), slice(batch // 2, None)
        run = functools.partial(run_samples, forward, args, kwargs, batch_second=cascade.batch_second)
        if batch % 2 or not getattr(pipe, "do_classifier_free_guidance", guidance_scale > 1):
            return forward(*args, **kwargs)
        if unguided_from is not None and pipe.scheduler.calls_done >= unguided_from:
            output = run(second if conditional == "last" else first)
            return _concatenate(output, output)
        return _concatenate(run(first), run(second)) if split else forward(*args, **kwargs)

    with intercept_denoiser(pipe, run_in_halves):
        yield


def run_samples(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    samples: slice,
    *,
    batch_second: Sequence[str] = (),
) -> Any:
    """Run the denoiser on a part of the batch of its arguments. `batch_second` names arguments whose second axis is the batch."""
    cut = functools.partial(_take_samples, batch=sample_of(args, kwargs).shape[0], samples=samples)
    named = {name: value if name.endswith("_ids") else _map_tensors(value, cut) for name, value in kwargs.items()}
    named |= {name: kwargs[name][:, samples] for name in batch_second if name in kwargs}
    return forward(*_map_tensors(args, cut), **named)


def sample_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The latents among the arguments of a denoiser call."""
    sample: Tensor = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    return sample


def _take_samples(x: Tensor, *, batch: int, samples: slice) -> Tensor:
    return x[samples] if x.ndim and x.shape[0] == batch else x


def _concatenate(first: Any, second: Any) -> Any:
    """Concatenate two nested structures of tensors along the batch."""
    others = iter(x for x in tree_leaves(second) if isinstance(x, Tensor))
    return _map_tensors(first, lambda x: torch.cat([x, next(others)]))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of nested tuples, lists and mappings (such as a model's output)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(one, change) for one in value)
    if isinstance(value, list):
        return [_map_tensors(one, change) for one in value]
    if isinstance(value, Mapping):
        changed = {name: _map_tensors(one, change) for name, one in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    return value


@contextmanager
def tiled(vae: Any, *, on: bool | None, joined: int = 1) -> Iterator[None]:
    """Run the autoencoder in parts or in one piece, and restore it on exit; None leaves it unchanged.

    Parts are bands with the result of one piece (`scalediff.cascade.streaming`) or, for an autoencoder that cannot be streamed, diffusers'
    tiles. An autoencoder whose tiling is on already goes on with tiles. `joined` is an argument of `streamed`.
    """
    before = getattr(vae, "use_tiling", False)
    if on is None or on == before:
        yield
        return
    if on and not stream_obstacle(vae):
        with streamed(vae, joined=joined):
            yield
        return
    (vae.enable_tiling if on else vae.disable_tiling)()
    try:
        yield
    finally:
        (vae.disable_tiling if on else vae.enable_tiling)()


@contextmanager
def without_encoding(pipe: Any) -> Iterator[None]:
    """Make the autoencoder of a pipeline that changes a picture encode every picture to zeros, at no cost, and restore it on exit."""
    if not changes_picture(type(pipe)):
        yield
        return
    vae, factor = pipe.vae, pixels_per_latent(pipe)
    channels = vae.config.get("latent_channels") or vae.config.z_dim

    def encode(picture: Tensor, return_dict: bool = True) -> Any:
        batch, _, *frames, height, width = picture.shape
        zeros = picture.new_zeros(batch, channels, *frames, height // factor, width // factor)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: zeros, mode=lambda: zeros))

    vae.encode = encode
    try:
        yield
    finally:
        del vae.encode


def is_tiled(vae: Any) -> bool:
    """Whether the autoencoder runs in parts at present, in bands or in tiles."""
    return bool(getattr(vae, "use_tiling", False)) or is_streamed(vae)
