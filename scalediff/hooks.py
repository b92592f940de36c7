"""Change the attention of a model, and undo it: the only file that touches foreign modules.

`torch.nn.functional.scaled_dot_product_attention` is replaced only while a patched denoiser's forward runs, and even then
another thread, another model or a call that is not image self-attention reaches the original. Hooks on the denoiser and on
its attention modules say which grid and which module a call belongs to; no module's forward or processor is replaced.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from scalediff.families import family_of
from scalediff.families.base import Family
from scalediff.grid import AttentionSite, Grid, from_grid, level_grid, to_grid
from scalediff.report import Report, Row
from scalediff.settings import Attention
from scalediff_kernels import neighborhood_patch_attention
from scalediff_kernels.neighborhood.api import Impl

_ATTRIBUTE = "_scalediff_handle"


@dataclass
class _Pass:
    """One forward pass of one patched denoiser in one thread."""

    handle: Handle
    latent: Grid
    site: AttentionSite | None = None


@dataclass
class _Passes(threading.local):
    stack: list[_Pass] = field(default_factory=list)


class _Interception:
    """The replaced attribute, counted: the first pass in any thread puts it in, the last one takes it out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self.original: Any = F.scaled_dot_product_attention

    def acquire(self) -> None:
        with self._lock:
            if self._users == 0:
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
    if current is not None and current.site is not None and attn_mask is None and not is_causal and dropout_p == 0.0:
        handle, site = current.handle, current.site
        grid = level_grid(current.latent, site.level)
        if query.shape == key.shape == value.shape and query.shape[-2] == grid[0] * grid[1]:
            return handle._attend(site, grid, query, key, value, scale)
        handle._warn_once(site, grid, tuple(query.shape))
    options = {"enable_gqa": True} if enable_gqa else {}
    out: Tensor = _interception.original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    return out


class Handle:
    """A patched model: `.report` says what was done, `.remove()` or leaving a `with` block undoes it.

    Attributes:
        report: Every attention module with its role, window and whether it is patched.
        attention: `"npa"`, or `"full"` to let calls through for a while without unpatching.
    """

    def __init__(self, model: Any, denoiser: nn.Module, family: Family, impl: Impl) -> None:
        self.attention: Attention = "npa"
        self._model, self._denoiser, self._family, self._impl = model, denoiser, family, impl
        self._native = family.native_grid(denoiser)
        self._sites = {site.name: site for site in family.sites(denoiser)}
        self._warned: set[str] = set()
        self._removers: list[RemovableHandle] = []
        self.report = self._describe()
        if not self.report.patched:
            raise ValueError(f"patch_model found no self-attention to patch in {type(denoiser).__name__}:\n{self.report}")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the patch; a second call does nothing."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()
        if isinstance(self._model, _Cascading):
            self._model.__class__ = type(self._model).__mro__[2]
        for owner in (self._model, self._denoiser):
            if owner.__dict__.get(_ATTRIBUTE) is self:
                del owner.__dict__[_ATTRIBUTE]

    def window(self, level: int) -> Grid:
        """The key window in tokens: the model's native token grid at that level."""
        return level_grid(self._native, level)

    def patch(self, level: int) -> Grid:
        """The query patch in tokens: half the window, as in the paper."""
        y, x = self.window(level)
        return max(1, y // 2), max(1, x // 2)

    def _install(self) -> None:
        self._model.__dict__[_ATTRIBUTE] = self._denoiser.__dict__[_ATTRIBUTE] = self
        add = self._removers.append
        add(self._denoiser.register_forward_pre_hook(self._enter_denoiser, with_kwargs=True))
        add(self._denoiser.register_forward_hook(self._leave_denoiser, always_call=True))
        for name, module in self._denoiser.named_modules():
            if name in self._sites and self._sites[name].role == "self":
                add(module.register_forward_pre_hook(_SiteHook(self, self._sites[name])))
                add(module.register_forward_hook(_SiteHook(self, None), always_call=True))
        if self._model is not self._denoiser:
            self._model.__class__ = _cascading(type(self._model))

    def _enter_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        latent = self._family.latent_grid(args, kwargs)
        if self.attention == "npa" and (latent[0] > self._native[0] or latent[1] > self._native[1]):
            _passes.stack.append(_Pass(self, latent))
            _interception.acquire()

    def _leave_denoiser(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if _passes.stack and _passes.stack[-1].handle is self:
            _passes.stack.pop()
            _interception.release()

    def _attend(self, site: AttentionSite, grid: Grid, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        q, k, v = (to_grid(x, grid) for x in (query, key, value))
        out = neighborhood_patch_attention(
            q, k, v, window=self.window(site.level), patch=self.patch(site.level), scale=scale, impl=self._impl
        )
        return from_grid(out)

    def _warn_once(self, site: AttentionSite, grid: Grid, shape: tuple[int, ...]) -> None:
        if site.name not in self._warned:
            self._warned.add(site.name)
            warnings.warn(
                f"scalediff: {site.name} runs full attention: q, k and v must be of one shape with "
                f"{grid[0]} x {grid[1]} tokens, got q {shape}",
                stacklevel=3,
            )

    def _describe(self) -> Report:
        rows = []
        for site in self._sites.values():
            if site.role == "self":
                row = Row(site.name, "self", self._family.grid_source, "-", self.window(site.level), self.patch(site.level), "patched")
            else:
                row = Row(site.name, "cross", "-", "keys", None, None, "untouched", "text cross-attention")
            rows.append(row)
        return Report(type(self._denoiser).__name__, tuple(rows))


class _SiteHook:
    """Names the attention module that runs, for the calls made inside it (`site=None`: it has ended)."""

    def __init__(self, handle: Handle, site: AttentionSite | None) -> None:
        self._handle, self._site = handle, site

    def __call__(self, module: nn.Module, *_: object) -> None:
        if _passes.stack and _passes.stack[-1].handle is self._handle:
            _passes.stack[-1].site = self._site


class _Cascading:
    """Marks a pipeline class made by `_cascading`."""


def _cascading(cls: type) -> type:
    """A subclass whose call runs the cascade above the native size; name and module stay, so that saving works as before."""
    original = cls.__call__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from scalediff import cascade  # it imports this module

        bound = inspect.signature(functools.partial(original, self)).bind(*args, **kwargs)
        return cascade.call_pipeline(self, bound.kwargs | dict(zip(bound.signature.parameters, bound.args, strict=False)))

    return type(cls.__name__, (_Cascading, cls), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def original_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline class's own `__call__`, patched or not; the pipeline is its first argument."""
    call: Callable[..., Any] = type(pipe).__call__
    return call.__wrapped__ if isinstance(pipe, _Cascading) else call  # type: ignore[attr-defined]


def patch_model(model: Any, *, impl: Impl = "auto") -> Handle:
    """Give a model neighborhood patch attention above its native size; at native size it computes the same bits as before.

    Args:
        model: A diffusers pipeline, whose call then runs the whole cascade where `height` and `width` exceed the native size,
            or a denoiser (`UNet2DConditionModel`), for a sampling loop of one's own.
        impl: Implementation of the attention, as in `scalediff_kernels.neighborhood_patch_attention`.

    Returns:
        A Handle with `.report`; as a context manager it unpatches on leaving. Patching twice is patching once, with the
        later arguments.

    Raises:
        ValueError: the model is of no known family or has nothing to patch.

    ScaleDiff, arXiv:2510.25818.
    """
    denoiser = denoiser_of(model)
    handle = Handle(model, denoiser, family_of(denoiser), impl)
    unpatch_model(model)
    handle._install()
    return handle


def unpatch_model(model: Any) -> None:
    """Undo `patch_model` on this pipeline or denoiser, to the bit; a model that is not patched is left alone."""
    for owner in (model, denoiser_of(model)):
        handle = owner.__dict__.get(_ATTRIBUTE)
        if handle is not None:
            handle.remove()


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
