"""The Triton attention kernels against the fp64 reference and against NATTEN, in the interpreter or on a GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.testing import assert_within_budget
from tests.kernels.neighborhood.problems import CHOSEN, DEVICE, GPU, PATHS, TARGETS, Problem, assert_path, assert_right, draw, expected, run

pytest.importorskip("triton", reason="Triton has no build for this platform")

IN_FP32 = [problem for problem in CHOSEN if problem.dtype is torch.float32]  # one launch for all targets


@pytest.mark.skipif(GPU, reason="a device is one target")
@pytest.mark.parametrize("problem", IN_FP32, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}")
def test_in_fp32_targets_with_descriptors_have_the_launch_of_those_without(problem: Problem) -> None:
    """So the launch for one target stands for all; only the tensors that it writes are others."""
    from scalediff_kernels.neighborhood.launch import image_launch, text_launch
    from scalediff_kernels.neighborhood.strides import aligned

    def numbers(launch: Launch) -> dict[str, Any]:
        return {name: x for name, x in launch.arguments.items() if not isinstance(x, torch.Tensor)}

    q, k, v, *text = map(aligned, problem.inputs())
    rope = problem.tables()
    images = [image_launch(torch.empty_like(q), q, k, v, *text[1:], rope, **problem.arguments, device=target) for target in TARGETS]
    assert images[0].config == images[1].config
    assert numbers(images[0]) == numbers(images[1])
    if problem.text:
        whole = problem.arguments | ({"window": problem.grid, "patch": problem.grid} if problem.rule == "global" else {})
        texts = [text_launch(torch.empty_like(text[0]), text[0], k, v, *text[1:], rope, **whole, device=target) for target in TARGETS]
        assert texts[0].config == texts[1].config
        assert numbers(texts[0]) == numbers(texts[1])


@pytest.mark.parametrize(
    ("problem", "target"),
    [
        pytest.param(problem, target, id=f"{problem.grid[0]}x{problem.grid[1]}-D{problem.dim}-T{problem.text}-{target}")
        for problem in CHOSEN
        for target in (TARGETS[:1] if problem in IN_FP32 else TARGETS)
    ],
)
def test_chosen_problems_keep_the_error_budget(problem: Problem, target: str | None) -> None:
    assert_right(problem, target)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_problems_keep_the_error_budget(seed: int) -> None:
    target = TARGETS[seed % len(TARGETS)]
    assert_right(draw(seed, target, most_programs=20), target)


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
    problem = Problem((11, 9), (7, 6), (3, 2), (1, 1), 16, heads=1, groups=1, dtype=torch.float16)
    q, k, v = problem.inputs()
    clean = run(problem, target)[0]
    assert_path(target)
    rows, columns = windows(11, 7, 3, 1), windows(9, 6, 2, 1)
    for y0, y1, key_y0, key_y1 in rows[::3]:
        for x0, x1, key_x0, key_x1 in columns[::4]:
            outside = torch.ones(11, 9, dtype=torch.bool, device=DEVICE)
            outside[key_y0:key_y1, key_x0:key_x1] = False
            poisoned = [x.masked_fill(outside[None, :, :, None, None], float("nan")) for x in (k, v)]
            out = run(problem, target, (q, *poisoned))[0]
            assert torch.equal(out[:, y0:y1, x0:x1], clean[:, y0:y1, x0:x1])


@pytest.mark.parametrize("target", TARGETS)
def test_rotating_text_by_zero_changes_nothing(target: str | None) -> None:
    problem = Problem((6, 6), (4, 4), (2, 2), (0, 0), 16, text=5, rule="window", dtype=torch.float16)
    plain = run(problem, target)
    assert_path(target)
    zero = torch.zeros(3, 3, 8, device=DEVICE)
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


@pytest.mark.parametrize("part_windows", [1, 4, 6])
@pytest.mark.parametrize("target", TARGETS)
def test_windows_of_text_queries_in_parts(target: str | None, part_windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six windows in parts of one, in one of four and one of two, and all in one."""
    from scalediff_kernels.neighborhood import launch

    choose = launch.launch_config  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "launch_config", lambda *arguments: choose(*arguments)._replace(part_windows=part_windows))
    assert_right(Problem((8, 12), (4, 8), (4, 4), (0, 0), 16, text=19, rope=True, rule="window", dtype=torch.float16), target)
