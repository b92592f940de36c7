"""One patched denoiser: it plans its forward passes, checks what was intercepted in them, and reports its attention modules."""

from __future__ import annotations

import random
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from scalediff.families.base import Family, Reader
from scalediff.families.grid import Grid, UnknownLayout, patch_of, window_of
from scalediff.patching.interception import Pass, close_pass, current, open_pass
from scalediff.patching.plan import Call, Options, Plan
from scalediff.patching.report import Row
from scalediff.settings import Attention, Jitter

_MAX_PLANS = 64  # cached per denoiser: picture sizes in use, times the offsets of the jitter


class Patch(Protocol):
    """The handle that a target belongs to."""

    @property
    def model(self) -> Any: ...

    def remove(self) -> None: ...


class Offsets:
    """The offset of the patch grid, as a fraction of a patch: one offset per step.

    Passes with the same input tensor belong to one step. The conditional and the unconditional pass of a step must use the same grid,
    because guidance would amplify any difference between them.
    """

    def __init__(self, jitter: Jitter, seed: int) -> None:
        self.jitter, self._seed = jitter, seed
        self.restart()

    def restart(self) -> None:
        """Start the sequence of offsets again."""
        self._random = random.Random(self._seed)
        self._last_input: tuple[weakref.ref[Tensor], int] | None = None
        self._fraction = (0.0, 0.0)
        self._steps = 0

    def next(self, model_input: Tensor) -> tuple[float, float]:
        """The offset `(Y, X)` of a pass with this input."""
        version = 0 if model_input.is_inference() else model_input._version
        last = self._last_input
        if self.jitter != "none" and (last is None or last[0]() is not model_input or last[1] != version):
            self._last_input = weakref.ref(model_input), version
            if self.jitter == "random":
                self._fraction = self._random.random(), self._random.random()
            else:
                self._fraction = (0.5, 0.5) if self._steps % 2 else (0.0, 0.0)
            self._steps += 1
        return self._fraction


class Target:
    """A patched denoiser.

    Args:
        denoiser: The network; held by a weak reference.
        family: The model family, which gives the token layout of a pass.
        native: Native token grid `(Y, X)`.
        prefix: Prefix of the module names in the report.
        parameters: Names of the arguments of `forward`.
        options: Options of `patch_model` for the attention.
        jitter, seed: How the patch grid moves from step to step, as in `patch_model`.
        strict: Raise an error, instead of a warning, if no call of an unlisted model can be intercepted in its first pass above the
            native area.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        family: Family,
        native: Grid,
        *,
        prefix: str,
        parameters: tuple[str, ...],
        options: Options,
        jitter: Jitter,
        seed: int,
        strict: bool,
    ) -> None:
        self.module = weakref.ref(denoiser)
        self.handle: Patch = None  # type: ignore[assignment]  # until the handle installs it
        self.family, self.native, self.prefix, self._parameters, self.options, self._strict = (
            family, native, prefix, parameters, options, strict,
        )  # fmt: skip
        self.attention: Attention = "npa"
        self.sites = {site.name: site for site in family.sites(denoiser)}
        self.seen: dict[str, Call] = {}
        self._rotation = family.rotation(denoiser)
        self.offsets = Offsets(jitter, seed)
        self._read = Reader()
        self._plans: dict[Any, Plan] = {}
        self._already_warned: set[str] = set()  # reasons
        self._most_intercepted = 0  # calls in any pass
        self._last_intercepted = -1  # calls in the previous pass; -1 before the first

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return self in _active

    @active.setter
    def active(self, value: bool) -> None:
        (_active.add if value else _active.discard)(self)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass | None:
        """Open a pass for a forward above the native area; None if the forward needs no interception."""
        outer = current()
        if not self.active or self.attention == "full" or (outer is not None and outer.owner is self):
            return None
        planned = self._plan(module, {**dict(zip(self._parameters, args, strict=False)), **kwargs})
        return None if planned is None else open_pass(self, *planned)

    def end(self, module: nn.Module, opened: Pass, finished: bool) -> None:
        """Close a pass. If the forward finished without an exception, check what was intercepted."""
        close_pass(opened)
        if finished:
            self._check_finished_pass(module, opened)

    def _plan(self, module: nn.Module, arguments: Mapping[str, Any]) -> tuple[Plan, Tensor | None] | None:
        try:
            layout = self.family.layout(module, arguments, self._read)
            like = next((x for x in _tensors(arguments.values()) if x.is_floating_point()), None)
            if like is None:
                raise UnknownLayout("no argument is a floating-point tensor")
        except UnknownLayout as why:
            if why.tokens is None or why.tokens > self.native[0] * self.native[1]:
                self._warn_once(type(module).__name__, str(why))
            return None
        except (AttributeError, IndexError, KeyError, TypeError) as why:  # arguments that the family does not expect
            self._warn_once(type(module).__name__, f"its arguments do not give the token layout: {why!r}")
            return None
        if layout.grid[0] * layout.grid[1] <= self.native[0] * self.native[1]:
            return None
        if is_context_parallel(module):
            raise NotImplementedError(CONTEXT_PARALLEL)
        if torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False):
            raise NotImplementedError(_CHECKPOINTING)
        fraction = self.offsets.next(like)
        key = (layout, fraction, like.device, like.dtype)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = Plan(layout, self.native, fraction, self._rotation, like, self.options)
        return plan, layout.weights

    def on_intercepted(self, current_pass: Pass, call: Call) -> None:
        """Count a call that is about to be computed in windows, and remember its module for the report."""
        current_pass.intercepted += 1
        if current_pass.with_gradients and _in_checkpoint():
            raise NotImplementedError(_CHECKPOINTING)
        if self._last_intercepted < 0:
            self.seen.setdefault(self._caller(), call)

    def on_skipped(self, current_pass: Pass, why: str) -> None:
        """Warn that a call that looks like self-attention runs full attention; wait for the end of a pass that may raise an error."""
        if _without_shapes(why) in self._already_warned or _without_shapes(why) in map(_without_shapes, current_pass.skipped.values()):
            return
        if self._must_intercept:
            current_pass.skipped[self._caller()] = why
        else:
            self._warn_once(self._caller(), why)

    @property
    def _must_intercept(self) -> bool:
        """Whether this is the first pass above the native area of an unlisted model, under `strict`."""
        return self._strict and not self.family.listed and self._last_intercepted < 0

    def _check_finished_pass(self, module: nn.Module, finished: Pass) -> None:
        """Raise an error, or warn, if attention calls of the pass were not intercepted."""
        count = finished.intercepted
        if finished.skipped_in_graph:
            self._warn_once(f"an attention call of the compiled {type(module).__name__}", finished.skipped_in_graph)
        if count != self._last_intercepted and not finished.intercepted_in_graph and not finished.skipped_in_graph:
            self._warn_of_obstacles(module)
            none = f"no call of scaled_dot_product_attention had the tokens of {finished.plan.grids}"
            if count == 0 and self._must_intercept:
                self._last_intercepted = 0
                why = next(iter(finished.skipped.values()), none)
                raise ValueError(f"nothing was patched: {why}, in {type(module).__name__}; the pass ran full attention")
            for name, why in finished.skipped.items():
                self._warn_once(name, why)
            if count == 0 and self._most_intercepted == 0 and not self._already_warned:
                self._warn_once(type(module).__name__, none)
        self._last_intercepted, self._most_intercepted = count, max(count, self._most_intercepted)

    def _warn_of_obstacles(self, module: nn.Module) -> None:
        """Check the modules again, because processors may have been replaced since the model was patched."""
        for site in self.family.sites(module):
            if site.obstacle and site.role in ("self", "joint"):
                self._warn_once(self.prefix + site.name, site.obstacle)

    def _warn_once(self, name: str, why: str) -> None:
        """Warn once per reason, naming the first module that it concerns."""
        if _without_shapes(why) not in self._already_warned:
            self._already_warned.add(_without_shapes(why))
            warnings.warn(f"scalediff: {name} runs full attention: {why}", stacklevel=3)

    def _caller(self) -> str:
        """Name of the module whose forward is running: the innermost attention module on the stack, or else the innermost module."""
        denoiser = self.module()
        names = {id(module): name for name, module in denoiser.named_modules()} if denoiser is not None else {}
        innermost: str = ""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name: str = names.get(id(frame.f_locals.get("self")), "")
            if name in self.sites:
                return self.prefix + name
            innermost = innermost or name
            frame = frame.f_back
        return self.prefix + (innermost or type(denoiser).__name__)

    def rows(self) -> list[Row]:
        """Rows of the report: the attention modules of a listed family, or the modules seen calling attention."""
        rows = []
        for site in self.sites.values():
            name, grid_source, text = self.prefix + site.name, self.family.grid_source, "-" if site.role == "self" else self.family.text
            if site.role in ("cross", "text"):
                why = "text cross-attention" if site.role == "cross" else "no image tokens"
                rows.append(Row(name, site.role, "-", "-", None, None, "untouched", why))
            elif site.obstacle:
                rows.append(Row(name, site.role, grid_source, text, None, None, "untouched", site.obstacle))
            else:
                window, patch = window_of(self.native, site.level), patch_of(self.native, site.level)
                rows.append(Row(name, site.role, grid_source, text, window, patch, "patched"))
        if not self.family.listed:
            for name, call in self.seen.items():
                role = "joint" if call.sequence.text else "self"
                text = self.family.text if call.sequence.text else "-"
                rows.append(Row(name, role, self.family.grid_source, text, call.window, call.patch, "patched"))
        return rows


_active: weakref.WeakSet[Target] = weakref.WeakSet()


def any_active() -> bool:
    """Whether any model in the process is patched."""
    return len(_active) > 0


CONTEXT_PARALLEL = (
    "patch_model does not support context parallelism yet: it splits text and image over the ranks and joins them interleaved, "
    "so that windows cannot be formed"
)


_CHECKPOINTING = (
    "gradient checkpointing is not supported: it computes blocks again after the forward pass, when attention is no longer "
    "patched; disable it, or use torch.no_grad()"
)


def _in_checkpoint() -> bool:
    """Whether torch.utils.checkpoint is on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _without_shapes(why: str) -> str:
    """A reason without the shapes of the particular call."""
    return why.partition(", got")[0]


def is_context_parallel(module: nn.Module) -> bool:
    """Whether diffusers' context parallelism is enabled for this module."""
    return getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None) is not None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
