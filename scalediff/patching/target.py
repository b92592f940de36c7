"""One patched denoiser: what its forward passes look like, what becomes of their calls, and what there is to report."""

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
from scalediff.families.grid import Grid, Unreadable, patch_of, window_of
from scalediff.patching.interception import Pass, close_pass, current, open_pass
from scalediff.patching.plan import Call, Options, Plan
from scalediff.patching.report import Row
from scalediff.settings import Attention, Jitter

_PLANS = 64  # kept per denoiser: sizes in use, times the offsets of the jitter


class Patch(Protocol):
    """What a target is a part of; it removes all of it."""

    @property
    def model(self) -> Any: ...

    def remove(self) -> None: ...


class Offsets:
    """How far the patch grid of a pass is moved, in patches: one offset per step, which is told by its input tensor.

    The passes of one step, with and without the prompt, see the same grid: guidance would amplify the difference.
    """

    def __init__(self, jitter: Jitter, seed: int) -> None:
        self.jitter, self._seed = jitter, seed
        self.restart()

    def restart(self) -> None:
        """Begin again, as after patching."""
        self._random = random.Random(self._seed)
        self._of: tuple[weakref.ref[Tensor], int] | None = None
        self._fraction = (0.0, 0.0)
        self._steps = 0

    def next(self, of: Tensor) -> tuple[float, float]:
        version = 0 if of.is_inference() else of._version
        if self.jitter != "none" and (self._of is None or self._of[0]() is not of or self._of[1] != version):
            self._of = weakref.ref(of), version
            if self.jitter == "random":
                self._fraction = self._random.random(), self._random.random()
            else:
                self._fraction = (0.5, 0.5) if self._steps % 2 else (0.0, 0.0)
            self._steps += 1
        return self._fraction


class Target:
    """A patched denoiser, seen by the passes it runs.

    Args:
        denoiser: The network; held weakly.
        family: How its passes are laid out.
        native: Its native token grid.
        prefix: Its name in the pipeline, for the report.
        parameters: The names of its forward pass's arguments.
        options: What `patch_model` was asked for.
        jitter, seed: How the patch grid moves from step to step.
        strict: An unlisted model whose first large pass has no call to take raises; otherwise it warns.
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
        self._said: set[str] = set()  # why something ran full attention
        self._most = 0  # calls of a pass
        self._taken = -1  # calls of the pass before

    @property
    def active(self) -> bool:
        """Whether its denoiser is patched by it."""
        return self in _active

    @active.setter
    def active(self, value: bool) -> None:
        (_active.add if value else _active.discard)(self)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass | None:
        """Open the pass of a forward that exceeds the native area; None where the forward is to run as it is."""
        entered = current()
        if not self.active or self.attention == "full" or (entered is not None and entered.owner is self):
            return None
        laid_out = self._plan(module, {**dict(zip(self._parameters, args, strict=False)), **kwargs})
        return None if laid_out is None else open_pass(self, *laid_out)

    def end(self, module: nn.Module, entered: Pass, finished: bool) -> None:
        """Close the pass, whatever was raised in it; of a finished one see what it has shown."""
        close_pass(entered)
        if finished:
            self._conclude(module, entered)

    def _plan(self, module: nn.Module, arguments: Mapping[str, Any]) -> tuple[Plan, Tensor | None] | None:
        try:
            layout = self.family.layout(module, arguments, self._read)
            like = next((x for x in _tensors(arguments.values()) if x.is_floating_point()), None)
            if like is None:
                raise Unreadable("it was given no floating point tensor")
        except Unreadable as why:
            if why.tokens is None or why.tokens > self.native[0] * self.native[1]:
                self._warn_once(type(module).__name__, str(why))
            return None
        except (AttributeError, IndexError, KeyError, TypeError) as why:  # arguments that the family has never seen
            self._warn_once(type(module).__name__, f"its arguments do not say how tokens lie: {why!r}")
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
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = Plan(layout, self.native, fraction, self._rotation, like, self.options)
        return plan, layout.weights

    def took(self, entered: Pass, call: Call) -> None:
        """A call is about to be computed in windows."""
        entered.taken += 1
        if entered.with_gradients and _checkpoints():
            raise NotImplementedError(_CHECKPOINTING)
        if self._taken < 0:
            self.seen.setdefault(self._caller(), call)

    def left(self, entered: Pass, why: str) -> None:
        """A call that looks like self-attention runs full attention; that is said at once, unless an error may be due."""
        if _kind(why) in self._said or _kind(why) in map(_kind, entered.left.values()):
            return
        if self._on_trial:
            entered.left[self._caller()] = why
        else:
            self._warn_once(self._caller(), why)

    @property
    def _on_trial(self) -> bool:
        """In the first large pass of an unlisted model under `strict`."""
        return self._strict and not self.family.listed and self._taken < 0

    def _conclude(self, module: nn.Module, entered: Pass) -> None:
        """What a whole pass has shown."""
        if entered.untaken:
            self._warn_once(f"an attention call of the compiled {type(module).__name__}", entered.untaken)
        if entered.taken != self._taken and not entered.traced and not entered.untaken:
            self._name_obstacles(module)
            none = f"no call of scaled_dot_product_attention had the tokens of {entered.plan.grids}"
            if entered.taken == 0 and self._on_trial:
                self._taken = 0
                why = next(iter(entered.left.values()), none)
                raise ValueError(f"nothing was patched: {why}, in {type(module).__name__}; the pass ran full attention")
            for name, why in entered.left.items():
                self._warn_once(name, why)
            if entered.taken == 0 and self._most == 0 and not self._said:
                self._warn_once(type(module).__name__, none)
        self._taken, self._most = entered.taken, max(entered.taken, self._most)

    def _name_obstacles(self, module: nn.Module) -> None:
        """Processors may have been replaced since the model was patched."""
        for site in self.family.sites(module):
            if site.obstacle and site.role in ("self", "joint"):
                self._warn_once(self.prefix + site.name, site.obstacle)

    def _warn_once(self, name: str, why: str) -> None:
        """Once for every reason, with the first module that it concerns."""
        if _kind(why) not in self._said:
            self._said.add(_kind(why))
            warnings.warn(f"scalediff: {name} runs full attention: {why}", stacklevel=3)

    def _caller(self) -> str:
        """The module whose forward is running: the innermost attention module on the stack, or the innermost module of ours."""
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
        """For the report: the attention modules, or the callers that have been seen where nobody listed them."""
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
    """Whether a model is patched, anywhere in the process."""
    return len(_active) > 0


CONTEXT_PARALLEL = (
    "context parallelism splits text and image over the ranks and joins them interleaved, where no window can be cut: "
    "patch_model does not work with it yet"
)


_CHECKPOINTING = (
    "gradient checkpointing computes blocks a second time, after the forward pass, where their attention is not patched: "
    "disable it, or use torch.no_grad()"
)


def _checkpoints() -> bool:
    """Whether this call is made from within torch.utils.checkpoint."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _kind(why: str) -> str:
    """A reason without the shapes of one call."""
    return why.partition(", got")[0]


def is_context_parallel(module: nn.Module) -> bool:
    """Whether diffusers' context parallelism is on."""
    return getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None) is not None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
