"""The Triton kernels: drawn problems against the fp64 reference, in the interpreter or on a GPU; torch's operators around them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.neighborhood.reference import joint_neighborhood_patch_attention_reference, neighborhood_patch_attention_reference
from scalediff_kernels.testing import assert_within_budget, poisoned_memory

pytest.importorskip("triton", reason="Triton has no build for this platform")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# What the interpreter stands for: one GPU without descriptors, one with them. A real GPU is itself.
TARGETS = [None] if GPU else ["sm_80", "sm_90"]

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

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "patch": self.patch,
            "offset": self.offset,
            "scale": self.dim**-0.5 if self.scale is None else self.scale,
        }

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and, with text, text_q, text_k, text_v."""
        rng = torch.Generator().manual_seed(0)
        sizes = [(self.grid, n) for n in (self.heads, self.groups, self.groups)]
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
        patches = [len(windows(n, w, p, o)) for n, w, p, o in zip(self.grid, self.window, self.patch, self.offset, strict=True)]
        angles = torch.rand(*patches, self.dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6.3
        return angles.cos(), angles.sin()


def draw(seed: int, target: str | None) -> Problem:
    """For a target with descriptors mostly what they can read: 16 bits, windows of 4 x 4 at least, aligned rows."""
    rng = random.Random(seed)
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


def run(problem: Problem, target: str | None, inputs: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor | None]:
    """Image and text of the kernels; `target` names the GPU that the interpreter plays."""
    from scalediff_kernels.neighborhood import launch

    choose = launch.launch_config  # type: ignore[attr-defined]

    def noted(*arguments: Any) -> Any:
        config = choose(*arguments)
        PATHS.append(config.path)
        return config

    tensors = inputs or problem.inputs()
    with pytest.MonkeyPatch.context() as patched, poisoned_memory():
        patched.setattr(launch, "launch_config", noted)
        if target:
            patched.setattr("scalediff_kernels.neighborhood.launch.device_name", lambda device: target)
        if problem.text:
            return joint_neighborhood_patch_attention(
                *tensors, **problem.arguments, text_rope=problem.tables(), text_queries=problem.rule, impl="triton"
            )  # type: ignore[misc]
        return neighborhood_patch_attention(*tensors, **problem.arguments, impl="triton"), None


def expected(problem: Problem, *, exact: bool) -> tuple[Tensor, Tensor | None]:
    """The reference in fp64, or plain torch in the dtype itself, rounding at every operation."""
    tensors = [x.double() if exact else x for x in problem.inputs()]
    if exact and problem.text:
        rope = problem.tables()
        double = None if rope is None else (rope[0].double(), rope[1].double())
        return joint_neighborhood_patch_attention_reference(*tensors, **problem.arguments, text_rope=double, text_queries=problem.rule)
    if exact:
        return neighborhood_patch_attention_reference(*tensors, **problem.arguments), None
    return eager(problem, *tensors)


def eager(problem: Problem, q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> tuple[Tensor, Tensor | None]:
    scale, repeat = problem.arguments["scale"], problem.heads // problem.groups

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(scale).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    def turn(x: Tensor, i: int, j: int) -> Tensor:
        rope = problem.tables()
        if rope is None:
            return x
        cos, sin = (table[i, j].to(x.dtype) for table in rope)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    out, texts = torch.empty_like(q), []
    rows, columns = (windows(*axis) for axis in zip(problem.grid, problem.window, problem.patch, problem.offset, strict=True))
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        for j, (x0, x1, key_x0, key_x1) in enumerate(columns):
            keys, values = (x[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2) for x in (k, v))
            if text:
                keys, values = torch.cat([turn(text[1], i, j), keys], 1), torch.cat([text[2], values], 1)
                texts.append(attend(turn(text[0], i, j), keys, values))
            out[:, y0:y1, x0:x1] = attend(q[:, y0:y1, x0:x1].flatten(1, 2), keys, values).unflatten(1, (y1 - y0, x1 - x0))
    if problem.rule == "global":
        return out, attend(text[0], torch.cat([text[1], k.flatten(1, 2)], 1), torch.cat([text[2], v.flatten(1, 2)], 1))
    return out, sum(texts[1:], texts[0]) / len(texts) if problem.rule == "window" else None


def assert_path(target: str | None) -> None:
    """The last launch took the path that its target has."""
    if target:
        assert PATHS[-1] == {"sm_80": "pointer", "sm_90": "descriptor"}[target]


def assert_right(problem: Problem, target: str | None) -> None:
    results, exacts, eagers = run(problem, target), expected(problem, exact=True), expected(problem, exact=False)
    for result, exact, plain in zip(results, exacts, eagers, strict=True):
        assert (result is None) == (exact is None)
        if result is not None and exact is not None and plain is not None:
            assert_within_budget(result, plain, exact)


CHOSEN = [
    Problem((16, 16), (8, 8), (4, 4), (0, 0), 16),
    Problem((16, 16), (8, 8), (4, 4), (1, 3), 64, dtype=torch.float16),  # tiles that hang over the grid on the near side
    Problem((4, 8), (2, 4), (1, 2), (0, 1), 8),
    Problem((13, 7), (5, 3), (3, 2), (2, 1), 24, dtype=torch.float16),
    Problem((11, 17), (7, 6), (4, 5), (3, 4), 40, batch=2, dtype=torch.float16),
    Problem((9, 9), (9, 9), (4, 4), (1, 2), 72, heads=1, groups=1),
    Problem((6, 10), (64, 64), (32, 32), (31, 7), 24),
    Problem((1, 23), (1, 7), (1, 3), (0, 2), 16),
    Problem((12, 12), (6, 6), (3, 3), (1, 1), 32, heads=4, groups=1, text=9, rope=True, rule="window", dtype=torch.float16),
    Problem((10, 8), (4, 8), (2, 4), (1, 0), 48, heads=4, groups=2, text=20, rope=True, rule="global", layout="heads first"),
    Problem((8, 8), (4, 4), (2, 2), (0, 1), 96, text=3, rule="window", layout="packed", dtype=torch.float16),
    Problem((5, 6), (4, 4), (2, 2), (0, 0), 136, heads=1, groups=1, text=17, rope=True, rule="window", dtype=torch.float16),
    Problem((5, 6), (4, 4), (2, 2), (1, 0), 256, heads=1, groups=1, layout="odd"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("problem", CHOSEN, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}")
def test_chosen_problems_keep_the_error_budget(problem: Problem, target: str | None) -> None:
    assert_right(problem, target)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_problems_keep_the_error_budget(seed: int) -> None:
    target = TARGETS[seed % len(TARGETS)]
    assert_right(draw(seed, target), target)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_drawn_problems_keep_the_error_budget(block: int) -> None:
    PATHS.clear()
    for seed in range(1000 + 30 * block, 1030 + 30 * block):
        target = TARGETS[seed % len(TARGETS)]
        assert_right(draw(seed, target), target)
    if not GPU:
        assert 0.3 < PATHS.count("descriptor") / len(PATHS) < 0.7, "both paths must be drawn"


def natten_problem(seed: int) -> Problem:
    """Within NATTEN's domain: no offset, windows inside the grid, head dims powers of two; every other one for descriptors."""
    rng = random.Random(seed)
    least, axes = 4 if seed % 2 else 2, []
    for _ in range(2):
        length = rng.randint(least, 14)
        window = rng.randint(least, length)
        axes.append((length, window, rng.randint(1, window), 0))
    dtype = torch.float16 if seed % 2 else torch.float32
    return Problem(*zip(*axes, strict=True), dim=rng.choice([8, 16, 32]), dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_natten_agrees(seed: int) -> None:
    """An independent implementation of the same windows, in fp32 on the CPU, in the place of our own reference."""
    natten = pytest.importorskip("natten", reason="pip install --no-build-isolation --no-deps natten (needs cmake)")
    problem = natten_problem(seed)
    q, k, v = problem.inputs()
    scale = problem.arguments["scale"]
    exact = natten.na2d(*(x.cpu().float() for x in (q, k, v)), kernel_size=problem.window, stride=problem.patch, scale=scale)
    target = TARGETS[seed % len(TARGETS)]
    ours = run(problem, target)[0].cpu()
    if problem.dtype is torch.float32:  # theirs is rounded as ours is: torch's own tolerance for fp32
        torch.testing.assert_close(ours, exact)
    else:
        assert_path(target)
        assert_within_budget(ours, expected(problem, exact=False)[0].cpu(), exact.double())


@pytest.mark.parametrize("target", TARGETS)
def test_a_query_sees_its_window_and_nothing_else(target: str | None) -> None:
    """NaN in every key outside a patch's window must not reach the patch: boxes that do not tile the window stay inside it."""
    problem = Problem((14, 13), (7, 6), (3, 2), (1, 1), 16, heads=1, groups=1, dtype=torch.float16)
    q, k, v = problem.inputs()
    clean = run(problem, target)[0]
    assert_path(target)
    rows, columns = windows(14, 7, 3, 1), windows(13, 6, 2, 1)
    for y0, y1, key_y0, key_y1 in rows[::3]:
        for x0, x1, key_x0, key_x1 in columns[::5]:
            outside = torch.ones(14, 13, dtype=torch.bool, device=DEVICE)
            outside[key_y0:key_y1, key_x0:key_x1] = False
            poisoned = [x.masked_fill(outside[None, :, :, None, None], float("nan")) for x in (k, v)]
            out = run(problem, target, (q, *poisoned))[0]
            assert torch.equal(out[:, y0:y1, x0:x1], clean[:, y0:y1, x0:x1])


@pytest.mark.parametrize("target", TARGETS)
def test_rotating_text_by_zero_changes_nothing(target: str | None) -> None:
    problem = Problem((8, 8), (4, 4), (2, 2), (0, 0), 16, text=5, rule="window", dtype=torch.float16)
    plain = run(problem, target)
    assert_path(target)
    zero = torch.zeros(4, 4, 8, device=DEVICE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Problem, "tables", lambda self: (zero.cos(), zero.sin()))
        turned = run(problem, target)
    for a, b in zip(plain, turned, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_batches_more_than_two_billion_elements_apart() -> None:
    """A batch stride above 2^31: the storage is never touched between the two, so it costs address space and no memory."""
    if GPU and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    problem = Problem((6, 5), (4, 4), (2, 2), (0, 0), 8, batch=2, heads=1, groups=1, dtype=torch.float16)
    q, k, v = problem.inputs()
    far = []
    for x in (q, k, v):
        apart = torch.empty(2**31 + 4096, dtype=x.dtype, device=DEVICE).as_strided(x.shape, (2**31 + 8, *x.stride()[1:]))
        far.append(apart.copy_(x))
    for target in TARGETS:
        assert torch.equal(run(problem, target, tuple(far))[0], run(problem, target)[0])
        assert_path(target)


@pytest.mark.parametrize("with_text", [False, True])
def test_opcheck(with_text: bool) -> None:
    problem = Problem((6, 5), (3, 3), (2, 2), (1, 0), 8, text=4, rope=True)
    q, k, v, text_q, text_k, text_v = problem.inputs()
    cos, sin = problem.tables() or (None, None)
    numbers = ([3, 3], [2, 2], [1, 0], 0.3)
    torch.library.opcheck(
        torch.ops.scalediff.image_attention.default,
        (q, k, v, text_k, text_v, cos, sin, *numbers) if with_text else (q, k, v, None, None, None, None, *numbers),
    )
    if with_text:
        torch.library.opcheck(torch.ops.scalediff.text_attention.default, (text_q, k, v, text_k, text_v, cos, sin, *numbers))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    def double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * neighborhood_patch_attention(q + 0, k, v, window=(4, 4), patch=(2, 2), offset=(1, 0), impl="triton")

    compiled = torch.compile(double, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for grid in ((8, 8), (6, 9), (7, 11)):
        q, k, v = Problem(grid, (4, 4), (2, 2), (1, 0), 16).inputs()
        with torch.no_grad():
            assert torch.equal(compiled(q, k, v), double(q, k, v))


def test_joint_attention_compiles_to_one_graph() -> None:
    problem = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8, text=3, rope=True, rule="window")
    tensors, rope = problem.inputs(), problem.tables()

    def call(*tensors: Tensor) -> Any:
        return joint_neighborhood_patch_attention(*tensors, window=(4, 4), patch=(2, 2), text_rope=rope, impl="triton")

    for ours, plain in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors), call(*tensors), strict=True):
        assert torch.equal(ours, plain)


def test_inference_mode() -> None:
    q, k, v = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs()
    plain = neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")
    with torch.inference_mode():
        assert torch.equal(neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton"), plain)


def test_auto_works_on_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs())
    assert neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2)).shape == q.shape


def test_a_patch_larger_than_the_grid_costs_no_programs() -> None:
    from scalediff_kernels.neighborhood.launch import image_launch

    problem = Problem((6, 5), (4096, 4096), (4096, 4096), (5, 0), 16)
    q, k, v = problem.inputs()
    assert image_launch(torch.empty_like(q), q, k, v, **problem.arguments, device="sm_80").programs <= 16
    assert_right(problem, TARGETS[0])


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("rule", ["window", "global"])
def test_joint_attention_under_autocast(impl: Any, rule: Any) -> None:
    """The kernel and SDPA compute and return autocast's dtype, text and image alike; the reference stays what it is."""
    tensors = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8, text=3, rule=rule).inputs()
    with torch.autocast(DEVICE, dtype=torch.float16):  # not bf16, which the interpreter gets wrong
        results = joint_neighborhood_patch_attention(*tensors, window=(4, 4), patch=(2, 2), text_queries=rule, impl=impl)
    plain = joint_neighborhood_patch_attention(*tensors, window=(4, 4), patch=(2, 2), text_queries=rule, impl="reference")
    for result, exact in zip(results, plain, strict=True):
        assert result is not None
        assert exact is not None
        assert result.dtype == (torch.float32 if impl == "reference" else torch.float16)
        torch.testing.assert_close(result.float(), exact, rtol=0.05 * (impl != "reference"), atol=0.05 * (impl != "reference"))


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_autocast_computes_in_its_dtype(impl: Any) -> None:
    q, k, v = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs()
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl=impl)
    low = neighborhood_patch_attention(q.half(), k.half(), v.half(), window=(4, 4), patch=(2, 2), impl=impl)
    assert out.dtype == torch.float16
    assert torch.equal(out, low)


def test_gradients_take_the_differentiable_path_or_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs())
    neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2)).sum().backward()
    assert q.grad is not None
    with pytest.raises(NotImplementedError, match=r"no backward pass.*torch.no_grad\(\) or impl='auto'"):
        neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")
    with torch.no_grad():
        neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), r"takes fp16, bf16 and fp32, got q.dtype=torch.float64"),
        (lambda x: x[..., :12], r"multiples of 8, got D=12"),
        (lambda x: x.repeat(1, 1, 1, 1, 20), r"from 8 to 256.*got D=320"),
        (lambda x: x.transpose(1, 4).contiguous().transpose(1, 4), r"contiguous last axis, got strides"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_in_words(change: Any, message: str) -> None:
    q, k, v = (change(x) for x in Problem((6, 6), (4, 4), (2, 2), (0, 0), 16).inputs())
    with pytest.raises(NotImplementedError, match=message):
        neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")
    assert neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2)).shape == q.shape  # auto does it in another way


def test_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 4, 4, 1, 8)
    with pytest.raises(NotImplementedError, match=r"needs a CUDA or ROCm device.*device\(type='cpu'\)"):
        neighborhood_patch_attention(x, x, x, window=(2, 2), patch=(1, 1), impl="triton")


SANITIZED = """
import torch
from scalediff_kernels import joint_neighborhood_patch_attention as joint
half, brain = torch.float16, torch.bfloat16
for dim, dtype, window in ((64, half, (8, 8)), (40, brain, (7, 5)), (128, brain, (8, 8)), (16, torch.float32, (5, 6))):
    q, k, v = (torch.randn(1, 19, 14, 2, dim, device="cuda", dtype=dtype) for _ in range(3))
    text = [torch.randn(1, 9, 2, dim, device="cuda", dtype=dtype) for _ in range(3)]
    for rule in ("window", "global"):
        joint(q, k, v, *text, window=window, patch=(4, 4), offset=(1, 3), text_queries=rule, impl="triton")
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA or ROCm device")
class TestOnTheGpu:
    """What only a device can show. bf16 is here alone: the interpreter's descriptor loads of it are broken."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("problem", CHOSEN, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}")
    def test_every_dtype(self, problem: Problem, dtype: torch.dtype) -> None:
        assert_right(Problem(**(vars(problem) | {"dtype": dtype})), None)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128, 160, 256])
    def test_windows_of_the_paper(self, dim: int, dtype: torch.dtype) -> None:
        assert_right(Problem((96, 80), (64, 64), (32, 32), (5, 17), dim, text=77, rope=True, rule="window", dtype=dtype), None)

    def test_the_same_bits_every_run(self) -> None:
        problem = Problem((96, 96), (64, 64), (32, 32), (0, 0), 64, text=77, rope=True, rule="window", dtype=torch.bfloat16)
        first = run(problem, None)
        for _ in range(5):
            for a, b in zip(first, run(problem, None), strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b)

    def test_cuda_graphs_capture_it(self) -> None:
        tensors = Problem((64, 64), (32, 32), (16, 16), (0, 0), 64, text=77, dtype=torch.float16).inputs()

        def call() -> tuple[Tensor, Tensor | None]:
            return joint_neighborhood_patch_attention(*tensors, window=(32, 32), patch=(16, 16), impl="triton")

        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for out in captured:
            assert out is not None
            out.zero_()
        graph.replay()
        for out, plain in zip(captured, expected, strict=True):
            assert out is not None
            assert plain is not None
            assert torch.equal(out, plain)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_inductor(self, dynamic: bool) -> None:
        def double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return 2 * neighborhood_patch_attention(q + 0, k, v, window=(8, 8), patch=(4, 4), impl="triton")

        compiled = torch.compile(double, fullgraph=True, dynamic=dynamic)
        for grid in ((16, 16), (24, 20)):
            q, k, v = Problem(grid, (8, 8), (4, 4), (0, 0), 64, dtype=torch.float16).inputs()
            assert torch.equal(compiled(q, k, v), double(q, k, v))

    @pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
    def test_compute_sanitizer(self, tool: str) -> None:
        if shutil.which("compute-sanitizer") is None:
            pytest.skip("compute-sanitizer is not installed")
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        # Without torch's caching allocator, so that every tensor has borders; with this checkout on the path.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

    def test_no_memory_beyond_the_result(self) -> None:
        q, k, v = Problem((128, 128), (64, 64), (32, 32), (0, 0), 64, heads=8, groups=8, dtype=torch.float16).inputs()
        neighborhood_patch_attention(q, k, v, window=(64, 64), patch=(32, 32), impl="triton")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = neighborhood_patch_attention(q, k, v, window=(64, 64), patch=(32, 32), impl="triton")
        assert torch.cuda.max_memory_allocated() - before == out.nbytes
