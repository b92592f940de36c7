"""`patch_model` and `unpatch_model`: neighborhood patch attention in a model, and the cascade behind a pipeline's own call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.cascade.generators import fresh_generator
from scalediff.cascade.pipeline import cascade_of, native_size, preset, stage_sizes
from scalediff.cascade.run import run
from scalediff.cascade.stage import Around
from scalediff.families import family_of
from scalediff.families.grid import Grid
from scalediff.families.unlisted import GridSource, TextSource
from scalediff.patching.handle import Handle
from scalediff.patching.hooks import patch_networks, runs_the_cascade, unpatch_networks
from scalediff.patching.networks import denoiser_of, handle_of, original_call
from scalediff.patching.subclass import ATTRIBUTE, mark
from scalediff.settings import Jitter
from scalediff_kernels.neighborhood.api import Impl, TextQueries


def patch_model(
    model: Any,
    *,
    grid: GridSource | None = None,
    patch_size: int | None = None,
    text: TextSource | None = None,
    window: Grid | None = None,
    text_queries: TextQueries = "window",
    text_rope: bool = True,
    jitter: Jitter = "none",
    seed: int = 0,
    strict: bool = True,
    impl: Impl = "auto",
) -> Handle:
    """Give a model neighborhood patch attention above its native area; up to there it computes the same bits as before.

    Args:
        model: A diffusers pipeline, its denoiser (docs/guide/models.md lists the known ones), or any module whose attention
            reaches `F.scaled_dot_product_attention`. A pipeline's ControlNets are patched with it. Where the cascade knows the
            family, the pipeline's text-to-image call then runs it when `height` x `width` exceeds the native size, with the
            family's preset for what the call does not name.
        grid: For a module of no known family: the tokens `(Y, X)` of its forward passes, or a function from their named
            arguments to that.
        patch_size: For such a module, instead of `grid`: latents or pixels per token of its first `[B, C, H, W]` argument; found
            by itself where the module, its config or its `patch_embed` names one.
        text: For such a module with text in the same softmax: `("prefix" | "suffix", T)`, where T is a number of tokens or the
            name of the argument `[B, T, C]` that has them.
        window: Key/value window in tokens `(Y, X)` of the finest level, and with it what counts as the native area; the model's
            native token grid when None.
        text_queries: In joint attention, `"window"` (the authors' rule) or `"global"`, as in
            `scalediff_kernels.joint_neighborhood_patch_attention`.
        text_rope: Turn text for each window where the family is rotary and known (the authors' rule).
        jitter: `"none"`; `"alternate"` moves the patch grid by half a patch at every second step; `"random"` by a random part
            of a patch at every step. Passes with the same input tensor are one step; `Handle.restart_jitter` begins again.
        seed: Of the random offsets, drawn from a generator of their own.
        strict: Raise when a self-attention module cannot be patched, or an unlisted model has no call to take in its first
            large pass; otherwise warn.
        impl: Implementation of the attention, as in `scalediff_kernels.neighborhood_patch_attention`.

    Returns:
        A Handle with `.report`; as a context manager it unpatches on leaving. Patching twice is patching once, with the
        later arguments.

    Raises:
        ValueError: nothing to patch, or under `strict` only a part; a module of no known family without a grid or window; the
            model is patched through another pipeline; an argument is out of range.
        TypeError: the model is neither a module nor a pipeline with a denoiser, or is a traced graph.
        NotImplementedError: the model is a video model, or runs diffusers' context parallelism; `impl="triton"` where the
            triton package is missing. A model that is not on a GPU, and gradient checkpointing, are refused by the first call
            above the native area.

    ScaleDiff, arXiv:2510.25818.
    """
    handle = patch_networks(
        model, grid=grid, patch_size=patch_size, text=text, window=window, text_queries=text_queries, text_rope=text_rope, jitter=jitter,
        seed=seed, strict=strict, impl=impl,
    )  # fmt: skip
    if not isinstance(model, nn.Module):
        family = family_of(denoiser_of(model))
        if family is not None and runs_the_cascade(type(model), family):
            mark(model, handle, _cascading)
    return handle


def unpatch_model(model: Any) -> None:
    """Undo `patch_model` on this pipeline or denoiser, bit for bit; a model that is not patched is left alone."""
    unpatch_networks(model)


def _cascading(cls: type) -> dict[str, Callable[..., Any]]:
    """The call of a pipeline class that runs the cascade above the native size."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:

        handle: Handle | None = self.__dict__.get(ATTRIBUTE)
        if handle is None or not handle.active:  # another pipeline of the same class, or a copy of one since unpatched
            return cls.__call__(self, *args, **kwargs)
        bound = inspect.signature(functools.partial(cls.__call__, self)).bind(*args, **kwargs)
        return _call_pipeline(self, dict(zip(bound.signature.parameters, bound.args, strict=False)) | bound.kwargs)

    return {"__call__": call}


def _call_pipeline(pipe: Any, arguments: dict[str, Any]) -> Any:
    """A patched pipeline's call: its own up to the native size, the cascade above; arguments and return value are the pipeline's."""
    native = native_size(pipe)
    height, width = arguments.get("height") or native[0], arguments.get("width") or native[1]
    if (height <= native[0] and width <= native[1]) or height * width <= native[0] * native[1]:
        return original_call(pipe)(pipe, **arguments)
    settings, handle = preset(pipe), handle_of(pipe)
    settings = replace(
        settings,
        steps=arguments.setdefault("num_inference_steps", settings.steps),
        guidance_scale=arguments.setdefault(cascade_of(pipe).guidance, settings.guidance_scale),
        attention=handle.attention if handle is not None else settings.attention,
    )
    arguments["generator"] = arguments.get("generator") or fresh_generator()
    told = {name for name, value in arguments.items() if value is not None}
    if cascade_of(pipe).negative is not None and not any(name.startswith("negative_prompt") for name in told):
        arguments["negative_prompt"] = cascade_of(pipe).negative
    return run(pipe, arguments, stage_sizes(pipe, height, width), settings, Around())
