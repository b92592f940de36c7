"""The choice of a launch: pure integers, the same on every machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod

import pytest

from scalediff_kernels.neighborhood.config import (
    MIN_BLOCK,
    MULTIPROCESSORS,
    LaunchConfig,
    Problem,
    block_config,
    has_descriptors,
    key_box,
    launch_config,
    query_box,
)

DEVICES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942"]


@pytest.mark.parametrize(
    ("problem", "device", "path", "query", "key", "warps"),
    [
        (Problem((256, 256), (64, 64), (32, 32), 128, 2, text=512), "sm_90", "descriptor", (8, 16), (2, 64), 8),
        (Problem((256, 256), (64, 64), (32, 32), 128, 2, text=512), "sm_80", "pointer", (8, 16), (1, 32), 8),
        (Problem((256, 256), (64, 64), (32, 32), 128, 2, descriptors=False), "sm_90", "pointer", (8, 16), (1, 32), 8),
        (Problem((256, 256), (64, 64), (32, 32), 128, 2), "sm_89", "pointer", (8, 16), (1, 16), 8),
        (Problem((256, 256), (64, 64), (32, 32), 160, 2), "sm_120", "pointer", (8, 8), (1, 16), 8),
        (Problem((256, 256), (64, 64), (32, 32), 64, 4), "sm_90", "pointer", (4, 8), (1, 16), 8),
        (Problem((128, 128), (32, 32), (16, 16), 64, 2), "sm_90", "descriptor", (8, 16), (2, 32), 4),
        (Problem((128, 128), (27, 15), (13, 7), 64, 2), "sm_90", "descriptor", (16, 8), (4, 8), 8),  # ragged: far sides
        (Problem((128, 128), (3, 3), (2, 2), 64, 2), "sm_90", "pointer", (4, 4), (4, 4), 1),  # no box of 16 tokens is inside
        (Problem((128, 128), (8, 8), (4, 4), 64, 2), "sm_90", "descriptor", (4, 4), (4, 8), 1),  # 16 queries are the work of one warp
        (Problem((128, 128), (16, 16), (4, 8), 128, 2), "sm_80", "pointer", (4, 8), (1, 16), 2),
        (Problem((128, 128), (8, 8), (4, 4), 160, 2), "sm_80", "pointer", (4, 4), (2, 8), 4),  # one would spill
        (Problem((256, 256), (64, 64), (32, 32), 128, 2, text=512, queries="text"), "sm_90", "descriptor", (1, 128), (1, 64), 8),
        (Problem((256, 256), (64, 64), (32, 32), 64, 2), "sm_90", "descriptor", (8, 16), (1, 64), 4),
        (Problem((256, 256), (64, 64), (32, 32), 64, 2, text=512), "sm_90", "descriptor", (8, 16), (2, 64), 8),  # four warps serialise
    ],
)
def test_choices_are_pinned(problem: Problem, device: str, path: str, query: tuple[int, int], key: tuple[int, int], warps: int) -> None:
    config = block_config(problem, device)
    assert (config.path, config.query_box, config.key_box, config.num_warps) == (path, query, key, warps)


FLUX = Problem((256, 256), (64, 64), (32, 32), 128, 2, text=512, rope=True)


@pytest.mark.parametrize(
    ("problem", "query", "key", "stages"),
    [
        (FLUX, (8, 16), (2, 64), 2),
        (replace(FLUX, queries="text", heads=24, windows=64), (1, 128), (2, 64), 2),
        (replace(FLUX, text=0, rope=False), (8, 16), (2, 64), 3),
        (replace(FLUX, head_dim=64), (8, 16), (2, 64), 3),
        (replace(FLUX, head_dim=160), (8, 16), (1, 32), 2),  # the second buffer of queries leaves no room for larger blocks
        (replace(FLUX, window=(52, 76), patch=(26, 38)), (16, 8), (4, 16), 3),  # ragged: no box of 128 tokens tiles the window
    ],
)
def test_pipelines_are_pinned(problem: Problem, query: tuple[int, int], key: tuple[int, int], stages: int) -> None:
    config = launch_config(problem, "sm_90")
    assert (config.path, config.query_box, config.key_box, config.num_stages) == ("warp-specialised", query, key, stages)
    assert config.text_block == prod(key), "text shares the buffers of the window"


@pytest.mark.parametrize(
    ("problem", "device", "path"),
    [
        (FLUX, "sm_100", "descriptor"),
        (FLUX, "sm_80", "pointer"),
        (replace(FLUX, patch=(8, 8)), "sm_90", "descriptor"),  # a tile of 64 queries
        (replace(FLUX, window=(3, 3), patch=(2, 2)), "sm_90", "pointer"),  # no box of 16 tokens is inside
        (replace(FLUX, descriptors=False), "sm_90", "pointer"),
        (replace(FLUX, itemsize=4), "sm_90", "pointer"),
    ],
)
def test_what_the_pipeline_does_not_support_has_another_path(problem: Problem, device: str, path: str) -> None:
    assert launch_config(problem, device).path == path
    with pytest.raises(NotImplementedError, match=f"path='warp-specialised' does not support this problem on {device}, got Problem"):
        launch_config(problem, device, "warp-specialised")


def test_a_named_path_is_taken() -> None:
    for path in ("warp-specialised", "descriptor", "pointer"):
        assert launch_config(FLUX, "sm_90", path).path == path


def test_text_queries_of_the_pipeline_are_split_by_windows_or_by_keys() -> None:
    """96 tiles on 132 multiprocessors: in four parts of 64 windows, or in parts of the keys of the one window over the grid."""
    config = launch_config(replace(FLUX, queries="text", heads=24, windows=64), "sm_90")
    assert (config.part_windows, config.part_blocks) == (16, 0)
    config = launch_config(replace(FLUX, queries="text", heads=24, window=(256, 256), patch=(256, 256), rope=False), "sm_90")
    blocks = (256 * 256 + 512) // 128
    waves = -(-96 * -(-blocks // config.part_blocks) // 132)
    assert config.part_windows == 1
    assert waves * config.part_blocks < 1.05 * 96 * blocks / 132, "nearly all multiprocessors work to the end"


@pytest.mark.parametrize("device", DEVICES)
def test_every_problem_has_a_launch_that_fits_its_rules(device: str) -> None:
    sizes = [(1, 1), (3, 5), (7, 64), (26, 38), (52, 76), (64, 64)]
    for window, patch, dim, itemsize, text, queries in itertools.product(
        sizes, sizes, (8, 40, 72, 160, 256), (2, 4), (0, 77), ("image", "text")
    ):
        problem = Problem((128, 128), window, patch, dim, itemsize, text, queries)  # type: ignore[arg-type]
        for config in (block_config(problem, device), launch_config(problem, device)):
            assert_fits(config, window, device)


def assert_fits(config: LaunchConfig, window: tuple[int, int], device: str) -> None:
    for box in (config.query_box, config.key_box):
        assert all(n & (n - 1) == 0 and 1 <= n <= 256 for n in box), "a block has a power of two on every axis, TMA 256 at most"
        assert prod(box) >= MIN_BLOCK
    assert config.text_block >= MIN_BLOCK
    if config.path != "pointer":
        assert has_descriptors(device)
        assert all(b <= w for b, w in zip(config.key_box, window, strict=True)), "a descriptor's box must lie inside the window"


def test_boxes_waste_little() -> None:
    assert query_box((32, 32), 128) == (8, 16)  # square: of a cut patch at the border whole tiles fall outside
    assert query_box((3, 2), 128) == (4, 4)
    assert query_box((1, 40), 64) == (1, 64)  # one wide tile before many small ones
    assert key_box((64, 64), 128) == (2, 64)  # long runs in memory
    assert key_box((52, 76), 64) == (4, 16)
    assert key_box((2, 3), 64) == (2, 8)


@pytest.mark.parametrize("head_dim", [4, 12, 264, 0])
def test_other_head_dims_are_refused(head_dim: int) -> None:
    with pytest.raises(NotImplementedError, match=f"multiples of 8 from 8 to 256, got problem.head_dim={head_dim}"):
        launch_config(Problem((8, 8), (4, 4), (2, 2), head_dim, 2), "sm_90")


def text_queries(heads: int, text: int, windows: int = 64) -> Problem:
    return Problem((256, 256), (64, 64), (32, 32), 128, 2, text=text, queries="text", heads=heads, windows=windows)


@pytest.mark.parametrize(
    ("problem", "windows"),
    [
        (text_queries(24, 512), 16),  # 96 tiles on 132 multiprocessors: in four parts each they end after 48 windows, not 64
        (text_queries(33, 512), 64),  # 132 tiles: one each
        (text_queries(24, 512, 72), 18),
        (text_queries(24, 512, 81), 21),  # moved patches: no more parts for less than 2 %
        (text_queries(24, 512, 256), 64),
        (text_queries(1, 77), 1),  # one tile: a window each
    ],
)
def test_windows_of_text_queries_are_split_where_that_ends_sooner(problem: Problem, windows: int) -> None:
    assert launch_config(problem, "sm_90").part_windows == windows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "text"), [(1, 1), (24, 512), (38, 333), (200, 77)])
def test_no_split_is_slower_than_none(device: str, heads: int, text: int) -> None:
    """In windows that the busiest multiprocessor attends to, one program of eight warps at a time."""
    problem = text_queries(heads, text)
    config = launch_config(problem, device)
    tiles = heads * -(-text // config.query_box[1])
    at_once = MULTIPROCESSORS.get(device, 84) * max(1, 8 // config.num_warps)
    assert 1 <= config.part_windows <= 64
    assert -(-tiles * -(-64 // config.part_windows) // at_once) * config.part_windows <= -(-tiles // at_once) * 64


def test_the_global_rule_has_one_window() -> None:
    problem = Problem((64, 64), (64, 64), (64, 64), 128, 2, text=512, queries="text", heads=24)
    assert launch_config(problem, "sm_90").part_windows == 1
