"""Drawn problems for the attention kernels: inputs, the two answers to compare with, and a run that says which path it took."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.config import block_config
from scalediff_kernels.neighborhood.geometry import PatchWindow, windows
from scalediff_kernels.neighborhood.reference import joint_neighborhood_patch_attention_reference, neighborhood_patch_attention_reference
from scalediff_kernels.testing import assert_within_budget, poisoned_memory

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# On a GPU: the kernel that the table chooses, and the kernels in plain Triton. The interpreter, which runs the latter alone, stands for a
# GPU without descriptors and for one with them.
TARGETS = [None, "triton"] if GPU else ["sm_80", "sm_90"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    grid: Pair
    window: Pair
    patch: Pair
    offset: Pair
    dim: int
    batch: int = 1
    heads: int = 2
    groups: int = 2
    text: int = 0
    rope: bool = False
    rule: str | None = None
    scale: float | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    wrap: tuple[bool, bool] = (False, False)

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "patch": self.patch,
            "offset": self.offset,
            "wrap": self.wrap,
            "scale": self.dim**-0.5 if self.scale is None else self.scale,
        }

    @property
    def patches(self) -> Pair:
        rows, columns = (len(axis) for axis in self.spans)
        return rows, columns

    @property
    def spans(self) -> tuple[tuple[PatchWindow, ...], tuple[PatchWindow, ...]]:
        """Patches and windows of rows and of columns."""
        axes = zip(self.grid, self.window, self.patch, self.offset, self.wrap, strict=True)
        rows, columns = (windows(n, w, p, o, wrap=on) for n, w, p, o, on in axes)
        return rows, columns

    @property
    def programs(self) -> int:
        """Of image and text queries together, for patches of one tile."""
        return self.batch * self.heads * prod(self.patches) * (2 if self.rule == "window" else 1)

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and, with text, text_q, text_k, text_v."""
        rng = torch.Generator().manual_seed(0)
        sizes = [(self.grid, n) for n in (self.heads, self.groups, self.groups)]
        if self.layout == "joint":  # text and image cut out of one sequence, as a joint model holds them
            shapes = [(self.batch, self.text + self.grid[0] * self.grid[1], heads, self.dim) for _, heads in sizes]
            whole = [torch.randn(shape, generator=rng).to(DEVICE, self.dtype) for shape in shapes]
            return *(x[:, self.text :].unflatten(1, self.grid) for x in whole), *(x[:, : self.text] for x in whole)
        sizes += [((self.text,), n) for n in (self.heads, self.groups, self.groups)] if self.text else []
        return tuple(self._laid_out((self.batch, *tokens, heads, self.dim), rng) for tokens, heads in sizes)

    def _laid_out(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        x = torch.randn(shape, generator=rng).to(DEVICE, self.dtype)
        if self.layout == "heads first":  # [B, H, S, D] in memory
            return x.movedim(-2, 1).contiguous().movedim(1, -2)
        if self.layout == "sequence":  # cut out of one sequence, between other tokens
            flat = x.flatten(1, -3)
            other = torch.full_like(flat[:, :1], float("nan")).expand(-1, 3, -1, -1)
            return torch.cat([other, flat, other], dim=1)[:, 3:-3].unflatten(1, shape[1:-2])
        if self.layout == "expanded":  # one batch seen by all
            return x[:1].expand(shape)
        if self.layout == "odd":  # neighbours in memory that no aligned load may assume
            return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
        if self.layout == "packed":  # a third of a packed qkv
            return torch.cat([torch.full_like(x, float("nan")), x], dim=-2)[..., shape[-2] :, :]
        return x

    def tables(self) -> tuple[Tensor, Tensor] | None:
        if not self.rope:
            return None
        angles = torch.rand(*self.patches, self.dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6.3
        return angles.cos(), angles.sin()


def draw(seed: int, target: str | None, *, most_programs: int = 64) -> Problem:
    """For a target with descriptors mostly what they can read: 16 bits, windows of 4 x 4 at least, aligned rows.

    The interpreter runs one program after another, hence the limit.
    """
    rng = random.Random(seed)
    return next(problem for problem in iter(lambda: _draw(rng, target), None) if problem.programs <= most_programs)


def _draw(rng: random.Random, target: str | None) -> Problem:
    boxes = target == "sm_90" and rng.random() < 0.9
    axes = []
    for _ in range(2):
        length = rng.randint(4 if boxes else 1, 14)
        window = rng.randint(4 if boxes else 1, length + 3)
        patch = rng.randint(1, window)
        axes.append((length, window, patch, rng.randrange(patch)))
    groups, text = rng.choice([1, 2]), rng.choice([0, 0, 1, 5, 16, 23])
    return Problem(
        *zip(*axes, strict=True),  # type: ignore[arg-type]
        dim=rng.choice([8, 16, 24, 32, 40]),
        batch=rng.choice([1, 1, 2]),
        heads=groups * rng.choice([1, 2]),
        groups=groups,
        text=text,
        rope=text > 0 and rng.random() < 0.5,
        rule=rng.choice(["window", "global", None]) if text else None,
        scale=rng.choice([None, None, 0.7, -0.4, 0.0]),
        layout=rng.choice(["contiguous", "contiguous", "heads first", "packed", "sequence"] + ["odd", "expanded"] * (not boxes)),
        dtype=torch.float16 if boxes else rng.choice([torch.float32, torch.float16]),
    )


PATHS: list[str] = []  # of the launches, as they were chosen


def run(problem: Problem, target: str | None, inputs: tuple[Tensor, ...] | None = None, **options: Any) -> Any:
    """Image and text of the kernels; `target` as in TARGETS."""
    from scalediff_kernels.neighborhood import launch

    choose = launch.launch_config  # type: ignore[attr-defined]

    def noted(problem: Any, device: str, path: Any) -> Any:
        config = choose(problem, device, path) if target is None else block_config(problem, device)
        PATHS.append(config.path)
        return config

    tensors = inputs or problem.inputs()
    with pytest.MonkeyPatch.context() as patched, poisoned_memory():
        patched.setattr(launch, "launch_config", noted)
        if not GPU:
            patched.setattr("scalediff_kernels.neighborhood.op.device_name", lambda device: target)
        if problem.text:
            return joint_neighborhood_patch_attention(
                *tensors, **problem.arguments, text_rope=problem.tables(), text_queries=problem.rule, **options, impl="triton"
            )  # type: ignore[misc]
        image = neighborhood_patch_attention(*tensors, **problem.arguments, **options, impl="triton")
        return image if options else (image, None)


def expected(problem: Problem, *, exact: bool) -> tuple[Tensor, Tensor | None]:
    """The reference in fp64, or plain torch in the dtype itself, rounding at every operation.

    The rounding of few sums is a matter of luck, which differs between CPUs. So plain torch sums the scores in several orders, and the
    least exact result counts.
    """
    truth = _in_fp64(problem)
    if exact:
        return truth
    inputs = problem.inputs()
    images, texts = zip(*(eager(problem, *inputs, channels=order) for order in channel_orders(problem.dim)), strict=True)
    return least_exact(images, truth[0]), None if truth[1] is None else least_exact(texts, truth[1])


def channel_orders(dim: int) -> list[Tensor]:
    return [torch.randperm(dim, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(16)]


def least_exact(results: Iterable[Tensor], truth: Tensor) -> Tensor:
    return max(results, key=lambda result: (result.double() - truth).abs().max().item())


@lru_cache(1)  # a test needs it for both
def _in_fp64(problem: Problem) -> tuple[Tensor, Tensor | None]:
    tensors, rope = [x.double() for x in problem.inputs()], problem.tables()
    if not problem.text:
        return neighborhood_patch_attention_reference(*tensors, **problem.arguments), None
    double = None if rope is None else (rope[0].double(), rope[1].double())
    return joint_neighborhood_patch_attention_reference(*tensors, **problem.arguments, text_rope=double, text_queries=problem.rule)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, channels: Tensor) -> Tensor:
    """Attention that rounds at every operation, with the products of a score summed in the order of `channels`."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q[..., channels], k[..., channels]).mul(scale).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def eager(problem: Problem, q: Tensor, k: Tensor, v: Tensor, *text: Tensor, channels: Tensor) -> tuple[Tensor, Tensor | None]:
    attend = partial(plain_attention, scale=problem.arguments["scale"], channels=channels)

    def turn(x: Tensor, i: int, j: int) -> Tensor:
        rope = problem.tables()
        if rope is None:
            return x
        cos, sin = (table[i, j].to(x.dtype) for table in rope)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def box(y0: int, y1: int, x0: int, x1: int) -> tuple[slice, Tensor, Tensor]:
        rows, columns = (torch.arange(a, b, device=q.device) % n for a, b, n in zip((y0, x0), (y1, x1), problem.grid, strict=True))
        return slice(None), rows[:, None], columns

    out, texts = torch.empty_like(q), []
    rows, columns = problem.spans
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        for j, (x0, x1, key_x0, key_x1) in enumerate(columns):
            keys, values = (x[box(key_y0, key_y1, key_x0, key_x1)].flatten(1, 2) for x in (k, v))
            if text:
                keys, values = torch.cat([turn(text[1], i, j), keys], 1), torch.cat([text[2], values], 1)
                texts.append(attend(turn(text[0], i, j), keys, values))
            place = box(y0, y1, x0, x1)
            out[place] = attend(q[place].flatten(1, 2), keys, values).unflatten(1, (y1 - y0, x1 - x0))
    if problem.rule == "global":
        return out, attend(text[0], torch.cat([text[1], k.flatten(1, 2)], 1), torch.cat([text[2], v.flatten(1, 2)], 1))
    return out, sum(texts[1:], texts[0]) / len(texts) if problem.rule == "window" else None


def assert_path(target: str | None) -> None:
    """The last launch took the path that its target has."""
    if not GPU:
        assert PATHS[-1] == {"sm_80": "pointer", "sm_90": "descriptor"}[target]  # type: ignore[index]


def assert_right(problem: Problem, target: str | None) -> None:
    results, exacts, eagers = run(problem, target), expected(problem, exact=True), expected(problem, exact=False)
    for result, exact, plain in zip(results, exacts, eagers, strict=True):
        assert (result is None) == (exact is None)
        if result is not None and exact is not None and plain is not None:
            assert_within_budget(result, plain, exact)


CHOSEN = [
    Problem((12, 12), (8, 8), (4, 4), (0, 0), 16),
    Problem((12, 12), (8, 8), (4, 4), (1, 3), 64, dtype=torch.float16),  # tiles that hang over the grid on the near side
    Problem((4, 8), (2, 4), (1, 2), (0, 1), 8),
    Problem((13, 7), (5, 3), (3, 2), (2, 1), 24, dtype=torch.float16),
    Problem((7, 11), (5, 6), (4, 5), (3, 4), 40, batch=2, dtype=torch.float16),
    Problem((9, 9), (9, 9), (4, 4), (1, 2), 72, heads=1, groups=1),
    Problem((6, 10), (64, 64), (32, 32), (31, 7), 24),
    Problem((1, 23), (1, 7), (1, 3), (0, 2), 16),
    Problem((7, 7), (6, 6), (3, 3), (1, 1), 32, heads=3, groups=1, text=9, rope=True, rule="window", dtype=torch.float16),
    Problem((10, 8), (4, 8), (2, 4), (1, 0), 48, heads=4, groups=2, text=20, rope=True, rule="global", layout="heads first"),
    Problem((6, 6), (4, 4), (2, 2), (0, 1), 96, text=3, rule="window", layout="packed", dtype=torch.float16),
    Problem((4, 12), (4, 8), (2, 8), (0, 3), 32, text=20, rope=True, rule="window", layout="joint", dtype=torch.float16),
    Problem((5, 6), (4, 4), (2, 2), (0, 0), 136, heads=1, groups=1, text=17, rope=True, rule="window", dtype=torch.float16),
    Problem((5, 6), (4, 4), (2, 2), (1, 0), 256, heads=1, groups=1, layout="odd"),
]
