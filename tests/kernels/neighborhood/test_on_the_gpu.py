"""What only a device can show of the attention kernels: bf16, determinism, CUDA graphs, inductor, compute-sanitizer, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.lse import window_log_sum_exp
from tests.kernels.neighborhood import pipelines
from tests.kernels.neighborhood.problems import CHOSEN, GPU, PATHS, TARGETS, Problem, assert_right, run
from tests.kernels.sanitizer import assert_clean

pytest.importorskip("triton", reason="Triton has no build for this platform")
if not GPU:
    pytest.skip("no CUDA or ROCm device", allow_module_level=True)
pytestmark = pytest.mark.gpu

SANITIZED = """
import torch
from scalediff_kernels import joint_neighborhood_patch_attention as joint
half, brain = torch.float16, torch.bfloat16
sizes = ((64, half, (8, 8)), (40, brain, (7, 5)), (128, brain, (8, 8)), (16, torch.float32, (5, 6)), (64, half, (12, 14)))
for dim, dtype, window in sizes:
    q, k, v = (torch.randn(1, 19, 14, 2, dim, device="cuda", dtype=dtype) for _ in range(3))
    text = [torch.randn(1, 9, 2, dim, device="cuda", dtype=dtype) for _ in range(3)]
    for rule in ("window", "global"):
        patch = (4, 4) if max(window) < 12 else (11, 12)  # of the last one a tile of 128 queries: the warp-specialised kernel on sm_90
        joint(q, k, v, *text, window=window, patch=patch, offset=(1, 3), text_queries=rule, impl="triton")
torch.cuda.synchronize()
"""


HOPPER = pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="the warp-specialised kernel is for sm_90")


@HOPPER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("problem", pipelines.CHOSEN, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}")
def test_pipeline_keeps_the_error_budget(problem: Problem, dtype: torch.dtype) -> None:
    PATHS.clear()
    assert_right(replace(problem, dtype=dtype), None)
    assert set(PATHS) == {"warp-specialised"}


@HOPPER
@pytest.mark.parametrize("seed", range(12))
def test_pipeline_keeps_the_error_budget_of_drawn_problems(seed: int) -> None:
    PATHS.clear()
    assert_right(pipelines.draw(seed), None)
    assert set(PATHS) == {"warp-specialised"}


@HOPPER
@pytest.mark.parametrize("dim", [64, 128])
def test_pipeline_takes_tile_after_tile(dim: int) -> None:
    """More tiles than multiprocessors, so that every barrier goes through many phases; and the same bits every run."""
    problem = Problem(
        (192, 192), (64, 64), (32, 32), (0, 0), dim, heads=4, groups=4, text=200, rope=True, rule="window", dtype=torch.bfloat16
    )
    PATHS.clear()
    assert_right(problem, None)
    assert set(PATHS) == {"warp-specialised"}
    first = run(problem, None)
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(problem, None), strict=True))


@HOPPER
def test_pipeline_has_the_log_sum_exp() -> None:
    problem = Problem((96, 80), (64, 64), (32, 32), (5, 17), 64, dtype=torch.bfloat16)
    q, k, _ = problem.inputs()
    PATHS.clear()
    out, lse = run(problem, None, return_lse=True)
    assert set(PATHS) == {"warp-specialised"}
    assert torch.equal(out, run(problem, None)[0])
    torch.testing.assert_close(lse, window_log_sum_exp(q.double(), k.double(), **problem.arguments).float())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("problem", CHOSEN, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}")
def test_every_dtype(problem: Problem, dtype: torch.dtype, target: str | None) -> None:
    assert_right(Problem(**(vars(problem) | {"dtype": dtype})), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128, 160, 256])
def test_windows_of_the_paper(dim: int, dtype: torch.dtype, target: str | None) -> None:
    assert_right(Problem((96, 80), (64, 64), (32, 32), (5, 17), dim, text=77, rope=True, rule="window", dtype=dtype), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ["window", "global"])
def test_low_precision_as_flux_hands_it_over(rule: str, target: str | None) -> None:
    """Text and image cut out of one sequence, the windows split over several programs: the shape of a layer, with fewer heads."""
    rope = rule == "window"
    problem = Problem(
        (128, 128), (64, 64), (32, 32), (0, 0), 128, heads=3, groups=3, text=512, rope=rope, rule=rule, layout="joint", dtype=torch.bfloat16
    )  # fmt: skip
    assert_right(problem, target)


def test_the_same_bits_every_run() -> None:
    problem = Problem((96, 96), (64, 64), (32, 32), (0, 0), 64, text=77, rope=True, rule="window", dtype=torch.bfloat16)
    first = run(problem, None)
    for _ in range(5):
        for a, b in zip(first, run(problem, None), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_cuda_graphs_capture_it() -> None:
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
def test_inductor(dynamic: bool) -> None:
    def double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * neighborhood_patch_attention(q + 0, k, v, window=(8, 8), patch=(4, 4), impl="triton")

    compiled = torch.compile(double, fullgraph=True, dynamic=dynamic)
    for grid in ((16, 16), (24, 20)):
        q, k, v = Problem(grid, (8, 8), (4, 4), (0, 0), 64, dtype=torch.float16).inputs()
        assert torch.equal(compiled(q, k, v), double(q, k, v))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    assert_clean(tool, SANITIZED)


def test_no_memory_beyond_the_result() -> None:
    q, k, v = Problem((128, 128), (64, 64), (32, 32), (0, 0), 64, heads=8, groups=8, dtype=torch.float16).inputs()
    neighborhood_patch_attention(q, k, v, window=(64, 64), patch=(32, 32), impl="triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = neighborhood_patch_attention(q, k, v, window=(64, 64), patch=(32, 32), impl="triton")
    assert torch.cuda.max_memory_allocated() - before == out.nbytes
