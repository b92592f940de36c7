"""What a method must draw before it is timed.

Windows, in a stage: one of twice the native size, as the method draws it, against the same stage with attention in a higher precision:
fp32 beside models of 16 bits, fp64 beside fp32. Its error may be twice that of torch's own attention in the model's precision, and four
times where blocks are compiled, for there every operation rounds elsewhere. So the authors' form and ours are the same picture. Rounding
of 16 bits grows through a network and could hide a small mistake, so that windows are held to their definition as well, in the model's
precision, on random tensors: small ones against the reference, and those of every layer at the very size that is timed against the
sample of fp64 attention that `bench.attention.gate` takes. Padded jitter has other windows in every call, and is held to the definition
at one offset alone. Views: MultiDiffusion whose views do not overlap is direct inference on every quarter of its noise; its averages,
and DemoFusion's phases above the first, which is direct inference here, are held to their definitions by the project's tests.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention import gate
from bench.attention.shapes import Shape, Task
from bench.cascade.authors import Authors
from bench.cascade.methods import METHODS, Drawn, Method
from scalediff.families import family_of
from scalediff.patching import plan
from scalediff.patching.networks import denoiser_of
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.testing import poisoned_memory

STEPS = 2
_SLACK = {False: 2.0, True: 4.0}  # by whether blocks are compiled
_SAME_PASSES = 8  # roundings: the same passes in the same batches, whose kernels may be chosen by other strides


class Verdict(NamedTuple):
    """Of one gate: its name, the largest error, how large it may be, and what it was compared with."""

    name: str
    error: float
    allowed: float
    what: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.allowed) and self.error <= self.allowed


class Gate:
    """The gates of one model; what results are compared with is drawn once, with the blocks as they come."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn
        self._exact, self._eager = cache(self._draw_exact), cache(self._draw_eager)
        self._layers: dict[Shape, None] = {}  # of the stage that gates draw

    def prepare(self, method: Method) -> None:
        """Draw what the method will be compared with."""
        if method.attention == "npa" and method.authors != "jitter":
            self._exact(method.text_queries)
            self._eager(method.text_queries)

    def check(self, method: Method, size: int, *, compiled: bool = False) -> Iterator[Verdict]:
        """Of a picture of `size` pixels; none for what is the pipeline's own call with its own attention."""
        if method.kind in ("views", "phases"):
            yield self._quarters() if method.kind == "views" else self._native(method)
        if method.attention == "npa":
            yield self._definition(method)
        if method.attention == "npa" and method.authors != "jitter":
            yield self._at_size(method, size)
        if method.attention == "npa" and method.authors != "jitter":
            exact, eager = self._exact(method.text_queries), self._eager(method.text_queries)
            actual = self._drawn.stage(method, steps=STEPS)
            allowed = _SLACK[compiled] * _distance(eager, exact) + _rounding(exact)
            yield Verdict("stage", _distance(actual, exact), allowed, "a stage of twice the native size, attention in higher precision")

    def _draw_exact(self, rule: str) -> Tensor:
        with self._plain_attention(), _computed_by(_wider):
            return self._drawn.stage(_windows(rule), steps=STEPS)

    def _draw_eager(self, rule: str) -> Tensor:
        with self._plain_attention(), _computed_by(lambda function: self._seen(_torchs_own(function))):
            return self._drawn.stage(_windows(rule), steps=STEPS)

    def _plain_attention(self) -> Any:
        """What others are compared with is not computed by the backend under test."""
        plain = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(plain, set_priority=True) if self._drawn.device == "cuda" else nullcontext()

    def _seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Takes down the shape of every call."""

        def call(q: Tensor, k: Tensor, *others: Tensor, **how: Any) -> Any:
            text = others[1].shape[1] if len(others) > 1 else 0
            batch, *grid, heads, dim = q.shape
            groups = 0 if k.shape[3] == heads else k.shape[3]
            self._layers[Shape((grid[0], grid[1]), how["window"], how["patch"], heads, dim, batch, text, groups, q.dtype)] = None
            return function(q, k, *others, **how)

        return call

    def _at_size(self, method: Method, size: int) -> Verdict:
        """Windows of every layer on the grid that is timed, held to a sample of attention in fp64."""
        native = self._drawn.native[0]
        rule = method.text_queries if self._drawn.joint else ""
        self._eager(method.text_queries)
        pairs: list[tuple[float, float]] = []
        shapes = {replace(one, grid=(one.grid[0] * size // (2 * native), one.grid[1] * size // (2 * native))) for one in self._layers}
        for shape in shapes:
            task = Task("layer", shape, shape.dtype, self._drawn.device, rule)
            inputs = task.inputs(0)
            truth = gate.truth(inputs, "window")
            how: dict[str, Any] = {"window": shape.window, "patch": shape.patch}
            how |= {"text_rope": inputs.rope, "text_queries": rule} if rule else {}
            with poisoned_memory():
                found = _outputs(self._attention(method)(*inputs.image, *(inputs.text if rule else ()), **how))
            if not all(out.isfinite().all() for out in found):
                return Verdict("size", math.inf, 0.0, f"attention in fp64: the result has NaN or infinite values at {size} pixels")
            for sample, out in zip((truth.image, truth.text), (found[0].flatten(1, 2), *found[1:]), strict=False):
                if sample is not None:
                    allowed = 2 * _distance(sample.eager, sample.exact) + _rounding(sample.exact, shape.dtype)
                    pairs.append((_distance(out[:, sample.tokens], sample.exact), allowed))
        error, allowed = max(pairs, key=_excess)
        return Verdict("size", error, allowed, f"attention in fp64, a sample of {len(shapes)} kinds of layer at {size} pixels")

    def _attention(self, method: Method, offset: tuple[int, int] | None = None) -> Callable[..., Any]:
        """As a pass calls it."""
        if method.authors:
            theirs = Authors(denoiser_of(self._drawn.pipe), offset=offset if method.authors == "jitter" else None)
            return theirs.joint if self._drawn.joint else theirs.image
        ours = joint_neighborhood_patch_attention if self._drawn.joint else neighborhood_patch_attention
        return partial(ours, impl=self._drawn.impl)

    def _native(self, method: Method) -> Verdict:
        side = self._drawn.native[0]
        direct, found = (self._drawn.draw(one, side, steps=STEPS)[-1].latents for one in (METHODS["direct"], method))
        return Verdict("native", _distance(found, direct), _rounding(direct), "direct inference at the native size")

    def _quarters(self) -> Verdict:
        found, expected = self._drawn.quarters(steps=STEPS)
        allowed = _SAME_PASSES * _rounding(expected)
        return Verdict("quarters", _distance(found, expected), allowed, "direct inference on each quarter of the noise")

    def _definition(self, method: Method) -> Verdict:
        """On random tensors: the method's attention, and the reference in its precision, held to the reference in fp64."""
        denoiser, device, dtype = denoiser_of(self._drawn.pipe), self._drawn.device, self._drawn.subject.dtype
        family = family_of(denoiser)
        rotation = None if family is None else family.rotation(denoiser)
        grid, window, patch, offset = (16, 12), (8, 8), (4, 4), (0, 0) if method.authors == "plain" else (1, 3)
        rng = torch.Generator().manual_seed(0)
        lengths = [grid] * 3 + ([(5,)] * 3 if self._drawn.joint else [])
        dim = 64 if rotation is None else rotation.channels
        tensors = [torch.randn(1, *length, 2, dim, generator=rng).to(device, dtype) for length in lengths]
        rope = () if rotation is None else tuple(x.to(device) for x in rotation.tables(grid, window, window, patch, offset))
        how: dict[str, Any] = {"window": window, "patch": patch, "offset": offset}
        how |= {"text_queries": method.text_queries, "text_rope": tuple(x.float() for x in rope) or None} if self._drawn.joint else {}
        ours = joint_neighborhood_patch_attention if self._drawn.joint else neighborhood_patch_attention
        found = self._attention(method, offset)
        precise = {**how, "impl": "reference"} | ({"text_rope": rope or None} if self._drawn.joint else {})
        actual, eager = _outputs(found(*tensors, **how)), _outputs(ours(*tensors, **how, impl="reference"))
        exact = _outputs(ours(*(x.double() for x in tensors), **precise))
        pairs = [(_distance(a, x), 2 * _distance(e, x) + _rounding(x, dtype)) for a, e, x in zip(actual, eager, exact, strict=True)]
        error, allowed = max(pairs, key=_excess)
        return Verdict("definition", error, allowed, f"the definition at offset {offset}, on random tensors")


def _windows(rule: str) -> Method:
    return next(m for m in METHODS.values() if m.attention == "npa" and not m.authors and m.text_queries == rule)


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference; infinite where one is not finite."""
    difference = (x.double() - y.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def _excess(pair: tuple[float, float]) -> float:
    """Of an error over what is allowed; infinite where that is not finite."""
    error, allowed = pair
    return error / allowed if math.isfinite(allowed) else math.inf


def _rounding(x: Tensor, dtype: torch.dtype | None = None) -> float:
    """One rounding of the largest element, in the dtype that it will have."""
    return torch.finfo(dtype or x.dtype).eps * x.abs().max().item()


def _outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@contextmanager
def _computed_by(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    image, joint = change(neighborhood_patch_attention), change(joint_neighborhood_patch_attention)
    with mock.patch.multiple(plan, neighborhood_patch_attention=image, joint_neighborhood_patch_attention=joint):
        yield


def _wider(function: Callable[..., Any]) -> Callable[..., Any]:
    """In twice the precision, by torch's attention, and rounded after."""

    def call(*tensors: Tensor, **how: Any) -> Any:
        dtype = tensors[0].dtype
        kind = torch.float64 if dtype == torch.float32 else torch.float32
        out = function(*(x.to(kind) for x in tensors), **_with(how, kind))
        return tuple(None if x is None else x.to(dtype) for x in out) if isinstance(out, tuple) else out.to(dtype)

    return call


def _torchs_own(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Tensor, **how: Any) -> Any:
        return function(*tensors, **{**how, "impl": "sdpa"})

    return call


def _with(how: dict[str, Any], kind: torch.dtype) -> dict[str, Any]:
    rope = how.get("text_rope")
    turned = {} if rope is None else {"text_rope": tuple(x.to(kind) for x in rope)}
    return {**how, "impl": "sdpa", **turned}
