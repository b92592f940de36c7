"""Patch the attention of a pipeline's networks, or of one network, and undo it; a pipeline's own call stays as it is."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, get_args

import torch
from torch import nn

from scalediff.families import family_of
from scalediff.families.base import Family
from scalediff.families.grid import Grid
from scalediff.families.unlisted import GridSource, TextSource, unlisted
from scalediff.patching.handle import Handle
from scalediff.patching.networks import is_text_to_image, named_networks, uncompiled
from scalediff.patching.plan import Options
from scalediff.patching.report import Row
from scalediff.patching.subclass import ATTRIBUTE
from scalediff.patching.target import CONTEXT_PARALLEL, Target, is_context_parallel
from scalediff.settings import Jitter
from scalediff_kernels.neighborhood.api import Impl, TextQueries, check_impl


def patch_networks(
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
    """Patch the networks of a model; arguments, errors and the handle are those of `scalediff.patch_model`."""
    check_impl(impl)
    for name, value, allowed in (("jitter", jitter, Jitter), ("text_queries", text_queries, TextQueries)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {name}={value!r}")
    options = Options(impl, text_queries, text_rope)
    targets: list[Target] = []
    skipped: list[Row] = []
    for prefix, net in named_networks(model):
        try:
            family = _family(net, grid, patch_size, text) if not targets else _family(net, None, None, None)
        except (ValueError, NotImplementedError) as why:
            if not targets:
                raise
            if strict:
                part = f"patch_model can patch only a part of the pipeline, not its {type(net).__name__}: strict=False does so"
                raise ValueError(part) from why
            skipped.append(Row(prefix.removesuffix("."), "self", "-", "-", None, None, "untouched", str(why)))
            continue
        native = _window(net, family, window, targets[0].native if targets else None)
        how = {"options": options, "jitter": jitter, "seed": seed, "strict": strict}
        targets.append(Target(net, family, native, prefix=prefix, parameters=_parameters(net), **how))  # type: ignore[arg-type]
        _refuse_a_second_owner(net, model)
    call = fate_of_the_call(type(model), targets[0].family)
    handle = Handle(uncompiled(model), targets, skipped=skipped, call=call)
    _check(handle, strict)
    unpatch_networks(model)
    handle.install()
    return handle


def unpatch_networks(model: Any) -> None:
    """Undo the patch of a pipeline or network; one that is not patched is left alone."""
    for owner in (uncompiled(model), *(net for _, net in named_networks(model))):
        found = owner.__dict__.get(ATTRIBUTE)
        if found is not None:
            (found if isinstance(found, Handle) else found.handle).remove()


def runs_the_cascade(kind: type, family: Family) -> bool:
    """Whether calls of a pipeline class around a denoiser of this family can run the cascade."""
    return family.cascade is not None and is_text_to_image(kind)


def _family(net: nn.Module, grid: GridSource | None, patch_size: int | None, text: TextSource | None) -> Family:
    if isinstance(net, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise TypeError(f"a traced graph has its attention calls built in: patch the module it was made from, got {type(net).__name__}")
    known = family_of(net)
    if known is None:
        return unlisted(net, _parameters(net), grid=grid, patch_size=patch_size, text=text)
    if known.refusal:
        raise known.refused_as(f"{type(net).__name__} is not patched: {known.refusal}")
    given = {"grid": grid, "patch_size": patch_size, "text": text}
    if any(value is not None for value in given.values()):
        names = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise ValueError(f"{type(net).__name__} is a known family, which reads its tokens from {known.grid_source}: got {names}")
    if is_context_parallel(net):
        raise NotImplementedError(CONTEXT_PARALLEL)
    return known


def _parameters(net: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(net.forward).parameters)


def _window(net: nn.Module, family: Family, window: Grid | None, of_the_denoiser: Grid | None) -> Grid:
    """The native token grid: what the caller says, else that of the pipeline's denoiser, else the family's own."""
    own = family.native_grid(net)
    if window is not None:
        if len(window) != 2 or not all(isinstance(n, int) and n > 0 for n in window):
            raise ValueError(f"window must be two positive numbers of tokens (Y, X), got {window=}")
        if own is not None and (window[0] > own[0] or window[1] > own[1]):
            why = f"{window=} exceeds the {own[0]} x {own[1]} tokens that {type(net).__name__} was trained on: expect repeated subjects"
            warnings.warn(f"scalediff: {why}", stacklevel=4)
        return window
    native = of_the_denoiser or own
    if native is None:
        raise ValueError(f"{type(net).__name__} does not name the size that it was trained at: say window=(Y, X) in tokens")
    return native


def _refuse_a_second_owner(net: nn.Module, model: Any) -> None:
    earlier: Target | None = net.__dict__.get(ATTRIBUTE)
    owner = earlier.handle.model if earlier is not None else None
    if owner is not None and owner is not model and not isinstance(owner, nn.Module):
        raise ValueError(
            f"this {type(net).__name__} is already patched through a {type(owner).__name__}: unpatch_model that pipeline first"
        )


def _check(handle: Handle, strict: bool) -> None:
    """Refuse, or say, that a model has nothing to patch or only a part."""
    report = handle.report
    missed = [row for row in report.rows if row.role in ("self", "joint") and row.status == "untouched"]
    if report.known and not report.patched:
        reasons = sorted({row.why for row in missed}) or ["it has no attention modules"]
        problem = f"patch_model found no self-attention to patch in {report.model}: {'; '.join(reasons)}"
    elif missed:
        names = ", ".join(row.module for row in missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
        problem = f"patch_model can patch only a part of {report.model}, not {names}: {'; '.join(sorted({row.why for row in missed}))}"
    else:
        return
    if strict:
        raise ValueError(problem + ("; strict=False patches what there is" if report.patched else ""))
    warnings.warn(f"scalediff: {problem}", stacklevel=4)


def fate_of_the_call(kind: type, family: Family) -> str:
    """For the report: what becomes of the model's own call."""
    if issubclass(kind, nn.Module):
        return "the sampling loop is yours"
    if not is_text_to_image(kind):
        return f"{kind.__name__} takes a picture: its call stays as it is"
    if not runs_the_cascade(kind, family):
        return f"the cascade does not know {family.denoiser} yet: the call of {kind.__name__} stays as it is"
    return f"{kind.__name__} runs the cascade above the native size"
