"""`patch_model` and `unpatch_model`: neighborhood patch attention in a model, and the cascade behind a pipeline's `__call__`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from scalediff.arguments import (
    Check,
    check_arguments,
    check_boolean,
    check_callable,
    check_grid,
    check_integer,
    check_positive,
    check_wrap,
    choice,
    instance,
    optional,
)
from scalediff.cascade.changing import called_size, change_in_call
from scalediff.cascade.checks import DRAWING_CHECKS, check_ends, check_generators
from scalediff.cascade.generators import fresh_generator
from scalediff.cascade.holding import held
from scalediff.cascade.memory import images_per_call
from scalediff.cascade.pipeline import cascade_of, edits_picture, guidance_argument, native_size, preset, stage_sizes
from scalediff.cascade.ranks import check_ranks
from scalediff.cascade.results import RunOptions
from scalediff.cascade.run import run
from scalediff.cascade.schedule import schedule_length
from scalediff.families.grid import Grid
from scalediff.families.rotation import TextRotation
from scalediff.families.unlisted import GridSource, LayoutSource, TextSource
from scalediff.patching.handle import Handle
from scalediff.patching.networks import changes_picture, denoiser_of, family_in_use, handle_of, is_text_to_image, original_call
from scalediff.patching.patch_networks import patch_networks, supports_cascade, unpatch_networks
from scalediff.patching.subclass import ATTRIBUTE, patch_class
from scalediff.settings import Jitter
from scalediff_kernels.neighborhood.api import Impl, TextQueries


def _check_grid_source(name: str, value: Any) -> None:
    if not callable(value):
        check_grid(name, value)


_CHECKS: dict[str, Check] = {
    "grid": optional(_check_grid_source),
    "patch_size": optional(check_positive),
    "levels": optional(check_positive),
    "layout": optional(check_callable),
    "text": optional(instance((tuple, list, str), '("prefix" or "suffix", a number of tokens or the name of an argument)')),
    "window": optional(check_grid),
    "text_queries": choice(get_args(TextQueries)),
    "text_rope": instance((bool, TextRotation), "True, False or a TextRotation"),
    "jitter": choice(get_args(Jitter)),
    "seed": check_integer,
    "wrap": check_wrap,
    "strict": check_boolean,
    "impl": choice(get_args(Impl)),
}
# The arguments of a patched pipeline's call that the cascade reads; the pipeline checks the others.
_CALL_CHECKS = {name: optional(DRAWING_CHECKS[name]) for name in ("prompt", "negative_prompt", "height", "width", "generator")}


def patch_model(
    model: Any,
    *,
    grid: GridSource | None = None,
    patch_size: int | None = None,
    levels: int | None = None,
    layout: LayoutSource | None = None,
    text: TextSource | None = None,
    window: Grid | None = None,
    text_queries: TextQueries = "window",
    text_rope: bool | TextRotation = True,
    jitter: Jitter = "none",
    seed: int = 0,
    wrap: tuple[bool, bool] = (False, False),
    strict: bool = True,
    impl: Impl = "auto",
    mesh: Any = None,
) -> Handle:
    """Replace a model's self-attention above its native area by neighborhood patch attention; below it, results stay bit for bit the same.

    Args:
        model: A diffusers pipeline, its denoiser (docs/guide/models.md lists the known ones), or any module whose attention
            reaches `F.scaled_dot_product_attention`. A pipeline's ControlNets are patched too. If the cascade supports the
            family, the call of a text-to-image, image-to-image or inpainting pipeline runs the cascade whenever the picture that it
            draws exceeds the native size; the family's preset fills in the arguments that the call leaves out. A picture to change
            enters the cascade as in `scalediff.upscale`, at the call's `strength`. Context parallelism of diffusers may be enabled
            before or later, with Ulysses attention, on the models named in docs/guide/models.md.
        grid: Token grid `(Y, X)`, or a function that returns it from the named arguments of a forward pass. Like the next four
            arguments, it is needed for a module that belongs to no known family, and comes before what a known family says.
        patch_size: Latents or pixels per token, as an alternative to `grid`; applied to the first `[B, C, H, W]` argument. Read from
            the module, its config or its `patch_embed` when None.
        levels: Number of levels of the token grid in a U-Net; each has half the rows and columns of the one before, rounded up.
        layout: Function that returns the `scalediff.Layout` of a forward pass from its named arguments, as an alternative to
            `grid`, `patch_size`, `levels` and `text`: for other levels, several kinds of sequences, or text among the keys only.
        text: Text tokens in the same softmax as the image: `("prefix" | "suffix", T)`, where T is a number of tokens or the name of
            the argument `[B, T, C]` that holds them. Text may have queries or be among the keys only.
        window: Key/value window in tokens `(Y, X)` at the finest level. It also defines the native area. The model's native
            token grid when None. A side that a pipeline's call leaves out is the model's own, whatever the window.
        text_queries: What text queries attend to in joint attention: `"window"` (the authors' rule) or `"global"`, as in
            `scalediff_kernels.joint_neighborhood_patch_attention`.
        text_rope: Rotate text for each window, if the family is known and has rotary positions (the authors' rule). A
            `scalediff.TextRotation` gives the rotary positions of a module that belongs to no known family; without it the text of
            such a module is not rotated.
        jitter: How the patch grid moves: `"none"`; `"alternate"`, by half a patch at every second step; `"random"`, by a random
            fraction of a patch at every step. Forward passes with the same input tensor count as one step;
            `Handle.restart_jitter` starts the sequence again. A feature cache that reuses steps refuses `"random"` at the first call
            above the native area, and one that extrapolates any but `"none"`.
        seed: Seed of the random offsets, which must be the same on all ranks of a parallel model. They come from a separate generator.
        wrap: Whether the picture continues on the other side, per axis `(Y, X)`: `(False, True)` for a panorama of 360 degrees, `(True,
            True)` for a texture. For U-Nets and other models without positions. Windows and patches then cross the border, and so do the
            convolutions of the model, at every size; of a pipeline also those of ControlNets, autoencoder and adapter. Load adapters such
            as LoRA before. Along an axis that wraps, the grid should have whole tokens at every level of the model.
        strict: Raise an error if a self-attention module cannot be patched or, in a later pass, ran without calling attention;
            or if no attention call of an unlisted model has the lengths of its layout in its first pass, at any size. Warn
            instead when False.
        impl: Implementation of the attention, as in `scalediff_kernels.neighborhood_patch_attention`.
        mesh: Process group or `DeviceMesh` of one dimension, over which every picture above the native area is split: each rank has a
            band of rows, and exchanges the rows that windows and convolutions reach into. In the cascade, the autoencoder is split
            likewise if its layers allow it. All ranks must make the same calls, with the same weights, prompt and generator; this is
            checked when the model is patched and at every pass. Diffusers' U-Nets, for which a mesh of the dimensions
            `("guidance", "rows")`, of which the first has 2 ranks, also splits a batch in halves; and FLUX.1, FLUX.2 and Qwen-Image over
            all processes, on accelerators. A mesh with `"guidance"` as its only dimension, of 2 ranks, gives each half of a batch to one
            rank, for models of any family whose latents are one tensor. The model is not split when None.

    Warns:
        UserWarning: The model is a text-to-image, image-to-image or inpainting pipeline that the cascade does not support, so that its own
            call above the native size is direct inference with windowed attention; or, without `strict`, only a part of it can be patched.

    Returns:
        A Handle with a `.report`. Used as a context manager, it unpatches the model on exit. Patching a model again replaces
        the earlier patch.

    Raises:
        ValueError: The model has no self-attention to patch, or, under `strict`, only a part of it can be patched; a module
            of no known family comes without a grid or window; the model is already patched through another pipeline; an
            argument is out of range.
        TypeError: The model is neither a module nor a pipeline with a denoiser, or it is a traced graph; an argument is of the
            wrong type.
        RuntimeError: The call comes from a callback of a run of the same model, or `mesh` is given and there is no process group.
        NotImplementedError: The model is a video model; the model or its pipeline is none of those that `mesh` splits, or `mesh` lacks
            processes or an accelerator that the model needs; it uses ring attention, or diffusers' context parallelism on a model whose
            order of tokens is not known; `wrap` for a model with positions, or with other convolutions than diffusers' U-Nets and
            autoencoders have, or together with `mesh`; `impl="triton"` without the triton package. `impl="triton"` on a model not on a
            GPU, gradient checkpointing, and such parallelism if it is enabled after patching, raise this error at the first call
            above the native area.

    ScaleDiff, arXiv:2510.25818.
    """
    arguments: dict[str, Any] = {
        "grid": grid, "patch_size": patch_size, "levels": levels, "layout": layout, "text": text, "window": window,
        "text_queries": text_queries, "text_rope": text_rope, "jitter": jitter, "seed": seed, "wrap": wrap, "strict": strict,
        "impl": impl,
    }  # fmt: skip
    check_arguments(_CHECKS, arguments)
    arguments["wrap"] = wrap[0], wrap[1]
    with held(model):
        if mesh is not None:
            check_ranks(denoiser_of(model), mesh, arguments)
        handle = patch_networks(model, **arguments, mesh=mesh)
        if not isinstance(model, nn.Module):
            family = family_in_use(denoiser_of(model))
            if family is not None and supports_cascade(type(model), family):
                patch_class(model, handle, _cascade_methods)
                if family.cascade is not None and family.cascade.assumed:
                    warnings.warn(f"scalediff: {family.cascade.assumed}", stacklevel=2)
            elif is_text_to_image(type(model)) or changes_picture(type(model)):
                problem = f"{handle.report.call}; above the native size it is direct inference with windowed attention"
                warnings.warn(f"scalediff: {problem}", stacklevel=2)
    return handle


def unpatch_model(model: Any) -> None:
    """Undo `patch_model` bit for bit.

    Args:
        model: The pipeline or denoiser. Nothing happens if it is not patched.

    Raises:
        TypeError: The model is neither a module nor a pipeline with a denoiser.
        RuntimeError: The call comes from a callback of a run of the same model.
    """
    with held(model):
        unpatch_networks(model)


def _cascade_methods(cls: type) -> dict[str, Callable[..., Any]]:
    """A `__call__` for a pipeline class that runs the cascade above the native size."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle: Handle | None = self.__dict__.get(ATTRIBUTE)
        if handle is None or not handle.active:  # a copy made while patched, or a pipeline unpatched since
            return cls.__call__(self, *args, **kwargs)
        bound = inspect.signature(functools.partial(cls.__call__, self)).bind(*args, **kwargs)
        with held(self):
            return _call_patched_pipeline(self, dict(zip(bound.signature.parameters, bound.args, strict=False)) | bound.kwargs)

    return {"__call__": call}


def _call_patched_pipeline(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Run the original call up to the native size and the cascade above it; arguments and return value are those of the pipeline."""
    check_arguments(_CALL_CHECKS, arguments)
    if edits_picture(pipe, arguments):
        return original_call(pipe)(pipe, **arguments)
    native, (height, width), handle = native_size(pipe), called_size(pipe, arguments), handle_of(pipe)
    if handle is not None:
        check_ends(pipe, [(height, width)], handle.wrap)
    if (height <= native[0] and width <= native[1]) or height * width <= native[0] * native[1]:
        return original_call(pipe)(pipe, **arguments)
    check_generators(arguments.get("generator"), images_per_call(arguments))
    settings = preset(pipe)
    settings = replace(
        settings,
        steps=arguments.setdefault("num_inference_steps", schedule_length(arguments) or settings.steps),
        guidance_scale=arguments.get(cascade_of(pipe).guidance, settings.guidance_scale),
        attention=handle.attention if handle is not None else settings.attention,
    )
    arguments |= guidance_argument(pipe, settings.guidance_scale)
    arguments["generator"] = arguments.get("generator") or fresh_generator()
    named = {name for name, value in arguments.items() if value is not None}
    if cascade_of(pipe).negative is not None and not any(name.startswith("negative_prompt") for name in named):
        arguments["negative_prompt"] = cascade_of(pipe).negative
    wrap = handle.wrap if handle is not None else (False, False)
    sizes, given = stage_sizes(pipe, height, width, wrap=wrap), None
    if changes_picture(type(pipe)):
        arguments, sizes, settings, given = change_in_call(pipe, arguments, sizes, settings)
    return run(pipe, arguments, sizes, settings, RunOptions(), given=given)
