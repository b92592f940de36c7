"""Attention of a grid whose rows are shared out among processes: what one process computes, and the bytes that move."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from scalediff_kernels.distributed.api import sharded_neighborhood_patch_attention
from scalediff_kernels.distributed.geometry import halo_bytes, owned_rows, text_bytes
from scalediff_kernels.distributed.losses import LostRankError
from scalediff_kernels.testing import assert_within_budget
from tests import processes
from tests.kernels.distributed import ranks
from tests.kernels.neighborhood.problems import expected

pytestmark = pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo")

SEEDS = range(24)
IMPORTED = ("tests.kernels.distributed.ranks",)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four processes computed."""
    return processes.run(functools.partial(ranks.several, SEEDS), 4, tmp_path_factory.mktemp("four"), imported=IMPORTED)


def check(seed: int, found: list[dict[str, Any]]) -> None:
    """Every rank has its rows of the result of one process, the same text, and received as many bytes as the geometry says."""
    count = 2 if seed % 2 else 4
    shared = ranks.draw(seed, count)
    problem = shared.problem
    exacts, eagers = expected(problem, exact=True), expected(problem, exact=False)
    sizes: dict[str, Any] = {"head_dim": problem.dim, "itemsize": problem.dtype.itemsize, "batch": problem.batch}
    bands = {"window": problem.window[0], "patch": problem.patch[0], "offset": problem.offset[0]}
    received = halo_bytes(rows=shared.rows, columns=problem.grid[1], groups=problem.groups, **bands, **sizes)
    merged = text_bytes(ranks=count, text=problem.text, heads=problem.heads, rule=problem.rule, **sizes)
    for i, mine in enumerate(found):
        own = owned_rows(shared.rows)[i % count]
        assert_same(mine["image"], *(x[0][:, own.start : own.stop].cpu() for x in (exacts, eagers)))
        assert (mine["text"] is None) == (problem.rule is None)
        if exacts[1] is not None and eagers[1] is not None:
            assert_same(mine["text"], exacts[1].cpu(), eagers[1].cpu())
            assert torch.equal(mine["text"], found[0]["text"])
        assert (mine["rows"], mine["merged"]) == (received[i % count], merged)


def assert_same(out: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Within the error budget; in fp64, where all sums are rounded alike, within 1e-12."""
    if out.dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_within_budget(out, eager, exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_problems_are_those_of_one_process(seed: int, four: list[dict[str, Any]]) -> None:
    check(seed, [one["drawn"][seed] for one in four])


@pytest.mark.parametrize("name", ranks.CONVOLUTIONS)
def test_bands_of_a_convolution(name: str, four: list[dict[str, Any]]) -> None:
    size, rows, how = ranks.CONVOLUTIONS[name]
    expected = F.conv2d(ranks.picture(rows), *ranks.kernel(size, how.get("groups", 1)), **how)
    torch.testing.assert_close(torch.cat([one["bands"][name] for one in four], dim=2), expected, rtol=1e-12, atol=1e-12)


def test_bands_of_a_group_norm(four: list[dict[str, Any]]) -> None:
    """Statistics are those of the whole picture, also far from zero, and it keeps the dtype."""
    weight, whole = ranks.picture(3)[0, :, 0, 0], ranks.picture(6)
    found = torch.cat([one["bands"]["norm"] for one in four], dim=2)
    torch.testing.assert_close(found, F.group_norm(3 * whole + 100, 2, weight, -weight, 1e-3), rtol=1e-11, atol=1e-11)
    plain = torch.cat([one["bands"]["plain norm"] for one in four], dim=2)
    exact = F.group_norm(whole.bfloat16().double(), 4)
    assert_within_budget(plain, F.group_norm(whole.bfloat16(), 4), exact)
    assert all(torch.equal(one["bands"]["gathered"], whole) for one in four)


def test_convolutions_that_have_no_bands_are_refused(four: list[dict[str, Any]]) -> None:
    for said in (one["bands"] for one in four):
        assert said["padding"] == "a convolution over ranks must pad half of its kernel's 3 rows, got padding=0"
        assert said["same"] == "a convolution over ranks must pad half of its kernel's 3 rows, got padding='same'"
        assert said["stride"] == "a band must have rows that are a multiple of stride=4, at least 1, got 6"


def test_ranks_that_differ_are_named(four: list[dict[str, Any]]) -> None:
    contract = "all ranks must have the same versions, model and inputs, got "
    expected = [contract + "torch is 2.0 on rank 0 and 2.1 on rank 2", contract + "shape is 8 x 8 on rank 0 and 8 x 6 on rank 3"]
    expected += [contract + "seed is False on rank 0 and True on rank 3"] * 2  # by all dimensions of a mesh, in any order
    of_rows = ["", "", *[contract + "seed is False on rank 2 and True on rank 3"] * 2]
    assert [one["agreed"] for one in four] == [[*expected, said, ""] for said in of_rows]


def test_what_does_not_fit_the_group_is_refused(four: list[dict[str, Any]]) -> None:
    for said in (one["refused"] for one in four):
        assert "rows must have a number for each of the 4 ranks of the group, got rows=(2, 2)" in said["rows"]
        assert "every rank needs at least one row, got rows=(2, 2, 0, 2)" in said["empty"]
        assert re.search(r"with the [13] rows of rank [0-3], got tuple\(q.shape\)=\(1, 2, 4, 1, 8\)", said["shape"])
        assert said["gradients"] == "attention over ranks does not support gradients: use torch.no_grad()"
        assert said["tables"].startswith("text_rope must be tables of all windows of the whole grid, [4, 2, D / 2], got [(1, 2, 4)")
        assert said["rule"] == "text_queries must be 'window', 'global' or None, got text_queries='all'"
        assert said["mesh"].startswith("the mesh must have one dimension: pass one of its dimensions, as mesh[name], got")
        assert said["group"] == "group must be a torch.distributed process group or a DeviceMesh, got 'all'"
    said = [one["refused"]["member"] for one in four]
    assert said == ["", "", "this process is not a member of the group", "this process is not a member of the group"]
    for name, there in (("part", ""), ("parts", "2")):
        said = [one["refused"][name] for one in four]
        assert said[:2] == [there, there]
        assert [text.split(", got DeviceMesh(")[0] for text in said[2:]] == [f"rank {i} must be one of the mesh" for i in (2, 3)]


def test_a_failure_without_a_lost_rank_is_said_as_such(four: list[dict[str, Any]]) -> None:
    for rank, said in enumerate(one["failing"] for one in four):
        lost = f"LostRankError rank {rank} lost"
        assert said["backend"].startswith(f"{lost} a connection, to a rank that its backend does not name, while gathering")
        assert said["backend"].endswith(" timed out")
        assert said["peers"].startswith(f"{lost} the connection to rank 1 or rank 2 while gathering")
        assert said["memory"] == "OutOfMemoryError timed out None"
        assert said["missing"] == "NotImplementedError timed out None"
        assert said["kernel"] == "AcceleratorError timed out None"


def test_without_processes() -> None:
    q = torch.zeros(1, 2, 2, 1, 8)
    with pytest.raises(RuntimeError, match="there is no process group: start the processes with torchrun and call"):
        sharded_neighborhood_patch_attention(q, q, q, group=None, rows=(2,), window=(2, 2), patch=(1, 1))


DOING = {
    "attention": "exchanging rows",
    "convolution": "exchanging rows",
    "text": "exchanging the parts of the text",
    "gathering": "gathering the parts of all ranks",
    "agreement": "comparing what all ranks must agree on",
}


@pytest.mark.parametrize(
    "doing", [name if name in ("attention", "gathering") else pytest.param(name, marks=pytest.mark.slow) for name in DOING]
)
def test_a_killed_process_ends_the_others_which_name_it(doing: str, tmp_path: Path) -> None:
    """Those with a message from it know at once; others learn it when one of these ends, and who was first from the note."""
    said = processes.said_of_a_loss(functools.partial(ranks.lost, doing), 4, tmp_path, imported=IMPORTED)
    for rank, (error, message) in said.items():
        assert error is LostRankError
        assert_names(message, rank, DOING[doing])
    assert any("first" not in message for _, message in said.values())


def assert_names(message: str, rank: int, doing: str) -> None:
    """The message of a rank names rank 1: alone, or with others that ended after it."""
    found = re.fullmatch(rf"rank {rank} lost the connection to (.*) while {doing}(; rank 1 was lost first)?", message)
    assert found
    assert "rank 1" in found[1]
    assert (found[1] == "rank 1") == (found[2] is None)


# Longer runs


@pytest.mark.slow
def test_many_drawn_problems_are_those_of_one_process(tmp_path: Path) -> None:
    seeds = range(1000, 1240)
    found = processes.run(functools.partial(ranks.drawn, seeds), 4, tmp_path)
    for seed in seeds:
        check(seed, [one[seed] for one in found])
