"""Change the attention of a model, and undo it.

A denoiser's class becomes a subclass whose call opens and closes a pass, whatever is raised inside; within a pass, attention
calls are intercepted (`scalediff.interception`). No forward, no processor and no submodule is replaced.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, cast, get_args

import torch
from torch import nn

from scalediff.families import family_of
from scalediff.families.base import Family
from scalediff.families.unlisted import GridSource, TextSource, unlisted
from scalediff.grid import Grid
from scalediff.plan import Options
from scalediff.report import Report, Row
from scalediff.settings import Attention, Jitter
from scalediff.subclass import ATTRIBUTE, mark, own_class, unmark
from scalediff.target import CONTEXT_PARALLEL, Target, is_context_parallel
from scalediff_kernels.neighborhood.api import Impl, TextQueries, check_impl


class Handle:
    """A patched model: `.report` says what was done, `.remove()` or leaving a `with` block undoes it."""

    def __init__(self, model: Any, targets: list[Target], skipped: Sequence[Row] = ()) -> None:
        self._model = weakref.ref(model)  # weak: a denoiser must neither keep its pipeline alive nor copy it along
        self._kind = type(model)
        self._targets, self._skipped = targets, tuple(skipped)
        self._attention: Attention = "npa"

    @property
    def report(self) -> Report:
        """Every attention module with its role, window and whether it is patched; of an unlisted model, those seen so far."""
        rows = *(row for target in self._targets for row in target.rows()), *self._skipped
        known = all(target.family.listed for target in self._targets)
        return Report(self._targets[0].family.denoiser, rows, _fate_of_the_call(self._kind, self._targets[0].family), known)

    @property
    def attention(self) -> Attention:
        """`"npa"`, or `"full"` to let all calls through for a while without unpatching."""
        return self._attention

    @attention.setter
    def attention(self, value: Attention) -> None:
        if value not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {value!r}")
        self._attention = value
        for target in self._targets:
            target.attention = value

    @property
    def jitter(self) -> Jitter:
        """How the patch grid moves from step to step; setting it begins the offsets again."""
        return self._targets[0].offsets.jitter

    @jitter.setter
    def jitter(self, value: Jitter) -> None:
        if value not in get_args(Jitter):
            raise ValueError(f"jitter must be one of {', '.join(get_args(Jitter))}, got jitter={value!r}")
        for target in self._targets:
            target.offsets.jitter = value
        self.restart_jitter()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the patch; a second call, or one after a later patch has replaced this one, does nothing."""
        for target in self._targets:
            target.active = False
            unmark(target.module(), target)
        unmark(self._model(), self)

    def restart_jitter(self) -> None:
        """Begin the offsets of the patch grid again, as after patching: the same run then has the same offsets."""
        for target in self._targets:
            target.offsets.restart()

    @property
    def window(self) -> Grid:
        """Key/value window in tokens `(Y, X)` of the denoiser's finest level: what counts as its native size."""
        return self._targets[0].native

    @property
    def options(self) -> Options:
        """What the attention was asked to be: implementation and treatment of text."""
        return self._targets[0].options

    @property
    def model(self) -> Any:
        """The pipeline or module that was patched; None once it is gone."""
        return self._model()

    @property
    def active(self) -> bool:
        """False once removed."""
        return any(target.active for target in self._targets)

    def _install(self) -> None:
        for target in self._targets:
            module = target.module()
            assert module is not None
            target.handle = self
            mark(module, target, _attending)
            target.active = True
        model = self._model()
        if model is not None and not isinstance(model, nn.Module):
            if _cascades(type(model), self._targets[0].family):
                mark(model, self, _cascading)
            else:
                model.__dict__[ATTRIBUTE] = self


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
        model: A diffusers pipeline, its denoiser (docs/models.md lists the known ones), or any module whose attention
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
    check_impl(impl)
    for name, value, allowed in (("jitter", jitter, Jitter), ("text_queries", text_queries, TextQueries)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {name}={value!r}")
    options = Options(impl, text_queries, text_rope)
    targets: list[Target] = []
    skipped: list[Row] = []
    for prefix, net in _nets(model):
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
    handle = Handle(_uncompiled(model), targets, skipped)
    _check(handle, strict)
    unpatch_model(model)
    handle._install()
    return handle


def unpatch_model(model: Any) -> None:
    """Undo `patch_model` on this pipeline or denoiser, to the bit; a model that is not patched is left alone."""
    for owner in (_uncompiled(model), *(net for _, net in _nets(model))):
        found = owner.__dict__.get(ATTRIBUTE)
        if found is not None:
            (found if isinstance(found, Handle) else found.handle).remove()


def handle_of(model: Any) -> Handle | None:
    """The handle of a patched pipeline or denoiser."""
    target: Target | None = denoiser_of(model).__dict__.get(ATTRIBUTE)
    return cast(Handle, target.handle) if target is not None else None


def denoiser_of(model: Any) -> nn.Module:
    """The network that a pipeline calls at every step; a module is its own denoiser, a compiled one that within.

    Raises:
        TypeError: neither a module nor a pipeline with a `unet` or `transformer`.
    """
    return next(net for _, net in _nets(model))


def nets_of(model: Any) -> list[nn.Module]:
    """The denoiser of a pipeline and its ControlNets."""
    return [net for _, net in _nets(model)]


def is_text_to_image(kind: type) -> bool:
    """Whether calls of a pipeline class take a prompt, a size and latents, and no picture to change: then they can run a stage."""
    own = own_class(kind)
    names, parts = (set(inspect.signature(of).parameters) for of in (own.__call__, own))
    # Beside a ControlNet, `image` is the condition; a picture to change comes with a strength.
    pictures = {"mask_image", "strength"} if "controlnet" in parts else {"image", "mask_image"}
    return {"prompt", "height", "width", "latents"} <= names and names.isdisjoint(pictures)


def original_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline class's own `__call__`, patched or not; the pipeline is its first argument."""
    call: Callable[..., Any] = own_class(type(pipe)).__call__
    return call


def _nets(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The denoiser of a pipeline and then its ControlNets, with their names in reports."""
    if isinstance(model, nn.Module):
        yield "", _uncompiled(model)
        return
    denoisers = [part for name in ("unet", "transformer") if isinstance(part := getattr(model, name, None), nn.Module)]
    if not denoisers:
        raise TypeError(f"expected an nn.Module or a diffusers pipeline with a unet or transformer, got {type(model).__name__}")
    yield "", _uncompiled(denoisers[0])
    control = getattr(model, "controlnet", None)
    if isinstance(control, nn.Module):
        control = _uncompiled(control)
        nets = getattr(control, "nets", None)
        if nets is None:
            yield "controlnet.", control
        for i, net in enumerate(nets or ()):
            yield f"controlnet.nets.{i}.", _uncompiled(net)


def _uncompiled(model: Any) -> Any:
    """The module within torch.compile's wrapper; the wrapper calls it, so a patch of it is a patch of both."""
    return getattr(model, "_orig_mod", model)


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
            warnings.warn(f"scalediff: {why}", stacklevel=3)
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
    warnings.warn(f"scalediff: {problem}", stacklevel=3)


def _cascades(kind: type, family: Family) -> bool:
    return family.cascade is not None and is_text_to_image(kind)


def _attending(cls: type) -> dict[str, Callable[..., Any]]:
    """The calls of a denoiser class that are a pass of its target.

    torch.compile may have taken hold of `__call__` before (then it still asks the module for `_call_impl`), or of `_call_impl`
    (then the module is called as usual): one of the two is always ours, and a pass within itself does nothing.
    """

    # torch.compile steps over the call itself, does not look into opening and closing, and compiles what lies between.
    begin, end = torch.compiler.disable(Target.begin), torch.compiler.disable(Target.end)

    def within(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            target: Target | None = self.__dict__.get(ATTRIBUTE)
            if target is None:
                return forward(self, *args, **kwargs)
            entered, finished = None, False
            try:
                entered = begin(target, self, args, kwargs)
                result = forward(self, *args, **kwargs)
                finished = True
            finally:
                if entered is not None:
                    end(target, self, entered, finished)
            return result

        stepped_over: Callable[..., Any] = torch.compiler.disable(call, recursive=False)
        return stepped_over

    return {"__call__": within(cls.__call__), "_call_impl": within(cls._call_impl)}  # type: ignore[attr-defined]


def _cascading(cls: type) -> dict[str, Callable[..., Any]]:
    """The call of a pipeline class that runs the cascade above the native size."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from scalediff import cascade  # it imports this module

        handle: Handle | None = self.__dict__.get(ATTRIBUTE)
        if handle is None or not handle.active:  # another pipeline of the same class, or a copy of one since unpatched
            return cls.__call__(self, *args, **kwargs)
        bound = inspect.signature(functools.partial(cls.__call__, self)).bind(*args, **kwargs)
        return cascade.call_pipeline(self, dict(zip(bound.signature.parameters, bound.args, strict=False)) | bound.kwargs)

    return {"__call__": call}


def _fate_of_the_call(kind: type, family: Family) -> str:
    """For the report: what becomes of the model's own call."""
    if issubclass(kind, nn.Module):
        return "the sampling loop is yours"
    if not is_text_to_image(kind):
        return f"{kind.__name__} takes a picture: its call stays as it is"
    if family.cascade is None:
        return f"the cascade does not know {family.denoiser} yet: the call of {kind.__name__} stays as it is"
    return f"{kind.__name__} runs the cascade above the native size"
