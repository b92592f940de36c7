"""What a method must draw before it is timed.

Windows: one stage of twice the native size, as the method draws it, against the same stage with attention in a higher precision: fp32
beside models of 16 bits, fp64 beside fp32. Its error may be twice that of torch's own attention in the model's precision, and four times
where blocks are compiled, for there every operation rounds elsewhere. So the authors' form and ours are the same picture. Padded jitter
has other windows in every call, and is held to the definition at one offset instead. Views: at the native size MultiDiffusion and
DemoFusion are direct inference.
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


class Verdict(NamedTuple):
    """Of one gate: the largest error, how large it may be, and what was compared."""

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

    def check(self, method: Method, *, compiled: bool = False) -> Verdict | None:
        """None where the method is the pipeline's own attention and own call."""
        if method.kind in ("views", "phases"):
            return self._native(method)
        if method.authors == "jitter":
            return self._definition()
        if method.attention != "npa":
            return None
        exact, eager = self._exact(method.text_queries), self._eager(method.text_queries)
        actual = self._drawn.stage(method, steps=STEPS)
        allowed = _SLACK[compiled] * _distance(eager, exact) + torch.finfo(actual.dtype).eps * exact.abs().max().item()
        return Verdict(_distance(actual, exact), allowed, "a stage of twice the native size, with attention in higher precision")

    def _draw_exact(self, rule: str) -> Tensor:
        with _computed_by(_wider):
            return self._drawn.stage(_windows(rule), steps=STEPS)

    def _draw_eager(self, rule: str) -> Tensor:
        with _computed_by(_torchs_own):
            return self._drawn.stage(_windows(rule), steps=STEPS)

    def _native(self, method: Method) -> Verdict:
        side = self._drawn.native[0]
        direct, found = (self._drawn.draw(one, side, steps=STEPS)[-1].latents for one in (METHODS["direct"], method))
        rounding = torch.finfo(direct.dtype).eps * direct.abs().max().item()
        return Verdict(_distance(found, direct), rounding, "direct inference at the native size")

    def _definition(self) -> Verdict:
        """The authors' padded canvas at one offset, on random tensors, held to the reference in fp64."""
        denoiser, device, dtype = denoiser_of(self._drawn.pipe), self._drawn.device, self._drawn.subject.dtype
        family = family_of(denoiser)
        rotation = None if family is None else family.rotation(denoiser)
        assert rotation is not None, "padded jitter is for models that turn their text"
        rng = torch.Generator().manual_seed(0)
        grid, window, patch, offset, text, dim = (16, 12), (8, 8), (4, 4), (1, 3), 5, rotation.channels
        q, k, v = (torch.randn(1, *grid, 2, dim, generator=rng).to(device, dtype) for _ in range(3))
        texts = [torch.randn(1, text, 2, dim, generator=rng).to(device, dtype) for _ in range(3)]
        cos, sin = (x.to(device, torch.float32) for x in rotation.tables(grid, window, window, patch, offset))
        how: dict[str, Any] = {"window": window, "patch": patch}
        found = Authors(denoiser, offset=offset).joint(q, k, v, *texts, text_rope=(cos, sin), **how)
        how |= {"offset": offset, "text_rope": (cos, sin), "impl": "reference"}
        eager = joint_neighborhood_patch_attention(q, k, v, *texts, **how)
        how["text_rope"] = cos.double(), sin.double()
        exact = joint_neighborhood_patch_attention(*(x.double() for x in (q, k, v, *texts)), **how)
        errors, limits = [], []
        for actual, plain, truth in zip(found, eager, exact, strict=True):
            assert actual is not None
            assert plain is not None
            assert truth is not None
            errors.append(_distance(actual, truth))
            limits.append(2 * _distance(plain, truth) + torch.finfo(dtype).eps * truth.abs().max().item())
        worst = max(range(2), key=lambda i: errors[i] / limits[i])
        return Verdict(errors[worst], limits[worst], f"the definition at offset {offset}, on random tensors")


def _windows(rule: str) -> Method:
    return next(m for m in METHODS.values() if m.attention == "npa" and not m.authors and m.text_queries == rule)


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference; infinite where one is not finite."""
    difference = (x.double() - y.double()).abs().max().item()
    return difference if difference == difference else float("inf")


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
