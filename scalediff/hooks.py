"""Change the attention of a model, and undo it: the only file that touches foreign modules.

`torch.nn.functional.scaled_dot_product_attention` is replaced only while a patched denoiser runs, and even then another thread,
another model or a call that is not image self-attention reaches the original. The denoiser's class becomes a subclass whose
call opens and closes the pass, whatever is raised inside; hooks on its attention modules say which of them a call belongs to.
No forward and no processor is replaced.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from scalediff.families import family_of
from scalediff.families.base import Family
from scalediff.grid import AttentionSite, Grid, from_grid, level_grid, patch_of, to_grid, window_of
from scalediff.report import Report, Row
from scalediff.settings import Attention
from scalediff_kernels import neighborhood_patch_attention
from scalediff_kernels.neighborhood.api import Impl, check_impl

_ATTRIBUTE = "_scalediff_handle"


@dataclass
class _Pass:
    """One forward pass of one patched denoiser in one thread."""

    handle: Handle
    latent: Grid
    site: AttentionSite | None = None
    reached: bool = False  # the site has called scaled_dot_product_attention


@dataclass
class _Passes(threading.local):
    stack: list[_Pass] = field(default_factory=list)
    through: bool = False  # a call is on its way to whatever stood in our place

    def of(self, handle: Handle) -> _Pass | None:
        """The innermost pass of this thread, if it is this handle's."""
        return self.stack[-1] if self.stack and self.stack[-1].handle is handle else None


class _Interception:
    """The replaced attribute, counted: the first pass in any thread puts it in, the last one takes it out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self.first: Any = F.scaled_dot_product_attention
        self.original = self.first

    def acquire(self) -> None:
        with self._lock:
            if F.scaled_dot_product_attention is not _attend:  # somebody who saved it during a pass may have put it back
                self.original = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = _attend
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and F.scaled_dot_product_attention is _attend:
                F.scaled_dot_product_attention = self.original


_passes = _Passes()
_interception = _Interception()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for `F.scaled_dot_product_attention`: same contract, `[B, H, S, D]` in and out."""
    current = _passes.stack[-1] if _passes.stack else None
    if current is not None and current.site is not None:
        current.reached = True
        if attn_mask is None and not is_causal and dropout_p == 0.0:
            handle, site = current.handle, current.site
            grid = level_grid(current.latent, site.level)
            if query.shape == key.shape == value.shape and query.shape[-2] == grid[0] * grid[1]:
                return handle._attend(site, grid, query, key, value, scale)
            handle._warn_once(site, f"q, k and v must be of one shape with {grid[0]} x {grid[1]} tokens, got q {tuple(query.shape)}")
    options = {"enable_gqa": True} if enable_gqa else {}
    # Whoever wrapped the attribute during a pass, and stayed, may lead back here: then it is torch's own turn.
    target = _interception.first if _passes.through else _interception.original
    before, _passes.through = _passes.through, True
    try:
        out: Tensor = target(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    finally:
        _passes.through = before
    return out


class Handle:
    """A patched model: `.report` says what was done, `.remove()` or leaving a `with` block undoes it.

    Attributes:
        report: Every attention module with its role, window and whether it is patched.
    """

    def __init__(self, model: Any, denoiser: nn.Module, impl: Impl) -> None:
        self._owner = weakref.ref(model)  # weak: a U-Net must neither keep its pipeline alive nor copy it along
        self._denoiser, self._impl = denoiser, impl
        self._family: Family = family_of(denoiser)
        self._native = self._family.native_grid(denoiser)
        self._attention: Attention = "npa"
        self._warned: set[str] = set()
        self._removers: list[RemovableHandle] = []
        self.report = self._describe(model)
        if not self.report.patched:
            reasons = sorted({row.why for row in self.report.rows}) or ["it has no attention modules"]
            raise ValueError(f"patch_model found no self-attention to patch in {type(denoiser).__name__}: {'; '.join(reasons)}")

    @property
    def attention(self) -> Attention:
        """`"npa"`, or `"full"` to let all calls through for a while without unpatching."""
        return self._attention

    @attention.setter
    def attention(self, value: Attention) -> None:
        if value not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {value!r}")
        self._attention = value

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the patch; a second call, or one after a later patch has replaced this one, does nothing."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()
        for owner in (self._owner(), self._denoiser):
            if owner is not None and owner.__dict__.get(_ATTRIBUTE) is self:
                del owner.__dict__[_ATTRIBUTE]
                _restore_class(owner)

    @property
    def active(self) -> bool:
        """False once removed."""
        return bool(self._removers)

    def _install(self, model: Any) -> None:
        for owner in (model, self._denoiser):
            owner.__dict__[_ATTRIBUTE] = self
        self._denoiser.__class__ = _attending(type(self._denoiser))
        if model is not self._denoiser and is_text_to_image(model):
            model.__class__ = _cascading(type(model))
        for site in self._family.sites(self._denoiser):
            if site.role == "self":
                module = self._denoiser.get_submodule(site.name)
                self._removers.append(module.register_forward_pre_hook(functools.partial(self._enter_site, site)))
                self._removers.append(module.register_forward_hook(functools.partial(self._leave_site, site)))

    @contextmanager
    def _pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        latent = self._family.latent_grid(args, kwargs)
        if self._attention == "full" or latent[0] * latent[1] <= self._native[0] * self._native[1]:
            yield
            return
        _interception.acquire()
        _passes.stack.append(_Pass(self, latent))
        try:
            yield
        finally:
            _passes.stack.pop()
            _interception.release()

    def _enter_site(self, site: AttentionSite, module: nn.Module, args: object) -> None:
        if current := _passes.of(self):
            current.site, current.reached = site, False

    def _leave_site(self, site: AttentionSite, module: nn.Module, args: object, output: object) -> None:
        if current := _passes.of(self):
            if not current.reached:
                self._warn_once(site, "its processor does not call scaled_dot_product_attention")
            current.site = None

    def _attend(self, site: AttentionSite, grid: Grid, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        q, k, v = (to_grid(x, grid) for x in (query, key, value))
        window, patch = window_of(self._native, site.level), patch_of(self._native, site.level)
        return from_grid(neighborhood_patch_attention(q, k, v, window=window, patch=patch, scale=scale, impl=self._impl))

    def _warn_once(self, site: AttentionSite, why: str) -> None:
        if site.name not in self._warned:
            self._warned.add(site.name)
            warnings.warn(f"scalediff: {site.name} runs full attention: {why}", stacklevel=3)

    def _describe(self, model: Any) -> Report:
        rows = []
        for site in self._family.sites(self._denoiser):
            if site.role == "self" and not site.obstacle:
                window, patch = window_of(self._native, site.level), patch_of(self._native, site.level)
                rows.append(Row(site.name, "self", self._family.grid_source, "-", window, patch, "patched"))
            elif site.role == "self":
                rows.append(Row(site.name, "self", self._family.grid_source, "-", None, None, "untouched", site.obstacle))
            else:
                rows.append(Row(site.name, "cross", "-", "keys", None, None, "untouched", "text cross-attention"))
        if model is self._denoiser:
            call = "the sampling loop is yours"
        elif is_text_to_image(model):
            call = f"{type(model).__name__} runs the cascade above the native size"
        else:
            call = f"{type(model).__name__} takes a picture: its call stays as it is"
        return Report(type(self._denoiser).__name__, tuple(rows), call)


def patch_model(model: Any, *, impl: Impl = "auto") -> Handle:
    """Give a model neighborhood patch attention above its native area; up to there it computes the same bits as before.

    Args:
        model: A diffusers pipeline, whose text-to-image call then runs the whole cascade where `height` x `width` exceeds the
            native size (with the family's preset for what the call does not name, `scalediff.cascade.preset`), or a
            denoiser (`UNet2DConditionModel`), for a sampling loop of one's own.
        impl: Implementation of the attention, as in `scalediff_kernels.neighborhood_patch_attention`.

    Returns:
        A Handle with `.report`; as a context manager it unpatches on leaving. Patching twice is patching once, with the
        later arguments.

    Raises:
        ValueError: the model is of no known family, has nothing to patch, or is patched through another pipeline.
        TypeError: the model is neither a module nor a pipeline.
        NotImplementedError: `impl="triton"` where the triton package is missing. A model that is not on a GPU is refused by the
            first call above its native area.

    ScaleDiff, arXiv:2510.25818.
    """
    check_impl(impl)
    denoiser = denoiser_of(model)
    handle = Handle(model, denoiser, impl)
    earlier = handle_of(denoiser)
    owner = earlier._owner() if earlier is not None else None
    if owner is not None and owner not in (model, denoiser) and owner.__dict__.get(_ATTRIBUTE) is earlier:
        raise ValueError(
            f"this {type(denoiser).__name__} is already patched through a {type(owner).__name__}: unpatch_model that pipeline first"
        )
    unpatch_model(model)
    handle._install(model)
    return handle


def unpatch_model(model: Any) -> None:
    """Undo `patch_model` on this pipeline or denoiser, to the bit; a model that is not patched is left alone."""
    for owner in (model, denoiser_of(model)):
        handle = owner.__dict__.get(_ATTRIBUTE)
        if handle is not None:
            handle.remove()
            if owner.__dict__.pop(_ATTRIBUTE, None) is not None:  # a shallow copy of the pipeline that was patched
                _restore_class(owner)


def handle_of(model: Any) -> Handle | None:
    """The handle of a patched pipeline or denoiser."""
    handle: Handle | None = denoiser_of(model).__dict__.get(_ATTRIBUTE)
    return handle


def denoiser_of(model: Any) -> nn.Module:
    """The network that a pipeline calls at every step; a module is its own denoiser.

    Raises:
        TypeError: neither a module nor a pipeline with a `unet` or `transformer`.
    """
    if isinstance(model, nn.Module):
        return model
    for name in ("unet", "transformer"):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            return part
    raise TypeError(f"expected a diffusers pipeline or an nn.Module, got {type(model).__name__}")


def is_text_to_image(pipe: Any) -> bool:
    """Whether a pipeline's call takes a prompt, a size and latents, and no picture: then it can run a stage."""
    names = set(inspect.signature(original_call(pipe)).parameters)
    return {"prompt", "height", "width", "latents"} <= names and names.isdisjoint({"image", "mask_image"})


def original_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline class's own `__call__`, patched or not; the pipeline is its first argument."""
    call: Callable[..., Any] = _own_class(type(pipe)).__call__
    return call


class _Patched:
    """Marks the subclasses made here; their second base is the class that they stand for."""


def _own_class(cls: type) -> type:
    """The class that a patched one stands for, also below classes that others have put on top."""
    order = cls.__mro__
    return order[order.index(_Patched) + 1] if _Patched in order else cls


def _restore_class(owner: Any) -> None:
    if _Patched in type(owner).__bases__:  # a class that others have put on top stays: our call does nothing without a handle
        owner.__class__ = _own_class(type(owner))


def _subclass(cls: type, call: Callable[..., Any]) -> type:
    """A subclass with another call; name and module stay, so that saving and printing are as before."""
    return type(cls.__name__, (_Patched, cls), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _attending(cls: type[nn.Module]) -> type:
    """A denoiser class whose call is a pass of its handle."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle: Handle | None = self.__dict__.get(_ATTRIBUTE)
        with handle._pass(args, kwargs) if handle is not None and handle.active else nullcontext():
            return cls.__call__(self, *args, **kwargs)

    return _subclass(cls, call)


def _cascading(cls: type) -> type:
    """A pipeline class whose call runs the cascade above the native size."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from scalediff import cascade  # it imports this module

        handle: Handle | None = self.__dict__.get(_ATTRIBUTE)
        if handle is None or not handle.active:  # another pipeline of the same class, or a copy of one since unpatched
            return cls.__call__(self, *args, **kwargs)
        bound = inspect.signature(functools.partial(cls.__call__, self)).bind(*args, **kwargs)
        return cascade.call_pipeline(self, dict(zip(bound.signature.parameters, bound.args, strict=False)) | bound.kwargs)

    return _subclass(cls, call)
