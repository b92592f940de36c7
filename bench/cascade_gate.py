"""What a method must draw before it is timed.

Windows, in a stage: one of twice the native size, as the method draws it, against the same stage with attention in a higher precision:
fp32 beside models of 16 bits, fp64 beside fp32. Its error may be twice that of torch's own attention in the model's precision, and four
times where blocks are compiled, for there every operation rounds elsewhere. So the authors' form and ours are the same picture. Rounding
of 16 bits grows through a network and could hide a small mistake, so that windows are held to their definition as well: on random
tensors, in the model's precision, against the reference in fp64. Padded jitter has other windows in every call, and is held to the
definition alone, at one offset. Views: MultiDiffusion whose views do not overlap is direct inference on every quarter of its noise; its
averages, and DemoFusion's phases above the first, which is direct inference here, are held to their definitions by the project's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.cascade_authors import Authors
from bench.cascade_methods import METHODS, Drawn, Method
from scalediff import plan
from scalediff.families import family_of
from scalediff.hooks import denoiser_of
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention

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
        return self.error <= self.allowed


class Gate:
    """The gates of one model; what results are compared with is drawn once, with the blocks as they come."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn
        self._exact, self._eager = cache(self._draw_exact), cache(self._draw_eager)

    def prepare(self, method: Method) -> None:
        """Draw what the method will be compared with."""
        if method.attention == "npa" and method.authors != "jitter":
            self._exact(method.text_queries)
            self._eager(method.text_queries)

    def check(self, method: Method, *, compiled: bool = False) -> Iterator[Verdict]:
        """None for what is the pipeline's own call with its own attention."""
        if method.kind in ("views", "phases"):
            yield self._quarters() if method.kind == "views" else self._native(method)
        if method.attention == "npa":
            yield self._definition(method)
        if method.attention == "npa" and method.authors != "jitter":
            exact, eager = self._exact(method.text_queries), self._eager(method.text_queries)
            actual = self._drawn.stage(method, steps=STEPS)
            allowed = _SLACK[compiled] * _distance(eager, exact) + _rounding(exact)
            yield Verdict("stage", _distance(actual, exact), allowed, "a stage of twice the native size, attention in higher precision")

    def _draw_exact(self, rule: str) -> Tensor:
        with _computed_by(_wider):
            return self._drawn.stage(_windows(rule), steps=STEPS)

    def _draw_eager(self, rule: str) -> Tensor:
        with _computed_by(_torchs_own):
            return self._drawn.stage(_windows(rule), steps=STEPS)

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
        found = ours
        if method.authors:
            theirs = Authors(denoiser, offset=offset if method.authors == "jitter" else None)
            found = theirs.joint if self._drawn.joint else theirs.image
        precise = {**how, "impl": "reference"} | ({"text_rope": rope or None} if self._drawn.joint else {})
        actual, eager = _outputs(found(*tensors, **how)), _outputs(ours(*tensors, **how, impl="reference"))
        exact = _outputs(ours(*(x.double() for x in tensors), **precise))
        pairs = [(_distance(a, x), 2 * _distance(e, x) + _rounding(x, dtype)) for a, e, x in zip(actual, eager, exact, strict=True)]
        error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1])
        return Verdict("definition", error, allowed, f"the definition at offset {offset}, on random tensors")


def _windows(rule: str) -> Method:
    return next(m for m in METHODS.values() if m.attention == "npa" and not m.authors and m.text_queries == rule)


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference; infinite where one is not finite."""
    difference = (x.double() - y.double()).abs().max().item()
    return difference if difference == difference else float("inf")


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
