"""One patched denoiser: it plans its forward passes, opens and closes them."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scalediff.families.base import Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, UnknownLayout
from scalediff.patching.account import Account
from scalediff.patching.caches import check_jitter, check_ranks, empty_caches
from scalediff.patching.call import Call
from scalediff.patching.circular import NO_WRAP, Wrap
from scalediff.patching.context_parallel import RowSplit, check_equal_parts, gathered_layout, is_parallel, needs_equal_parts
from scalediff.patching.halves import Halves
from scalediff.patching.interception import Pass, close_pass, current, open_pass
from scalediff.patching.offsets import Offsets
from scalediff.patching.plan import AttentionPlan
from scalediff.patching.report import Report, Row
from scalediff.patching.rows import pass_facts
from scalediff.patching.splits import DenoiserSplit, Shares, shares_of, split_over
from scalediff.patching.stack import CHECKPOINTING, has_compiled_parts, in_checkpoint
from scalediff.settings import Attention, Jitter
from scalediff_kernels.distributed.groups import check_agreement
from scalediff_kernels.neighborhood.api import Impl, TextQueries

_MAX_PLANS = 64  # cached per denoiser: picture sizes in use, times the offsets of the jitter


@dataclass(frozen=True)
class Options:
    """The options of `patch_model` that attention calls need."""

    impl: Impl = "auto"
    text_queries: TextQueries = "window"
    text_rope: bool = True
    wrap: Wrap = NO_WRAP


class Patch(Protocol):
    """The handle that a target belongs to."""

    @property
    def model(self) -> Any: ...

    def remove(self) -> None: ...


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
        strict: Raise an error, instead of a warning, where calls that should be intercepted are not.
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
        self.family, self.native, self.options, self._parameters = family, native, options, parameters
        self.attention: Attention = "npa"
        self._split: DenoiserSplit | None = None
        self.shares = Shares()
        self.account = Account(denoiser, family, native, prefix=prefix, strict=strict)
        self._rotation = family.rotation(denoiser) if options.text_rope else None
        self.offsets = Offsets(jitter, seed)
        self._read, self._plans = Reader(), dict[Any, AttentionPlan]()

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return self in _active

    @active.setter
    def active(self, value: bool) -> None:
        (_active.add if value else _active.discard)(self)

    @property
    def groups(self) -> tuple[Any, ...]:
        """The process groups over whose ranks the denoiser is split, that of the rows first; empty if it is not split."""
        return () if self._split is None else self._split.groups

    def split_over(self, mesh: Any) -> None:
        """Split the denoiser's tokens or batch over the ranks of a mesh; errors as in `splits.split_over`."""
        module = self.module()
        assert module is not None
        self.shares = shares_of(mesh, module, self.family)
        self._split = split_over(mesh, module, self.family, self._parameters)

    def undo_split(self) -> None:
        """Undo the split of the denoiser's tokens over ranks, if there is one."""
        module, split, self._split = self.module(), self._split, None
        if split is not None and module is not None:
            split.undo(module)

    def check_grid(self, grid: Grid, *, in_windows: bool) -> None:
        """Check that the ranks over which the denoiser is split, if any, can share out a pass with this token grid.

        Args:
            grid: Token grid `(Y, X)` at the finest level.
            in_windows: Whether attention is computed in windows if the grid is above the native area.

        Raises:
            ValueError: They cannot have equal parts.
        """
        module = self.module()
        assert module is not None
        if self._split is not None and in_windows and grid[0] * grid[1] > self.native[0] * self.native[1]:
            self._split.check_grid(grid)
        if needs_equal_parts(module, self.family):
            check_equal_parts(module, Layout(grid, (Sequence(grid),)))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass | None:
        """Open a pass for a forward above the native area; None if the forward needs no interception."""
        outer = current()
        if not self.active or (outer is not None and outer.owner is self):
            return None
        if self.groups or is_parallel(module):
            check_ranks(module)
        if self.attention == "full" and not needs_equal_parts(module, self.family):
            return None
        planned = self._plan(module, {**dict(zip(self._parameters, args, strict=False)), **kwargs})
        if planned is None:
            return None
        plan, weights, observes = planned
        opened = open_pass(self, plan, weights, frame=sys._getframe(1), observes=observes)
        opened.split = None if observes or isinstance(self._split, RowSplit) else self._split
        return opened

    def end(self, module: nn.Module, opened: Pass, finished: bool) -> None:
        """Close a pass. If the forward finished without an exception, check what was intercepted."""
        close_pass(opened)
        if finished:
            self.account.check(opened)

    def _plan(self, module: nn.Module, arguments: Mapping[str, Any]) -> tuple[AttentionPlan, Tensor | None, bool] | None:
        """The plan of a pass, its score weights, and whether the pass only observes its calls; None if it needs no interception."""
        try:
            layout = self.family.layout(module, arguments, self._read)
            like = next((x for x in _tensors(arguments.values()) if x.is_floating_point()), None)
            if like is None:
                raise UnknownLayout("no argument is a floating-point tensor")
        except UnknownLayout as why:
            if why.tokens is None or why.tokens > self.native[0] * self.native[1]:
                self.account.unknown_layout(str(why))
            return None
        except (AttributeError, IndexError, KeyError, TypeError) as why:  # arguments that the family does not expect
            self.account.unknown_layout(f"its arguments do not give the token layout: {why!r}", is_error=True)
            return None
        if not isinstance(layout, Layout):
            raise TypeError(f"the layout of {type(module).__name__} must be a scalediff.Layout, got {layout!r}")
        if self._split is not None:
            facts = pass_facts(layout, self.offsets.place, arguments)
            check_agreement(self._split.groups, facts)
        if needs_equal_parts(module, self.family):
            check_equal_parts(module, layout)
        if self.attention == "full":
            return None
        if layout.grid[0] * layout.grid[1] <= self.native[0] * self.native[1]:
            if self.account.layout_is_checked or has_compiled_parts(module):  # it would be compiled for itself
                return None
            return AttentionPlan(layout, window=self.native), None, True
        if self._split is None:
            layout = gathered_layout(module, self.family, layout)
        elif isinstance(self._split, Halves):  # lengths of texts are those of its samples
            layout = self.family.layout(module, self._split.own(arguments), self._read)
        if torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False):
            raise NotImplementedError(CHECKPOINTING)
        if torch.is_grad_enabled() and self.offsets.jitter != "none" and in_checkpoint():
            raise NotImplementedError(
                f"gradient checkpointing around the model needs jitter='none', got jitter={self.offsets.jitter!r}: the patch grid of the "
                f"second computation would be another one"
            )
        if self.offsets.at_start:
            check_jitter(module, self.offsets.jitter)
        fraction = self.offsets.next(like)
        key = (layout, fraction, self.options.wrap, like.device, like.dtype)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(layout, fraction).to(like.device, like.dtype)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            if not any(call.is_traced for call in plan.calls):
                self._plans[key] = plan
        return plan, layout.weights, False

    def _make_plan(self, layout: Layout, offset: tuple[float, float], *, whole: bool = False) -> AttentionPlan:
        """The plan of a pass; of the whole picture, if it is not split in this pass."""
        return AttentionPlan(
            layout, window=self.native, text_rope=self._rotation, text_queries=self.options.text_queries, offset=offset,
            wrap=self.options.wrap, impl=self.options.impl, group=None if self._split is None or whole else self._split.group,
        )  # fmt: skip

    def on_intercepted(self, current_pass: Pass, call: Call) -> None:
        """Count a call that is about to be computed in windows."""
        if current_pass.with_gradients and in_checkpoint(current_pass.depth):
            raise NotImplementedError(CHECKPOINTING)
        self.account.taken(current_pass, call)

    def on_skipped(self, current_pass: Pass, why: str, lengths: tuple[int, int]) -> None:
        """Count a call that looks like self-attention and runs full attention."""
        if getattr(current_pass.split, "group", None) is not None:  # it would see one band alone
            raise NotImplementedError(f"mesh= does not split full attention of a U-Net: {why}")
        self.account.left(current_pass, lengths, why)

    def on_other(self, current_pass: Pass, lengths: tuple[int, int]) -> None:
        """Count another call: cross-attention, or attention among text tokens."""
        self.account.left(current_pass, lengths)

    def on_observed(self, current_pass: Pass, call: Call | None, why: str, lengths: tuple[int, int]) -> None:
        """Count a call of a pass that only observes."""
        self.account.observed(current_pass, call, why, lengths)

    def check(self, *args: Any, **kwargs: Any) -> Report:
        """What the attention calls of a forward pass are, as `Handle.check` describes."""
        module = self.module()
        if module is None:
            raise RuntimeError(f"the patched {self.family.denoiser} no longer exists: the handle does not keep it")
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        try:
            layout = self.family.layout(module, arguments, self._read)
        except (UnknownLayout, AttributeError, IndexError, KeyError, TypeError) as why:
            raise ValueError(f"these arguments of {type(module).__name__} do not give its token layout: {why!r}") from why
        if self._split is None:
            layout = gathered_layout(module, self.family, layout)
        with torch.no_grad(), _restored(module), empty_caches(module), torch.compiler.set_stance("force_eager"):
            plan = self._make_plan(layout, (0.0, 0.0), whole=not isinstance(self._split, RowSplit))
            opened = open_pass(self, plan, layout.weights, frame=sys._getframe(0), observes=True)
            try:
                module(*args, **kwargs)
            finally:
                close_pass(opened)
        return self.account.dry_run(opened)

    def set_wrap(self, wrap: Wrap) -> None:
        """Let windows continue on the other side along these axes in later passes.

        Raises:
            NotImplementedError: The model has positions, which end at the border.
        """
        if wrap != NO_WRAP and (not self.family.wraps or self._rotation is not None):
            raise NotImplementedError(
                f"wrap is for models without positions, such as U-Nets: those of {self.family.denoiser} end at the border of the picture, "
                f"got {wrap=}"
            )
        if wrap != NO_WRAP and self._split is not None:
            raise NotImplementedError(f"wrap is for models on one device: mesh= splits the rows of this one, got {wrap=}")
        self.options = replace(self.options, wrap=wrap)

    @property
    def seen(self) -> dict[str, Call]:
        """The modules whose attention was computed in windows, and their kind of call."""
        return self.account.seen()

    def rows(self) -> list[Row]:
        """Rows of the report."""
        return self.account.rows()


_active: weakref.WeakSet[Target] = weakref.WeakSet()


def any_active() -> bool:
    """Whether any model in the process is patched."""
    return len(_active) > 0


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Restore the random generators, and the values of a module's buffers, at the end of a block.

    A buffer that still has its values is not written: that would invalidate a graph of gradients which needs it. Buffers that the block
    adds or replaces are caches, and are kept.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Offloaded parameters are on no device, and the devices on which the module will run are not known.
    on_cpu = accelerator is None or all(parameter.device.type == "cpu" for parameter in module.parameters())
    with torch.random.fork_rng([] if on_cpu else range(torch.accelerator.device_count())):
        try:
            yield
        finally:
            for buffer, values in buffers:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
