"""The attention of one patched model in ComfyUI: a plan for every pass of its network, and the attention calls that the plan computes.

ComfyUI calls a network through wrappers, which see its arguments and so the token grid, and its attention through an override in
`transformer_options`, which sees queries, keys and values. The wrapper leaves the pass in `transformer_options` for the override.

Legend: B batch, S tokens of a sequence, H heads, G key heads, D head dim.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalediff import AttentionPlan, Layout, TextRotation
from scalediff.comfy.networks import Network, tokens_behind
from scalediff.families.grid import Grid, UnknownLayout
from scalediff.settings import Jitter
from scalediff_kernels.neighborhood.api import TextQueries

KEY = "scalediff"  # of the wrapper, and of the pass in transformer_options
SLOT = "optimized_attention_override"

_MAX_PLANS = 64  # cached per patched model: picture sizes in use, times the offsets of the jitter
_MASKED = -1e4  # a score bias at most this large hides a key: its softmax weight underflows to zero


@dataclass
class PassCalls:
    """The attention calls of one pass above the native size. Inside compiled graphs they are not counted.

    Attributes:
        plan: What is computed in windows, and how.
        behind: Tokens that follow the image where text precedes it.
        taken: Numbers of queries and keys of the calls that were computed in windows, and how many.
        left: Why calls of image tokens ran full attention, and how many.
        others: Numbers of queries and keys of all other calls, and how many.
        taken_in_graph, left_in_graph: Whether a compiled graph computed calls in windows, or image tokens with full attention.
    """

    plan: AttentionPlan
    behind: int = 0
    taken: dict[tuple[int, int], int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    others: dict[tuple[int, int], int] = field(default_factory=dict)
    taken_in_graph: bool = False
    left_in_graph: bool = False

    @property
    def count(self) -> int:
        """Number of calls of image tokens."""
        return sum(self.taken.values()) + sum(self.left.values())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float | None, enable_gqa: bool) -> Tensor | None:
        """Compute a call `[B, S, H, D]` in windows; None if the caller must compute it."""
        lengths = q.shape[1], k.shape[1]
        images = [sequence.lengths for sequence in self.plan.layout.sequences]
        moved = self.behind if lengths == images[0] else 0
        if moved:  # the plan has all text on one side of the image
            q, k, v = (x.roll(moved, dims=1) for x in (q, k, v))
            mask = mask if mask is None or mask.shape[-1] == 1 else mask.roll(moved, dims=-1)
        out = self.plan(q, k, v, mask=None if mask is None else _as_key_mask(mask), scale=scale, enable_gqa=enable_gqa)
        of_image = lengths in images or (lengths[0] == lengths[1] and lengths[0] >= images[0][1])
        self._count(lengths, out is not None, of_image)
        return out.roll(-moved, dims=1) if moved and out is not None else out

    def _count(self, lengths: tuple[int, int], taken: bool, of_image: bool) -> None:
        if torch.compiler.is_compiling():  # a counter would compile the graph anew at every call
            if taken:
                self.taken_in_graph = True
            elif of_image:
                self.left_in_graph = True
        elif taken:
            self.taken[lengths] = self.taken.get(lengths, 0) + 1
        elif of_image:
            self.left[self.plan.why] = self.left.get(self.plan.why, 0) + 1
        else:
            self.others[lengths] = self.others.get(lengths, 0) + 1


class Around:
    """ComfyUI's DIFFUSION_MODEL wrapper of a `WindowedAttention`. It is not compiled with the network, which may be."""

    def __init__(self, attention: WindowedAttention) -> None:
        self.attention = attention
        self._around: Callable[..., Any] = torch.compiler.disable(attention.around, recursive=False)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's contract: the executor of the network's forward, or of the next wrapper, and the arguments."""
        return self._around(executor, *args, **kwargs)


class WindowedAttention:
    """Neighborhood patch attention in one model: the wrapper around its network, and the attention override.

    Args:
        network: What is known about the class of the network.
        net: The network.
        window: Key/value window `(Y, X)` in tokens at the finest level.
        text_queries: As in `scalediff.AttentionPlan`.
        text_rope: Rotate text for each window, if the network has rotary positions.
        jitter: How the patch grid moves from step to step, as in `scalediff.patch_model`.
        seed: Seed of the random offsets.
        strict: Raise an error where a pass above the native size has no call in windows; log a warning when False.
        chained: The attention override of an earlier node, which computes the calls that are not computed in windows.
    """

    def __init__(
        self,
        network: Network,
        net: Any,
        window: Grid,
        *,
        text_queries: TextQueries = "window",
        text_rope: bool = True,
        jitter: Jitter = "none",
        seed: int = 0,
        strict: bool = True,
        chained: Callable[..., Any] | None = None,
    ) -> None:
        self.network, self.window, self.chained = network, window, chained
        self.name, self.blocks = type(net).__name__, network.blocks(net)
        self.rotation: TextRotation | None = network.rotation(net) if text_rope else None
        self.last: PassCalls | None = None  # of the last pass above the native size
        self.problem = ""  # why the last pass above the native size ran full attention; empty if it did not
        self._text_queries, self._jitter, self._seed, self._strict = text_queries, jitter, seed, strict
        self._plans: dict[Any, AttentionPlan] = {}
        self._warned = set[str]()

    def __deepcopy__(self, memo: dict[int, Any]) -> WindowedAttention:
        """Copies of a model share this object: ComfyUI copies the options of a model with it, and nothing here belongs to one copy."""
        return self

    def around(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network's forward: plan the pass, and check its calls afterwards."""
        arguments = _named(executor.original, args, kwargs)
        options = arguments["transformer_options"]
        calls = self._begin(executor.class_obj, arguments, options)
        if calls is None:
            return executor(*args, **kwargs)
        options[KEY] = calls
        try:
            out = executor(*args, **kwargs)
        finally:
            del options[KEY]
        self._end(calls, options)
        return out

    def __call__(
        self,
        func: Callable[..., Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,  # ComfyUI's contract: it may pass more to every attention function
    ) -> Any:
        """Compute one attention call (ComfyUI's `optimized_attention_override`), or pass it on.

        Args:
            func: The attention function that was called.
            q, k, v: `[B, S, H D]`, keys and values also `[B, S, G D]`; `[B, H, S, D]` and `[B, G, S, D]` with `skip_reshape`.
            heads: H.
            mask: Mask that broadcasts to `[B, H, S, S]`; axes of size one may be missing.
            attn_precision: Ignored in windows: there, scores are always computed in fp32.
            skip_reshape, skip_output_reshape: Whether heads have an axis of their own.
            **kwargs: `transformer_options`, `scale`, `enable_gqa` and whatever else the attention function takes.

        Returns:
            `[B, S, H D]`; `[B, H, S, D]` with `skip_output_reshape`.
        """
        calls = (kwargs.get("transformer_options") or {}).get(KEY)
        if calls is not None:
            if skip_reshape:
                parts = [x.transpose(1, 2) for x in (q, k, v)]
            else:
                parts = [x.unflatten(-1, (-1, q.shape[-1] // heads)) for x in (q, k, v)]
            options = {"scale": kwargs.get("scale"), "enable_gqa": kwargs.get("enable_gqa", False)}
            out = calls.attend(*parts, mask=mask, **options)
            if out is not None:
                return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)
        rest = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        if self.chained is not None:
            return self.chained(func, q, k, v, heads, **rest, **kwargs)
        return func(q, k, v, heads, **rest, **kwargs)

    def report(self) -> str:
        """What the last pass above the native size did, as text."""
        text = f"{self.name}: windows of {self.window[0]} x {self.window[1]} tokens"
        text += ", text rotated for each window" if self.rotation is not None else ""
        if self.last is None and not self.problem:
            return f"{text}\nno pass above the native size yet"
        if self.problem:
            text += f"\nfull attention: {self.problem}"
        if self.last is not None:
            text += "\n" + "\n".join(self._lines(self.last))
        return text

    def _lines(self, calls: PassCalls) -> list[str]:
        grid = calls.plan.grid
        lines = [f"last pass: {grid[0]} x {grid[1]} tokens"]
        if calls.taken_in_graph or calls.left_in_graph:
            kinds = ["in windows"] * calls.taken_in_graph + ["with full attention"] * calls.left_in_graph
            lines.append(f"calls {' and '.join(kinds)} inside compiled graphs, which are not counted")
        else:
            lines.append(f"{sum(calls.taken.values())} of {self.blocks} attention blocks in windows")
        lines += [f"  calls of {keys} tokens: {count}" for (_, keys), count in calls.taken.items()]
        lines += [f"  calls with full attention: {count}, {why}" for why, count in calls.left.items()]
        lines += [f"  other calls of {queries} queries and {keys} keys: {count}" for (queries, keys), count in calls.others.items()]
        return lines

    def _begin(self, net: Any, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> PassCalls | None:
        """The calls of a pass, to be counted; None for a pass that runs full attention."""
        try:
            layout = self.network.layout(net, arguments)
            if layout.grid[0] * layout.grid[1] <= self.window[0] * self.window[1]:
                return None
            self._check_positions(options)
        except UnknownLayout as why:
            if why.tokens is None or why.tokens > self.window[0] * self.window[1]:
                self._fail(str(why))
            return None
        plan = self._plan(layout, _offset(self._jitter, self._seed, options), arguments["x"])
        return PassCalls(plan, tokens_behind(self.network, net, layout.grid))

    def _check_positions(self, options: Mapping[str, Any]) -> None:
        rope = options.get("rope_options") or {}
        if self.rotation is not None and any(rope.get(name, 1.0) != 1.0 for name in ("scale_y", "scale_x")):
            raise UnknownLayout("another node rescales rotary positions, and text is rotated for unscaled ones: turn text_rope off")

    def _plan(self, layout: Layout, offset: tuple[float, float], x: Tensor) -> AttentionPlan:
        key = layout, offset, x.device, x.dtype
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            options: dict[str, Any] = {"text_rope": self.rotation, "text_queries": self._text_queries, "offset": offset}
            plan = AttentionPlan(layout, window=self.window, **options)
            self._plans[key] = plan.to(x.device, x.dtype)
        return self._plans[key]

    def _end(self, calls: PassCalls, options: Mapping[str, Any]) -> None:
        """Check the calls of a finished pass."""
        self.last, self.problem = calls, ""
        if not calls.taken and not calls.taken_in_graph:
            self._fail(self._why_nothing(calls, options))
        if calls.left or calls.left_in_graph:
            why = "; ".join(calls.left) or "a mask or a number of tokens inside a compiled graph"
            self._warn(why, "some attention calls ran in full: ")
        in_graph = calls.taken_in_graph or calls.left_in_graph
        if not in_graph and 0 < calls.count < self.blocks:
            missing = f"{self.blocks - calls.count} of {self.blocks} attention blocks did not use the attention override"
            self._warn(f"{missing}: another node replaces or skips them")

    def _why_nothing(self, calls: PassCalls, options: Mapping[str, Any]) -> str:
        slot = options.get(SLOT)
        if slot is not self:
            by = "removed it" if slot is None else f"replaced it by {getattr(slot, '__qualname__', type(slot).__qualname__)}"
            return f"the attention override is missing, a later node {by}: put ScaleDiff: Patch Model behind that node"
        if calls.left:
            return "; ".join(calls.left)
        if not calls.others:
            return "no attention call used the attention override"
        seen = ", ".join(f"{queries} queries and {keys} keys" for queries, keys in calls.others)
        return f"no attention call had the tokens of {calls.plan.grids}, got {seen}"

    def _fail(self, why: str) -> None:
        self.problem = why
        if self._strict:
            raise RuntimeError(f"ScaleDiff: {self.name} ran with full attention above its native size: {why}")
        self._warn(why, "full attention above the native size: ")

    def _warn(self, why: str, prefix: str = "") -> None:
        """Log a warning, once per reason."""
        if why not in self._warned:
            self._warned.add(why)
            logging.warning("ScaleDiff: %s: %s%s", self.name, prefix, why)


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; ComfyUI passes them by position or by name, depending on the network and the version."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _as_key_mask(mask: Tensor) -> Tensor:
    """A mask with four axes; boolean if it is a score bias that only hides keys, which is what ComfyUI makes of the masks of prompts."""
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask[:, None] if mask.ndim == 3 else mask
    if mask.dtype == torch.bool or mask.shape[-2] != 1 or torch.compiler.is_compiling():  # inside a graph values are unknown
        return mask
    hidden = mask <= _MASKED
    return ~hidden if bool((hidden | (mask == 0)).all()) else mask


def _offset(jitter: Jitter, seed: int, options: Mapping[str, Any]) -> tuple[float, float]:
    """The offset `(Y, X)` of the patch grid in a pass, as a fraction of a patch. It only depends on the noise level.

    So the conditional and the unconditional pass of a step, which may be two calls, have the same patches.
    """
    if jitter == "none":
        return 0.0, 0.0
    missing = [name for name in ("sigmas", "sample_sigmas") if options.get(name) is None]
    if missing:
        raise ValueError(f"{jitter=} needs the noise levels that ComfyUI's samplers pass to the model: {', '.join(missing)} missing")
    sigma = options["sigmas"].flatten()[0]
    if jitter == "random":
        fractions = random.Random(f"{seed} {float(sigma)}")
        return fractions.random(), fractions.random()
    done = int((options["sample_sigmas"].to(sigma) > sigma).sum())
    return (0.5, 0.5) if done % 2 else (0.0, 0.0)
