"""Patch the attention of one network, or of all networks of a pipeline, and undo it. The pipeline's `__call__` is not changed here."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, get_args

import torch
from torch import nn

from scalediff.families import family_of, namesake_of
from scalediff.families.base import Family
from scalediff.families.grid import Grid, checked_grid
from scalediff.families.rotation import TextRotation
from scalediff.families.unlisted import Described, GridSource, LayoutSource, TextSource, describe_family
from scalediff.patching.assumed import with_assumed_cascade
from scalediff.patching.circular import NO_WRAP, Wrap, check_convolutions
from scalediff.patching.context_parallel import check_context_parallel
from scalediff.patching.entry import is_running
from scalediff.patching.handle import Handle, install
from scalediff.patching.networks import (
    changes_picture,
    is_text_to_image,
    may_edit_picture,
    named_networks,
    obstacle_to_changes,
    padding_parts,
    uncompiled,
)  # fmt: skip
from scalediff.patching.report import Row
from scalediff.patching.splits import check_control, check_split
from scalediff.patching.subclass import ATTRIBUTE
from scalediff.patching.target import Options, Target
from scalediff.settings import Jitter
from scalediff_kernels.neighborhood.api import Impl, TextQueries, check_impl


def patch_networks(
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
    wrap: Wrap = NO_WRAP,
    strict: bool = True,
    impl: Impl = "auto",
    mesh: Any = None,
) -> Handle:
    """Patch the networks of a model; arguments, errors and the handle are those of `scalediff.patch_model`."""
    check_impl(impl)
    for name, value, allowed in (("jitter", jitter, Jitter), ("text_queries", text_queries, TextQueries)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {name}={value!r}")
    rotation = text_rope if isinstance(text_rope, TextRotation) else None
    described = Described(grid, patch_size, levels, text, layout, rotation)
    options = Options(impl, text_queries, bool(text_rope))
    targets: list[Target] = []
    skipped: list[Row] = []
    for prefix, net in named_networks(model):
        try:
            family = _resolve_family(net, described if not targets else Described())  # ControlNets have families of their own
        except (ValueError, NotImplementedError) as why:
            if not targets:
                raise
            if strict:
                part = f"patch_model cannot patch the pipeline's {type(net).__name__}; strict=False patches the rest"
                raise ValueError(part) from why
            skipped.append(Row(prefix.removesuffix("."), "self", "-", "-", None, None, "untouched", str(why)))
            continue
        if not targets:
            family = with_assumed_cascade(model, net, family, patch_size)
        native = _native_grid(net, family, window, targets[0].native if targets else None)
        common = {"options": options, "jitter": jitter, "seed": seed, "strict": strict}
        if mesh is not None:
            if wrap != NO_WRAP:
                raise NotImplementedError(f"mesh= splits pictures that do not continue on the other side, got {wrap=}")
            if targets:
                check_control(mesh, targets[0].family, net)
            else:
                check_split(mesh, net, family)  # its errors come before anything changes
        targets.append(Target(net, family, native, prefix=prefix, parameters=_parameters(net), **common))  # type: ignore[arg-type]
        _check_not_patched_elsewhere(net, model)
    call = describe_pipeline_call(type(model), targets[0].family)
    for target in targets:
        target.set_wrap(wrap)
    parts = padding_parts(model)
    check_convolutions(parts, wrap)
    handle = Handle(uncompiled(model), targets, parts=parts, skipped=skipped, call=call)
    _check_coverage(handle, strict)
    _check_not_running(targets, strict)
    unpatch_networks(model)
    if mesh is not None:
        targets[0].split_over(mesh)
    install(handle, targets)
    return handle


def unpatch_networks(model: Any) -> None:
    """Undo the patch of a pipeline or network; does nothing if it is not patched."""
    for owner in (uncompiled(model), *(net for _, net in named_networks(model))):
        found = owner.__dict__.get(ATTRIBUTE)
        if found is not None:
            (found if isinstance(found, Handle) else found.handle).remove()


def supports_cascade(pipeline_class: type, family: Family) -> bool:
    """Whether the cascade supports a pipeline class with a denoiser of this family."""
    changes = changes_picture(pipeline_class) and not obstacle_to_changes(pipeline_class)
    return family.cascade is not None and (changes or is_text_to_image(pipeline_class))


def _resolve_family(net: nn.Module, described: Described) -> Family:
    if isinstance(net, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise TypeError(f"patch the module that was traced, not the graph: its attention calls are fixed, got {type(net).__name__}")
    known = family_of(net)
    if known is not None and known.refusal:
        if not described:
            raise known.refusal_error(f"{type(net).__name__} is not patched: {known.refusal}")
        known = None  # the user knows better
    family = known if known is not None and not described else _describe_family(net, described, known)
    check_context_parallel(net, family, has_layout=described.layout is not None)
    return family


def _describe_family(net: nn.Module, described: Described, known: Family | None) -> Family:
    namesake, hint = namesake_of(net), ""
    if namesake is not None:
        hint = (
            f". Its class has the name of {namesake.denoiser} in {namesake.module}, but is defined in {type(net).__module__}: "
            f"register_family with module={type(net).__module__!r} makes scalediff recognise it"
        )
    return describe_family(net, _parameters(net), described, known, hint)


def _parameters(net: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(net.forward).parameters)


def _native_grid(net: nn.Module, family: Family, window: Grid | None, denoiser_window: Grid | None) -> Grid:
    """The native token grid: the caller's `window`, or else that of the pipeline's denoiser, or else the family's."""
    trained = family.native_grid(net)
    if window is not None:
        if len(window) != 2 or min(window) < 1:
            raise ValueError(f"window must be two positive integers (Y, X) in tokens, got {window=}")
        if trained is not None and (window[0] > trained[0] or window[1] > trained[1]):
            native_tokens = f"{trained[0]} x {trained[1]} tokens that {type(net).__name__} was trained on"
            problem = f"{window=} exceeds the {native_tokens}: expect repeated subjects"
            warnings.warn(f"scalediff: {problem}", stacklevel=4)
        return int(window[0]), int(window[1])
    native = denoiser_window or trained
    if native is not None:
        return checked_grid(native)
    raise ValueError(f"the native size of {type(net).__name__} is not known: pass window=(Y, X) in tokens")


def _check_not_patched_elsewhere(net: nn.Module, model: Any) -> None:
    earlier: Target | None = net.__dict__.get(ATTRIBUTE)
    owner = earlier.handle.model if earlier is not None else None
    if owner is not None and owner is not model and not isinstance(owner, nn.Module):
        raise ValueError(
            f"this {type(net).__name__} is already patched through a {type(owner).__name__}: unpatch_model that pipeline first"
        )


def _check_not_running(targets: list[Target], strict: bool) -> None:
    """Raise an error, or warn, if a network is patched in the middle of its forward."""
    for net in (target.module() for target in targets):
        if net is not None and is_running(net):
            problem = (
                f"patch_model was called while a forward of this {type(net).__name__} was running, which keeps full attention: patch before"
            )
            if strict:
                raise ValueError(problem)
            warnings.warn(f"scalediff: {problem}", stacklevel=4)


_NO_MODULES = (
    "the model has no attention modules with a processor, as diffusers' have; a Family(listed=False) finds them when they call attention"
)


def _check_coverage(handle: Handle, strict: bool) -> None:
    """Raise an error, or warn, if no self-attention or only a part of it can be patched."""
    report = handle.report
    missed = [row for row in report.rows if row.role in ("self", "joint") and row.status == "untouched"]
    if report.known and not report.patched:
        reasons = sorted({row.why for row in missed}) or [_NO_MODULES]
        problem = f"patch_model found no self-attention to patch in {report.model}: {'; '.join(reasons)}"
    elif missed:
        names = ", ".join(row.module for row in missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
        problem = f"patch_model cannot patch {names} in {report.model}: {'; '.join(sorted({row.why for row in missed}))}"
    else:
        return
    if strict:
        raise ValueError(problem + ("; strict=False patches the rest" if report.patched else ""))
    warnings.warn(f"scalediff: {problem}", stacklevel=4)


def describe_pipeline_call(pipeline_class: type, family: Family) -> str:
    """What a call of this pipeline or module does once patched, for the report."""
    if issubclass(pipeline_class, nn.Module):
        return "only the attention changes; the sampling loop is your own code"
    changes, obstacle = changes_picture(pipeline_class), obstacle_to_changes(pipeline_class)
    if not changes and not is_text_to_image(pipeline_class):
        return f"{pipeline_class.__name__} is not a text-to-image pipeline, and has no strength: its call is unchanged"
    if changes and obstacle:
        return f"the cascade does not support {pipeline_class.__name__} ({obstacle}): its call is unchanged"
    if not supports_cascade(pipeline_class, family):
        why = family.no_cascade or "the family has no cascade"
        return f"the cascade does not support {family.denoiser} ({why}): the call of {pipeline_class.__name__} is unchanged"
    if changes:
        return f"{pipeline_class.__name__} runs the cascade above the native size, from its picture at its strength"
    unless = ", unless it is given a picture to edit" if may_edit_picture(pipeline_class) else ""
    return f"{pipeline_class.__name__} runs the cascade above the native size{unless}"
