"""The warp-specialised kernel of sm_90 against the fp64 reference, in an emulator that finds races and deadlocks."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from scalediff_kernels.neighborhood.config import Problem as config_problem
from scalediff_kernels.neighborhood.config import launch_config
from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.neighborhood.lse import window_log_sum_exp
from tests.kernels.gluon_emulator import run as emulate
from tests.kernels.gluon_language import EmulationError
from tests.kernels.gluon_machine import Deadlock, Race
from tests.kernels.neighborhood.pipelines import CHOSEN, JOINT, SMALL, assert_right, draw, launches, run
from tests.kernels.neighborhood.problems import GPU, Problem

pytestmark = pytest.mark.skipif(
    GPU, reason="the emulator is for CPUs; tests/kernels/neighborhood/test_on_the_gpu.py runs these problems on a GPU"
)


@pytest.mark.parametrize("problem", CHOSEN, ids=lambda p: f"{p.grid[0]}x{p.grid[1]}-D{p.dim}-T{p.text}")
def test_chosen_problems_keep_the_error_budget(problem: Problem) -> None:
    assert_right(problem)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_problems_keep_the_error_budget(seed: int) -> None:
    assert_right(draw(seed), programs=1 + seed % 3, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_drawn_problems_keep_the_error_budget(block: int) -> None:
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        assert_right(draw(seed), programs=1 + seed % 4, seed=seed)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("box", "ping_pong"), [((8, 16), True), ((8, 16), False), ((12, 16), False), ((16, 16), False)])
def test_candidates_for_tuning_are_right(box: tuple[int, int], ping_pong: bool, stages: int) -> None:
    """Two to four consumers, by turns if there are two, and blocks of 64 keys."""
    problem = Problem((48, 32), (48, 32), (48, 16), (0, 0), 16, heads=1, groups=1, dtype=torch.float16)
    config = launch_config(config_problem(problem.grid, problem.window, problem.patch, problem.dim, 2), "sm_90")
    changes = {"query_box": box, "key_box": (2, 32), "text_block": 64, "num_stages": stages, "ping_pong": ping_pong}
    assert_right(problem, config=config._replace(**changes))


def test_the_same_bits_whatever_the_order() -> None:
    """Of partitions and loads, and whatever the number of programs."""
    first = run(JOINT, programs=1)
    for seed in range(1, 6):
        for a, b in zip(first, run(JOINT, programs=seed, seed=seed), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_a_query_sees_its_window_and_nothing_else() -> None:
    """NaN in every key outside a patch's window must not reach the patch: boxes that do not tile the window stay inside it."""
    problem = Problem((20, 23), (13, 17), (8, 16), (3, 5), 16, heads=1, groups=1, dtype=torch.float16)
    q, k, v = problem.inputs()
    clean = run(problem)[0]
    axes = [windows(*axis) for axis in zip(problem.grid, problem.window, problem.patch, problem.offset, strict=True)]
    for (y0, y1, key_y0, key_y1), (x0, x1, key_x0, key_x1) in itertools.product(*axes):
        outside = torch.ones(problem.grid, dtype=torch.bool)
        outside[key_y0:key_y1, key_x0:key_x1] = False
        poisoned = [x.masked_fill(outside[None, :, :, None, None], float("nan")) for x in (k, v)]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Problem, "inputs", lambda self, found=(q, *poisoned): found)
            out = run(problem)[0]
        assert torch.equal(out[:, y0:y1, x0:x1], clean[:, y0:y1, x0:x1])


def test_log_sum_exp_of_image_queries() -> None:
    """Each query's log-sum-exp of its scores, against torch in fp64."""
    problem = Problem((17, 20), (12, 16), (8, 16), (3, 5), 16, heads=2, groups=1, dtype=torch.float16)
    q, k, _ = problem.inputs()
    lse = torch.full(q.shape[:-1], float("nan"))
    (launch,) = launches(problem, (torch.empty_like(q), None), lse=lse)
    emulate(launch.kernel, (2,), launch.arguments)
    torch.testing.assert_close(lse, window_log_sum_exp(q.double(), k.double(), **problem.arguments).float())


def test_binaries_are_told_apart_by_the_code_of_the_constants() -> None:
    """Triton caches binaries by the key of the constants, of which it sees the fields alone."""
    (launch,) = launches(SMALL, (torch.empty(1, *SMALL.grid, 1, 16, dtype=torch.float16), None))
    constants = launch.arguments["C"]
    assert replace(constants, stages=7).cache_key != constants.cache_key
    assert hashlib.sha256(Path(inspect.getfile(type(constants))).read_bytes()).hexdigest() in constants.cache_key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_box": (8, 8)}, "two consumers, or three or four without turns"),
        ({"query_box": (16, 16)}, "two consumers, or three or four without turns"),
        ({"num_stages": 1}, "second block of keys is loaded before its queries"),
    ],
)
def test_configurations_that_the_kernel_cannot_have_are_refused(change: dict[str, Any], message: str) -> None:
    config = launch_config(config_problem(SMALL.grid, SMALL.window, SMALL.patch, SMALL.dim, 2), "sm_90")
    with pytest.raises(AssertionError, match=message):
        run(SMALL, config=config._replace(**change))


def test_a_path_that_contradicts_the_configuration_is_refused() -> None:
    config = launch_config(config_problem(SMALL.grid, SMALL.window, SMALL.patch, SMALL.dim, 2), "sm_90")
    with pytest.raises(ValueError, match="path must be that of config where both are given, got path='pointer'"):
        run(SMALL, config=config, path="pointer")


MUTATIONS: dict[str, tuple[str, str, type[Exception]]] = {
    "no wait for the first keys": ("mbarrier.wait(bars.k_full.index(stage), n // STAGES & 1)", "pass", Race),
    "no wait for the next keys": (
        "mbarrier.wait(bars.k_full.index((n + 1) % STAGES), (n + 1) // STAGES & 1, pred=j + 1 < end)",
        "pass",
        Race,
    ),
    "no wait for the queries": ("mbarrier.wait(bars.q_full.index(CONSUMER), tiles & 1)", "pass", Race),
    "values of the wrong phase": (
        "mbarrier.wait(bars.v_full.index(before), before_phase)",
        "mbarrier.wait(bars.v_full.index(before), 1 - before_phase)",
        EmulationError,
    ),
    "keys and values are overwritten": ("mbarrier.wait(empty.index(stage), n // C.stages & 1 ^ 1)", "pass", Race),
    "queries are overwritten": ("mbarrier.wait(bars.q_empty.index(consumer), tiles & 1 ^ 1)", "pass", Race),
    "one consumer frees the keys for both": (
        "k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)",
        "k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, 1)",
        EmulationError,
    ),
    "one arrival too many is expected": (
        "v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)",
        "v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS + 1)",
        Deadlock,
    ),
    "keys are freed before their product is done": (
        "warpgroup_mma_wait(1, deps=[next_scores])",
        "warpgroup_mma_wait(2, deps=[next_scores])",
        EmulationError,
    ),
    "values are freed before their product is done": (
        "warpgroup_mma_wait(0, deps=[next_acc, next_p])",
        "warpgroup_mma_wait(1, deps=[next_acc, next_p])",
        EmulationError,
    ),
    "values are never freed": ("mbarrier.arrive(bars.v_empty.index(before), count=1)", "pass", Deadlock),
    "turns are not handed on": ("mbarrier.arrive(bars.turns.index(1 - CONSUMER), count=1)", "pass", Deadlock),
    "a load has half of its bytes": (
        "mbarrier.expect(full.index(stage), desc.block_type.nbytes)",
        "mbarrier.expect(full.index(stage), desc.block_type.nbytes // 2)",
        EmulationError,
    ),
    "the wrong stage is loaded": ("stage = n % C.stages", "stage = (n + 1) % C.stages", EmulationError),
    "no fence after the rotation": (".to(target.dtype))\n    fence_async_shared()", ".to(target.dtype))", Race),
    "no fence before the store": ("fence_async_shared()  # before the store", "# before the store", Race),
    "the result is overwritten before it is stored": ("tma.store_wait(0)", "pass", Race),
    "no fence after the barriers are initialised": ("turns = _barriers(2, 1)\n    fence_async_shared()", "turns = _barriers(2, 1)", Race),
    "windows do not move": (
        "x = _axis_start(window % sizes.patches_x, sizes.grid_x, -sizes.offset_x, C.patch[1], C.window[1])",
        "x = 0",
        AssertionError,
    ),
    "the text is not masked": ("(offs < stop)", "(offs < N)", AssertionError),
    "text keys meet queries that are not rotated": ("gl.where(is_text, rotated, plain)", "plain", AssertionError),
    "sums are not rescaled": ("acc = acc * gl.expand_dims(gl.convert_layout(shrink, ROWS), 1)", "pass", AssertionError),
}  # fmt: skip
CUT = CHOSEN[2]  # boxes that overlap, and tiles cut by the offset
WHOLE = replace(SMALL, text=140, rule="global")
OTHERS: dict[str, tuple[Problem, str, str]] = {
    "keys of overlapping boxes count twice": (CUT, "(offs // C.key_box[1] >= seen_y) & ", ""),
    "tiles write beyond their patch": (CUT, "mask=gl.expand_dims(m_m, 1) &", "mask="),
    "every part starts at the first block": (WHOLE, "begin = part % block_parts * sizes.part_blocks", "begin = 0"),
    "parts of the keys have equal weights": (WHOLE, "layout=top.type.layout), top + gl.log2(total))", "layout=top.type.layout), top * 0)"),
}


@pytest.mark.parametrize("windows_of_a_part", [1, 4, 6])
def test_windows_of_text_queries_in_parts(windows_of_a_part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six windows in parts of one, in one of four and one of two, and all in one; a sum that is not added to is caught."""
    from scalediff_kernels.neighborhood import launch

    choose = launch.launch_config  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "launch_config", lambda *arguments: choose(*arguments)._replace(part_windows=windows_of_a_part))
    assert_right(JOINT)
    if windows_of_a_part > 1:
        with pytest.raises(AssertionError):
            assert_right(JOINT, edits={"LAYOUT) < add": "LAYOUT) < 0"})


@pytest.mark.parametrize(("problem", "old", "new"), OTHERS.values(), ids=OTHERS)
def test_mutations_that_other_problems_show_are_caught(problem: Problem, old: str, new: str) -> None:
    with pytest.raises((AssertionError, EmulationError)):
        assert_right(problem, programs=1, seed=1, edits={old: new})


@pytest.mark.parametrize(("old", "new", "error"), MUTATIONS.values(), ids=MUTATIONS)
def test_mutations_of_the_kernel_are_caught(old: str, new: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        assert_right(JOINT, programs=1, seed=1, edits={old: new})


def test_a_deadlock_says_who_waits_for_what() -> None:
    message = r"\(produce\) waits at produce.py:\d+ for parity 0 of v_empty\[0\]: phase 0, 2 of 2 arrivals"
    with pytest.raises(Deadlock, match=message):
        run(SMALL, programs=1, edits={"mbarrier.arrive(bars.v_empty.index(before), count=1)": "pass"})
