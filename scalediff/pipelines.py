"""What the cascade asks of a pipeline, and how it borrows one: everything is given back as it was found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scalediff.families import FAMILIES, family_of
from scalediff.families.base import Cascade, Family
from scalediff.hooks import Handle, denoiser_of, handle_of, is_text_to_image, nets_of, original_call, patch_model
from scalediff.schedule import check_scheduler
from scalediff.settings import Attention, Preset, Settings, check_sizes, plan_sizes
from scalediff.subclass import is_patched
from scalediff_kernels.lowpass.geometry import coarse_length

Sizes = Sequence[tuple[int, int]]


def family_with_cascade(denoiser: nn.Module) -> tuple[Family, Cascade]:
    """The family of a denoiser, and what the cascade knows of it.

    Raises:
        ValueError: no such family, or one that only the hook knows.
    """
    family = family_of(denoiser)
    if family is None or family.cascade is None:
        known = ", ".join(sorted(name for name, one in FAMILIES.items() if one.cascade is not None))
        raise ValueError(f"the cascade knows pipelines around {known}, got {type(denoiser).__name__}")
    return family, family.cascade


def cascade_of(pipe: Any) -> Cascade:
    return family_with_cascade(denoiser_of(pipe))[1]


def named_preset(pipe: Any, name: str) -> Preset:
    """One of the family's presets for this pipeline.

    Raises:
        ValueError: the family has none of that name, or the pipeline's scheduler is not what the preset is for.
    """
    presets = cascade_of(pipe).presets(denoiser_of(pipe))
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)} for this {type(denoiser_of(pipe)).__name__}, got {name!r}")
    wanted, spacing = presets[name].spacing, pipe.scheduler.config.get("timestep_spacing")
    if wanted and spacing != wanted:
        raise ValueError(
            f"preset {name!r} is for a scheduler with timestep_spacing={wanted!r}, got {type(pipe.scheduler).__name__} {spacing=}"
        )
    return presets[name]


def preset(pipe: Any, name: str = "default") -> Settings:
    """The settings of one of the family's presets; raises as `named_preset`."""
    return named_preset(pipe, name).settings


def native_size(pipe: Any) -> tuple[int, int]:
    """Pixels (height, width) that the model was trained at; of a patched one, those of its window."""
    denoiser, handle = denoiser_of(pipe), handle_of(pipe)
    family, cascade = family_with_cascade(denoiser)
    y, x = handle.window if handle is not None else family.native_grid(denoiser) or (0, 0)
    return y * cascade.patch * pipe.vae_scale_factor, x * cascade.patch * pipe.vae_scale_factor


def stage_sizes(
    pipe: Any, height: int, width: int, given: Sizes | None = None, *, picture: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """The sizes of all stages up to a target, in pixels, or a caller's own after a look at them.

    With the size of a picture that stands for the base stage, a caller's own begin above it.

    Raises:
        ValueError: as `plan_sizes` and `check_sizes`.
    """
    cascade = cascade_of(pipe)
    rules: dict[str, Any] = {"native": native_size(pipe), "multiple": max(cascade.size_multiple, cascade.patch * pipe.vae_scale_factor)}
    if given is None:
        return plan_sizes((height, width), **rules)
    check_sizes(given, (height, width), picture=picture, **rules)
    return [(int(y), int(x)) for y, x in given]


def own_call(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """The pipeline's own call, with lists of its own: Z-Image's writes its chat template into a list of prompts."""
    copied = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return original_call(pipe)(pipe, **copied)


def check_call(pipe: Any) -> None:
    """Raises TypeError: not a text-to-image pipeline."""
    denoiser_of(pipe)
    if not hasattr(pipe, "vae_scale_factor") or not is_text_to_image(type(pipe)):
        raise TypeError(f"the cascade needs a text-to-image pipeline, got {type(pipe).__name__}")


def check_run(pipe: Any, arguments: Mapping[str, Any], sizes: Sizes, settings: Settings, *, restarts: int) -> None:
    """Refuse before anything is drawn what one of the last `restarts` stages would refuse."""
    factor, cascade = pipe.vae_scale_factor, cascade_of(pipe)
    if restarts:
        check_scheduler(pipe.scheduler)
        for name in ("timesteps", "sigmas", "denoising_end"):
            if arguments.get(name) is not None:
                raise ValueError(f"stages above the native size lay out their own schedule, got {name}={arguments[name]}")
        control = arguments.get("control_image")
        if any(isinstance(one, Tensor) for one in (control if isinstance(control, list) else [control])):
            raise ValueError("control_image must be a PIL picture, which is fitted to each stage, got a tensor")
        _check_settings(pipe, settings, restarts, has_base=restarts < len(sizes))
    for number, (height, width) in enumerate(sizes[len(sizes) - restarts :], start=1):
        stage = settings.of_stage(number, restarts)
        for cutoff in (stage.lfm_cutoff, stage.sg_cutoff, stage.sg_cutoff_start):
            if isinstance(cutoff, float | int):
                coarse_length(min(height, width) // factor, cutoff, stage.filter)
    latents, base = arguments.get("latents"), (sizes[0][0] // factor, sizes[0][1] // factor)
    if latents is not None and (latents.shape[1] != base[0] * base[1] // 4 if cascade.packed else tuple(latents.shape[-2:]) != base):
        raise ValueError(f"latents are those of the base stage, {base[0]} x {base[1]}, got {tuple(latents.shape)=}")


def _check_settings(pipe: Any, settings: Settings, restarts: int, *, has_base: bool) -> None:
    if settings.anchor == "trajectory" and settings.sg and not has_base:
        raise ValueError("anchor='trajectory' is what the base stage took for the picture: a given picture has none")
    until = settings.guidance_until
    if min(until if isinstance(until, tuple) else (until,)) < 1 and not cascade_of(pipe).conditional:
        name = type(denoiser_of(pipe)).__name__
        raise NotImplementedError(f"guidance_until below 1 is for models that are guided in one doubled batch, got {name}")
    if settings.size_conditioning != "target" and not takes_size_conditioning(pipe):
        raise ValueError(f"size_conditioning is for pipelines that tell a size to the model, got {type(pipe).__name__}")


def takes_size_conditioning(pipe: Any) -> bool:
    return {"original_size", "target_size"} <= set(signature(original_call(pipe)).parameters)


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
            nets = nets_of(pipe)  # ControlNets that the caller has patched by themselves stay as they are
            whole = pipe if len(nets) > 1 and not any(map(is_patched, nets)) else nets[0]
            handle = undo.enter_context(patch_model(whole, jitter=settings.jitter or "none"))
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
            undo.enter_context(patch_model(part, patch_size=patch, window=window))
        yield


def _attends(part: nn.Module) -> bool:
    return any(hasattr(module, "to_q") for module in part.modules())


Respond = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_RESPOND = "_scalediff_respond"


@contextmanager
def answering(pipe: Any, respond: Respond) -> Iterator[None]:
    """Within, every call that the pipeline makes of its denoiser is `respond(the call as it was, args, kwargs)`.

    The denoiser gets a class with another call for that long, on top of whatever it is: patched, compiled, offloaded. What responds is
    no part of a compiled graph.
    """
    owner: Any = next(part for name in ("unet", "transformer") if isinstance(part := getattr(pipe, name, None), nn.Module))
    cls: Any = type(owner)
    owner.__dict__[_RESPOND] = respond
    owner.__class__ = _answering(cls)
    try:
        yield
    finally:
        owner.__class__ = cls
        del owner.__dict__[_RESPOND]


@functools.cache  # a graph that was compiled for the class serves the next run
def _answering(cls: type) -> type:
    forward: Any = cls.__call__

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_RESPOND](functools.partial(forward, self), args, kwargs)

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

    with answering(pipe, respond):
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
