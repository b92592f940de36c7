"""Queries that are a part of the grid: they get what they get among all queries, in every implementation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this platform")

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.neighborhood.launch import image_launch, text_launch
from scalediff_kernels.neighborhood.lse import window_log_sum_exp
from scalediff_kernels.neighborhood.reference import attend, rotate_pairs
from scalediff_kernels.testing import assert_within_budget
from tests.kernels.gluon_emulator import run as emulate
from tests.kernels.neighborhood import pipelines, problems
from tests.kernels.neighborhood.problems import GPU, TARGETS, Problem, channel_orders, expected, least_exact, plain_attention, run

Pair = tuple[int, int]


class Part:
    """Queries `[start, stop)` of each axis of a problem, and the keys of their windows alone."""

    def __init__(self, problem: Problem, start: Pair, stop: Pair) -> None:
        self.whole, self.start = problem, start
        axes = zip(problem.grid, problem.window, problem.patch, problem.offset, strict=True)
        spans = [windows(*axis) for axis in axes]
        self.spans = [
            [span for span in of_axis if span.query_stop > a and span.query_start < b]
            for of_axis, a, b in zip(spans, start, stop, strict=True)
        ]
        firsts = [of_axis.index(mine[0]) for of_axis, mine in zip(spans, self.spans, strict=True)]
        keys = [(min(s.key_start for s in mine), max(s.key_stop for s in mine)) for mine in self.spans]
        self.origin = start[0] - keys[0][0], start[1] - keys[1][0]
        offset = tuple(a - (i * p - o) for a, i, p, o in zip(start, firsts, problem.patch, problem.offset, strict=True))
        q, k, v, *self.text = problem.inputs()
        self.area = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        rows, columns = (slice(*pair) for pair in keys)
        self.tensors = q[:, self.area[0], self.area[1]], k[:, rows, columns], v[:, rows, columns]
        tables = problem.tables()
        rows, columns = (slice(i, i + len(mine)) for i, mine in zip(firsts, self.spans, strict=True))
        self.tables = None if tables is None else (tables[0][rows, columns], tables[1][rows, columns])
        grid = stop[0] - start[0], stop[1] - start[1]
        self.problem = replace(problem, grid=grid, offset=offset)

    def windowed_text(self, *, exact: bool) -> Tensor | None:
        """The mean over the part's windows: the definition in fp64, or plain torch as in `problems.expected`."""
        if self.whole.rule != "window":
            return None
        scale, inputs = self.whole.arguments["scale"], self.whole.inputs()
        truth = self._mean(partial(attend, scale=scale), [x.double() for x in inputs])
        if exact:
            return truth
        orders = channel_orders(self.whole.dim)
        return least_exact((self._mean(partial(plain_attention, scale=scale, channels=order), inputs) for order in orders), truth)

    def _mean(self, attention: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        _, k, v, text_q, text_k, text_v = inputs
        outs = []
        for i, y in enumerate(self.spans[0]):
            for j, x in enumerate(self.spans[1]):
                keys, values = (z[:, y.key_start : y.key_stop, x.key_start : x.key_stop].flatten(1, 2) for z in (k, v))
                rotated_q, rotated_k = (rotate_pairs(z, self.tables, i, j) for z in (text_q, text_k))
                outs.append(attention(rotated_q, torch.cat([rotated_k, keys], 1), torch.cat([text_v, values], 1)))
        return torch.stack(outs).mean(0)


def draw(seed: int, problem: Problem) -> Part:
    rng = random.Random(seed)
    start = tuple(rng.randrange(n) for n in problem.grid)
    return Part(problem, start, tuple(rng.randint(a + 1, n) for a, n in zip(start, problem.grid, strict=True)))  # type: ignore[arg-type]


def check(part: Part, image: Tensor, text: Tensor | None) -> None:
    """Both keep the error budget."""
    exact, eager = (expected(part.whole, exact=exact)[0][:, part.area[0], part.area[1]] for exact in (True, False))
    assert_within_budget(image, eager, exact)
    exact_text, eager_text = (part.windowed_text(exact=exact) for exact in (True, False))
    if exact_text is not None and eager_text is not None:
        assert text is not None
        assert_within_budget(text, eager_text, exact_text)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("seed", range(10))
def test_in_fp64(seed: int, impl: Any) -> None:
    """Image, text and log-sum-exp, to rounding."""
    problem = replace(problems.draw(seed, "sm_80"), dtype=torch.float64)
    part = draw(seed, problem)
    how: dict[str, Any] = part.problem.arguments | {"origin": part.origin, "return_lse": True, "impl": impl}
    if problem.text:
        image, text, lse = joint_neighborhood_patch_attention(
            *part.tensors, *part.text, **how, text_rope=part.tables, text_queries=problem.rule
        )
    else:
        (image, lse), text = neighborhood_patch_attention(*part.tensors, **how), None
    whole = expected(problem, exact=True)
    rows, columns = part.area
    torch.testing.assert_close(image, whole[0][:, rows, columns], rtol=1e-12, atol=1e-13)
    q, k, _, *of_text = problem.inputs()
    scores = window_log_sum_exp(q, k, of_text[1] if of_text else None, **problem.arguments, text_rope=problem.tables())
    torch.testing.assert_close(lse, scores[:, rows, columns], rtol=1e-12, atol=1e-13)
    if problem.rule == "window":
        torch.testing.assert_close(text, part.windowed_text(exact=True), rtol=1e-12, atol=1e-13)
    elif problem.rule == "global":  # over the keys that it was given
        assert text is not None
        keys, values = (torch.cat([z, x.flatten(1, 2)], 1) for z, x in zip(part.text[1:], part.tensors[1:], strict=True))
        torch.testing.assert_close(text, attend(part.text[0], keys, values, problem.arguments["scale"]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("seed", range(8))
def test_in_the_kernels(seed: int) -> None:
    target = TARGETS[seed % len(TARGETS)]
    part = draw(seed, problems.draw(seed, target, most_programs=30))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Problem, "tables", lambda self: part.tables)
        found = run(part.problem, target, (*part.tensors, *part.text), origin=part.origin)
    check(part, *(found if part.whole.text else (found, None)))


HOPPER = [
    Part(replace(pipelines.CHOSEN[0], grid=(40, 32)), (8, 0), (24, 32)),
    Part(replace(pipelines.CHOSEN[2], grid=(34, 23)), (3, 5), (31, 23)),
    Part(replace(pipelines.CHOSEN[5], grid=(32, 32)), (8, 0), (24, 32)),
    Part(replace(pipelines.CHOSEN[7], grid=(24, 16)), (12, 0), (24, 16)),
]


@pytest.mark.skipif(GPU, reason="the emulator is for CPUs")
@pytest.mark.parametrize("part", HOPPER, ids=["boxes", "cut", "text", "negative"])
def test_in_the_warp_specialised_kernel(part: Part) -> None:
    text_q, *text = part.text or (None, None, None)
    image = torch.full_like(part.tensors[0], float("nan"))
    outputs = [image, None if text_q is None else torch.full_like(text_q, float("nan"))]
    how = part.problem.arguments | {"origin": part.origin, "device": "sm_90", "path": "warp-specialised"}
    rope = None if part.tables is None else (part.tables[0].contiguous(), part.tables[1].contiguous())
    found = [image_launch(image, *part.tensors, *text, rope, **how)]
    if outputs[1] is not None:
        found.append(text_launch(outputs[1], text_q, *part.tensors[1:], *text, rope, grid=part.problem.grid, **how))
    for launch in found:
        emulate(launch.kernel, (2,), launch.arguments)
        if launch.then:
            launch.then.run()
    check(part, image, outputs[1])


@pytest.mark.parametrize("origin", [(-1, 0), (0, 3)])
def test_queries_outside_the_keys_are_refused(origin: Pair) -> None:
    q, k = torch.zeros(1, 2, 2, 1, 8), torch.zeros(1, 4, 4, 1, 8)
    with pytest.raises(ValueError, match=r"the queries must be among the keys, 2 of 4 from origin on, got origin=(-1|3)"):
        neighborhood_patch_attention(q, k, k, window=(2, 2), patch=(1, 1), origin=origin)
    with pytest.raises(ValueError, match="must have the same shape except for the heads, got"):
        neighborhood_patch_attention(q, k, k, window=(2, 2), patch=(1, 1))
    with pytest.raises(ValueError, match="except for the heads and the grid, that of k and v being one, got"):
        neighborhood_patch_attention(q, k, k[:, :3], window=(2, 2), patch=(1, 1), origin=(0, 0))
