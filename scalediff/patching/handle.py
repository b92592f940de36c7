"""The handle of a patched model, and the methods of its patched networks.

A patched denoiser gets a subclass of its class whose `__call__` and `forward` open a pass and close it afterwards, also after an
exception (`scalediff.patching.entry`). During a pass, attention calls are intercepted (`scalediff.patching.interception`). No function of
the model, no processor and no submodule is replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, get_args

from torch import nn

from scalediff.arguments import check_wrap
from scalediff.families.grid import Grid
from scalediff.patching.circular import NO_WRAP, Wrap, check_convolutions, set_wrap
from scalediff.patching.entry import denoiser_methods
from scalediff.patching.report import Report, Row
from scalediff.patching.splits import Shares
from scalediff.patching.subclass import ATTRIBUTE, patch_class, restore_class
from scalediff.patching.target import Options, Target
from scalediff.settings import Attention, Jitter


class Handle:
    """A patched model. `.report` lists what was patched; `.remove()`, or leaving a `with` block, undoes the patch."""

    def __init__(
        self, model: Any, targets: list[Target], *, parts: Sequence[nn.Module] = (), skipped: Sequence[Row] = (), call: str = ""
    ) -> None:
        self._model = weakref.ref(model)  # weak, so that a denoiser neither keeps its pipeline alive nor is copied with it
        self._targets, self._skipped, self._call = targets, tuple(skipped), call
        self._attention: Attention = "npa"
        self._parts = [weakref.ref(part) for part in parts]

    @property
    def report(self) -> Report:
        """Every attention module with its role, window and status, and what the last pass above the native area did.

        For an unlisted model, the modules seen so far.
        """
        rows = *(row for target in self._targets for row in target.rows()), *self._skipped
        known = all(target.family.listed for target in self._targets)
        last = "; ".join(said for target in self._targets if (said := target.account.last_pass()))
        notes = tuple(dict.fromkeys(note for target in self._targets for note in target.account.notes()))
        if any(self.wrap):
            axes = " and ".join(name for name, on in zip("YX", self.wrap, strict=True) if on)
            notes = (f"windows and convolutions continue on the other side along {axes}", *notes)
        return Report(self._targets[0].family.denoiser, rows, self._call, known, last, notes)

    @property
    def attention(self) -> Attention:
        """`"npa"`, or `"full"` to run full attention without unpatching."""
        return self._attention

    @attention.setter
    def attention(self, value: Attention) -> None:
        if value not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got attention={value!r}")
        self._attention = value
        for target in self._targets:
            target.attention = value

    @property
    def jitter(self) -> Jitter:
        """How the patch grid moves from step to step, as in `patch_model`. Setting it restarts the sequence of offsets."""
        return self._targets[0].offsets.jitter

    @jitter.setter
    def jitter(self, value: Jitter) -> None:
        if value not in get_args(Jitter):
            raise ValueError(f"jitter must be one of {', '.join(get_args(Jitter))}, got jitter={value!r}")
        for target in self._targets:
            target.offsets.jitter = value
        self.restart_jitter()

    @property
    def wrap(self) -> Wrap:
        """Whether the picture continues on the other side, per axis `(Y, X)`, as in `patch_model`. It can be set until `remove`."""
        return self._targets[0].options.wrap

    @wrap.setter
    def wrap(self, value: Wrap) -> None:
        check_wrap("wrap", value)
        if not self.active:
            raise ValueError(f"wrap can be set while the model is patched, which it is not any more, got wrap={value!r}")
        wrap = value[0], value[1]
        check_convolutions(self.parts, wrap)
        self.wrap_attention(wrap)
        set_wrap(self.parts, wrap)

    def wrap_attention(self, wrap: Wrap) -> None:
        """Set `wrap` for the attention alone, for a run that wraps convolutions in its thread.

        Raises:
            NotImplementedError: A model has positions, which end at the border.
        """
        for target in self._targets:
            target.set_wrap(wrap)

    @property
    def parts(self) -> list[nn.Module]:
        """The networks whose convolutions continue on the other side with the attention."""
        return [part for reference in self._parts if (part := reference()) is not None]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the patch. Does nothing if it is already undone, or if a later patch has replaced it."""
        if self.active and any(self.wrap):
            set_wrap(self.parts, NO_WRAP)
        for target in self._targets:
            target.active = False
            restore_class(target.module(), target)
            target.undo_split()
        restore_class(self._model(), self)

    def check(self, *args: Any, **inputs: Any) -> Report:
        """Run the denoiser once without changing anything, and report what its attention calls are: a dry run, at any size.

        Every call runs full attention. The result is thrown away; the random generators, the values of the model's buffers and the
        counts of `report` stay as they are, also after an exception. Hooks of the model and compiled parts run, the latter uncompiled.
        Feature caches of diffusers are emptied before and afterwards.

        Args:
            args, inputs: Arguments of the denoiser's forward pass, such as those of a picture of native size.

        Returns:
            A report whose rows are the modules that called attention: which calls would be computed in windows above the native area,
            and why not the others. Its notes name the numbers of queries and keys, and what else in the model computes attention.

        Raises:
            ValueError: The arguments do not give the layout of the tokens.
            RuntimeError: The model has been garbage-collected.
        """
        return self._targets[0].check(*args, **inputs)

    def check_grid(self, grid: Grid, *, in_windows: bool) -> None:
        """Check that the ranks, if there are any, can share out a pass of the denoiser with this token grid; as in `Target.check_grid`."""
        self._targets[0].check_grid(grid, in_windows=in_windows)

    def restart_jitter(self) -> None:
        """Restart the sequence of patch grid offsets, so that repeating a run repeats its offsets."""
        for target in self._targets:
            target.offsets.restart()

    @property
    def window(self) -> Grid:
        """Key/value window in tokens `(Y, X)` at the denoiser's finest level. It defines the native area."""
        return self._targets[0].native

    @property
    def options(self) -> Options:
        """Options of the attention: implementation, and how text is handled."""
        return self._targets[0].options

    @property
    def groups(self) -> tuple[Any, ...]:
        """The process groups of `mesh=`, first that whose ranks share out rows, at least in the autoencoder. Empty without."""
        return self._targets[0].groups

    @property
    def shares(self) -> Shares:
        """Into how many parts the ranks of `mesh=` split a pass above the native area."""
        return self._targets[0].shares

    @property
    def model(self) -> Any:
        """The pipeline or module that was patched; None once it has been garbage-collected."""
        return self._model()

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return any(target.active for target in self._targets)


def install(handle: Handle, targets: Sequence[Target]) -> None:
    """Patch the networks of a handle, and store the handle in the pipeline."""
    for target in targets:
        module = target.module()
        assert module is not None
        target.handle = handle
        patch_class(module, target, denoiser_methods)
        target.active = True
    if any(handle.wrap):
        set_wrap(handle.parts, handle.wrap)
    model = handle.model
    if model is not None and not isinstance(model, nn.Module):
        model.__dict__[ATTRIBUTE] = handle
