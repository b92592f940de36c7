"""What a method must draw before it is timed.

`stage`: a stage of twice the native size with the method's windows, against the same one with attention in higher precision: fp32 for
models of 16 bits, fp64 for fp32. The error may be twice that of torch's own attention in the model's precision, and four times where
blocks are compiled, because there every operation rounds differently. Rounding of 16 bits grows through a network and could hide a small
mistake, so windows are also compared alone, on random tensors in the model's precision: `definition`, a small call with the reference;
`size`, the call of every layer at the size that is timed with the sample of fp64 attention that `bench.attention.gate` takes. Padded
jitter has other windows in every call, so it has only `definition`, at one offset. `quarters`: MultiDiffusion without overlap is direct
inference on every quarter of its noise. `native`: the first phase of DemoFusion is direct inference. The averages and later phases are
checked by the project's tests; direct inference and full attention are torch's own and have no gate.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from bench.attention import gate
from bench.attention.shapes import Shape, Task
from bench.cascade.authors import Authors
from bench.cascade.methods import METHODS, Drawn, Method
from scalediff.patching import call
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.api import TextQueries
from scalediff_kernels.testing import poisoned_memory

STEPS = 2
_SAME_PASSES = 8  # roundings: the same passes in the same batches, but kernels may be chosen by strides


class Verdict(NamedTuple):
    """The result of one gate: the largest error, how large it may be, and what was compared with."""

    name: str
    error: float
    allowed: float
    what: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.allowed) and self.error <= self.allowed


class Gate:
    """The gates of one model. What results are compared with is drawn once, by blocks that are not compiled."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn
        self._reference = cache(self._draw)
        self._layers: set[Shape] = set()  # every attention call of the stage that is compared

    def prepare(self, method: Method) -> None:
        """Draw what the method will be compared with."""
        if method.attention == "npa" and method.repeatable:
            for wider in (False, True):
                self._reference(method.text_queries, wider)

    def check(self, method: Method, size: int, *, compiled: bool = False) -> Iterator[Verdict]:
        """The verdicts on a method for a picture of `size` pixels."""
        if method.kind == "views":
            found, expected = self._drawn.quarters(steps=STEPS)
            allowed = _SAME_PASSES * _rounding(expected)
            yield Verdict("quarters", _distance(found, expected), allowed, "direct inference on each quarter of the noise")
        if method.kind == "phases":
            direct, found = (self._drawn.draw(one, self._drawn.native, steps=STEPS)[-1].latents for one in (METHODS["direct"], method))
            yield Verdict("native", _distance(found, direct), _rounding(direct), "direct inference at the native size")
        if method.attention == "npa":
            yield self._definition(method)
        if method.attention == "npa" and method.repeatable:
            self.prepare(method)
            yield self._at_size(method, size)
            eager, exact = (self._reference(method.text_queries, wider) for wider in (False, True))
            what = "a stage of twice the native size, attention in higher precision"
            yield _worst("stage", [(self._drawn.stage(method, steps=STEPS), eager, exact)], what, slack=4.0 if compiled else 2.0)

    def _draw(self, rule: TextQueries, wider: bool) -> Tensor:
        """The stage with windows computed by torch's attention, never by the backend under test."""

        def plain(function: Callable[..., Any], q: Tensor, k: Tensor, *others: Tensor, **how: Any) -> Any:
            """Compute a call as it is and keep its shape, or, if `wider`, in a higher precision and round the result."""
            how["impl"] = "sdpa"
            if wider:
                precise = torch.float64 if q.dtype == torch.float32 else torch.float32
                tensors, how = tree_map_only(Tensor, lambda x: x.to(precise), ((q, k, *others), how))
                return tree_map_only(Tensor, lambda x: x.to(q.dtype), function(*tensors, **how))
            (batch, y, x, heads, dim), text = q.shape, others[1].shape[1] if len(others) > 1 else 0
            groups = 0 if k.shape[3] == heads else k.shape[3]
            self._layers.add(Shape((y, x), how["window"], how["patch"], heads, dim, batch, text, groups, q.dtype))
            return function(q, k, *others, **how)

        image, joint = (partial(plain, function) for function in (neighborhood_patch_attention, joint_neighborhood_patch_attention))
        backends = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
        windows = mock.patch.multiple(call, neighborhood_patch_attention=image, joint_neighborhood_patch_attention=joint)
        with windows, backends if self._drawn.device == "cuda" else nullcontext():
            return self._drawn.stage(replace(METHODS["npa"], text_queries=rule), steps=STEPS)

    def _attention(self, method: Method, offset: tuple[int, int] | None = None) -> Callable[..., Any]:
        """The method's attention as a pass calls it."""
        if method.authors:
            theirs = Authors(self._drawn.rotation, offset=None if method.repeatable else offset)
            return theirs.joint if self._drawn.joint else theirs.image
        ours = joint_neighborhood_patch_attention if self._drawn.joint else neighborhood_patch_attention
        return partial(ours, impl=self._drawn.impl)

    def _at_size(self, method: Method, size: int) -> Verdict:
        """The windows of every layer on the grid that is timed, against a sample of attention in fp64."""
        rule, twice = method.text_queries if self._drawn.joint else "", 2 * self._drawn.native
        shapes = {replace(one, grid=(one.grid[0] * size // twice, one.grid[1] * size // twice)) for one in self._layers}
        what = f"attention in fp64, a sample of {len(shapes)} kinds of layer at {size} pixels"
        triples: list[tuple[Tensor, Tensor, Tensor]] = []
        for shape in shapes:
            inputs = Task("layer", shape, shape.dtype, self._drawn.device, rule).inputs(0)
            how: dict[str, Any] = {"window": shape.window, "patch": shape.patch}
            how |= {"text_rope": inputs.rope, "text_queries": rule} if rule else {}
            with poisoned_memory():
                image, *text = _outputs(self._attention(method)(*inputs.image, *(inputs.text if rule else ()), **how))
            if not all(out.isfinite().all() for out in (image, *text)):
                return Verdict("size", math.inf, 0.0, f"{what}: the result has NaN or infinite values")
            samples = zip(gate.truth(inputs, "window"), (image.flatten(1, 2), *text), strict=False)
            triples += [(out[:, sample.tokens], sample.eager, sample.exact) for sample, out in samples if sample is not None]
        return _worst("size", triples, what)

    def _definition(self, method: Method) -> Verdict:
        """On random tensors: the method's attention, and the reference in its precision, against the reference in fp64."""
        joint, rotation, device = self._drawn.joint, self._drawn.rotation, self._drawn.device
        grid, window, patch, offset = (16, 12), (8, 8), (4, 4), (0, 0) if method.authors == "plain" else (1, 3)
        rng, dim = torch.Generator().manual_seed(0), 64 if rotation is None else rotation.channels
        tokens: list[tuple[int, ...]] = [grid] * 3 + ([(5,)] * 3 if joint else [])
        tensors = [torch.randn(1, *one, 2, dim, generator=rng).to(device, self._drawn.subject.dtype) for one in tokens]
        rope = None if rotation is None else [x.to(device) for x in rotation.tables(grid, window, window, patch, offset)]
        how: dict[str, Any] = {"window": window, "patch": patch, "offset": offset}
        how |= {"text_queries": method.text_queries, "text_rope": rope and tuple(x.float() for x in rope)} if joint else {}
        reference = partial(joint_neighborhood_patch_attention if joint else neighborhood_patch_attention, impl="reference")
        actual, eager = _outputs(self._attention(method, offset)(*tensors, **how)), _outputs(reference(*tensors, **how))
        exact = _outputs(reference(*(x.double() for x in tensors), **how | ({"text_rope": rope and tuple(rope)} if joint else {})))
        return _worst("definition", list(zip(actual, eager, exact, strict=True)), f"the definition at offset {offset}, on random tensors")


def _worst(name: str, triples: list[tuple[Tensor, Tensor, Tensor]], what: str, *, slack: float = 2.0) -> Verdict:
    """The worst of (actual, eager, exact): an error may be `slack` times that of eager and a rounding."""
    pairs = [
        (_distance(actual, exact), slack * _distance(eager, exact) + _rounding(exact, eager.dtype)) for actual, eager, exact in triples
    ]
    error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1] if math.isfinite(pair[1]) else math.inf)
    return Verdict(name, error, allowed, what)


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference; infinite where one is NaN."""
    return torch.nan_to_num((x.double() - y.double()).abs().max(), nan=math.inf, posinf=math.inf).item()


def _rounding(x: Tensor, dtype: torch.dtype | None = None) -> float:
    """One rounding of the largest element in a dtype, its own by default."""
    return torch.finfo(dtype or x.dtype).eps * x.abs().max().item()


def _outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
