"""A rank that ends in the middle of a pass, runs out of memory, hangs or fails: the others end too, with errors that name it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import distributed

from scalediff_kernels.distributed.losses import LostRankError
from tests import processes

pytest.importorskip("diffusers", reason="the models are diffusers'")

from tests.scalediff.patching import ranks, row_ranks

pytestmark = pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "grid"), [("demo", ranks.GRID), ("FLUX.1", ranks.GRID), ("FLUX.1", ranks.NATIVE)])
def test_a_rank_that_ends_in_a_pass_is_named(kind: str, grid: tuple[int, int], tmp_path: Path) -> None:
    """Also where the collective is that of diffusers, as in passes of the native size."""
    work = functools.partial(row_ranks.lost_in_a_pass, kind, grid)
    said = processes.said_of_a_loss(work, 2, tmp_path, imported=ranks.IMPORTED)
    assert [error for error, _ in said.values()] == [LostRankError]
    assert said[0][1].startswith("rank 0 lost the connection to rank 1 while ")


@pytest.mark.slow
def test_a_rank_that_is_out_of_memory_says_so_and_is_named(tmp_path: Path) -> None:
    said = processes.said_of_a_loss(row_ranks.out_of_memory, 2, tmp_path, imported=ranks.IMPORTED, code=1)
    assert [error for error, _ in said.values()] == [LostRankError, torch.OutOfMemoryError]
    assert said[0][1].startswith("rank 0 lost the connection to rank 1 while ")
    assert said[1][1].startswith("stage 2/2, 128 x 64, ran out of memory on cpu")


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_test(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="2 processes did not finish in 20 s"):
        ranks.run(2, {"hangs": ranks.hangs}, tmp_path, seconds=20)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_test(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="this process fails"):
        ranks.run(2, {"fails": ranks.fails}, tmp_path)
