"""The autoencoder over ranks, and pictures that ranks draw and change together: what one process computes, and what is sent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scalediff
from scalediff.cascade.autoencoder_memory import band_bytes, vae_bytes
from scalediff.cascade.memory import estimate
from scalediff.cascade.rank_memory import estimate_rank
from scalediff.cost.models import MODELS, built
from scalediff.patching.splits import Shares

diffusers = pytest.importorskip("diffusers")

from tests.scalediff.cascade import drawn_ranks, refused_ranks, split_ranks  # noqa: E402
from tests.scalediff.cascade.drawn_ranks import CHANGED, arrays  # noqa: E402
from tests.scalediff.cascade.split_ranks import SPLIT, STREAMED, WHOLE, autoencoder, computed, pictures  # noqa: E402
from tests.scalediff.patching import ranks  # noqa: E402

pytestmark = pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes computed."""
    return ranks.run(2, split_ranks.CASES | refused_ranks.CASES, tmp_path_factory.mktemp("two"))


def assert_same(out: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    """Within rounding of fp64, or what is given."""
    torch.testing.assert_close(out, expected, rtol=relative, atol=relative * expected.abs().max().item())


def check_split(found: dict[str, Any], name: str, world: int) -> None:
    """The decoder sees a band, the result is that of one process, and what is sent are single rows, keys, values and the result."""
    build, size = SPLIT[name]
    vae = build()
    expected = computed(vae, pictures(vae, size))
    for part, one in zip(found["results"], expected, strict=True):
        assert_same(part, one)
    assert set(found["rows"]) == {pictures(vae, size)[0].shape[2] // world}
    assert found["ranks"] == world
    assert found["restored"]
    assert {shape[2] for way, shape in found["messages"] if way == "sent"} == {1}
    statistics, large = [], []
    for shape in (shape for way, shape in found["messages"] if way == "gathered"):
        (statistics if shape[0] == 2 and len(shape) == 3 and shape[2] == 4 else large).append(shape)
    slices = 2 if name == "slices" else 1
    attentions = sum(module.__class__.__name__ == "Attention" for module in vae.modules())
    assert len(large) == slices * (2 * attentions + 2)
    assert len(statistics) == slices * sum(isinstance(module, torch.nn.GroupNorm) for module in vae.modules())


@pytest.mark.parametrize("name", SPLIT)
def test_bands_of_an_autoencoder_give_what_one_process_gives(name: str, two: list[dict[str, Any]]) -> None:
    check_split(two[0]["split_rows"][name], name, 2)
    for one, other in zip(*(found["split_rows"][name]["results"] for found in two), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_one_process(dtype: torch.dtype, two: list[dict[str, Any]]) -> None:
    """Twice the error of one process in the same precision, and a rounding."""
    exact = autoencoder()
    vae = autoencoder().to(dtype)
    exact.load_state_dict(vae.state_dict())
    given = pictures(vae, (48, 20))
    truth = computed(exact, (given[0].double(), given[1].double()))
    for part, one, true in zip(two[0]["rounded"][str(dtype)], computed(vae, given), truth, strict=True):
        assert part.dtype == dtype
        ours, theirs = ((x.double() - true).abs().max() for x in (part, one))
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case[0])
def test_every_rank_runs_its_rows_in_bands(case: tuple[str, tuple[int, int], int, int], two: list[dict[str, Any]]) -> None:
    """With the result of one piece. Rows that the layers of a group see are sent for each group, not for each convolution."""
    one, other = (found["streamed_rows"][case[0]] for found in two)
    vae = autoencoder((8, 8))
    for part, same, expected in zip(one["results"], other["results"], computed(vae, pictures(vae, case[1])), strict=True):
        assert_same(part, expected)
        assert torch.equal(part, same)
    rows = {shape[2] for way, shape in one["messages"] if way == "sent"}
    assert rows == set() if case[0] == "few rows" else max(rows) > 1


@pytest.mark.parametrize("name", [*WHOLE, "another thread"])
def test_what_every_rank_computes_whole(name: str, two: list[dict[str, Any]]) -> None:
    for found in (one["whole_on_every_rank"][name] for one in two):
        assert found["why"] == (WHOLE[name][1] if name in WHOLE else "")
        assert found["messages"] == []
        assert found["same"]


def test_ranks_that_differ_are_named(two: list[dict[str, Any]]) -> None:
    contract = "all ranks must have the same versions, model and inputs, got "
    for said in (found["different"] for found in two):
        assert said["options"] == contract + "vae_tiling is False on rank 0 and True on rank 1"
        assert said["latents"].startswith(contract + "the input of the autoencoder is (2, 4, 8, 5) of torch.float64 with the checksum ")
        assert said["weights"].startswith(contract + "the digest of the autoencoder's weights is ")
        assert re.search(r"got sizes is \[.*\(128, 64\)\] on rank 0 and \[.*\(192, 64\)\] on rank 1$", said["sizes"])
        assert said["steps"] == contract + "steps is 2 on rank 0 and 3 on rank 1"
        assert "drawn" not in said


def test_if_one_rank_needs_parts_all_have_them(two: list[dict[str, Any]]) -> None:
    """Both stages, with the most sizes that any rank joins."""
    for found in two:
        assert found["parts_on_one_rank"]["seen"] == [(True, 2), (True, 2)]


def assert_same_stages(found: list[tuple[Any, Tensor]], expected: list[tuple[Any, Tensor]], relative: float = 1e-10) -> None:
    assert len(found) == len(expected)
    for (image, latents), (picture, one) in zip(found, expected, strict=True):
        assert_same(latents, one, relative)
        assert image.size == picture.size
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1, "rounded to a byte"


def test_the_whole_cascade_draws_the_same_picture(two: list[dict[str, Any]]) -> None:
    one, other = (found["drawn"] for found in two)
    expected = arrays(drawn_ranks.draw_sdxl())
    assert_same_stages(one["SDXL"], expected)
    assert_same_stages(two[0]["drawn_in_halves"], expected)
    pipe = scalediff.load_demo().to(torch.float64)
    assert_same_stages(one["demo"], arrays(drawn_ranks.draw_demo(pipe)))
    with scalediff.patch_model(pipe):
        assert_same_stages(one["own call"], [drawn_ranks.call_demo(pipe)])
    assert len(one.pop("previews")) == 3
    assert other.pop("previews") == []
    for name in one:
        for (image, latents), (picture, same) in zip(one[name], other[name], strict=True):
            assert torch.equal(latents, same)
            assert image.tobytes() == picture.tobytes()


# SDXL's inpainting pipeline encodes in fp32, by `force_upcast` of the autoencoder's configuration: 16 roundings of it.
ROUNDED = {"a larger picture": 16 * torch.finfo(torch.float32).eps}


@pytest.mark.parametrize("name", CHANGED)
def test_ranks_change_a_picture_together(name: str, two: list[dict[str, Any]]) -> None:
    assert_same_stages(two[0]["changed"][name], arrays(drawn_ranks.change(name)), ROUNDED.get(name, 1e-10))
    assert torch.equal(two[0]["changed"][name][-1][1], two[1]["changed"][name][-1][1])


def test_a_run_that_cannot_be_resumed_or_repeated_by_all_ranks(two: list[dict[str, Any]]) -> None:
    for found in two:
        contract = "mesh needs a generator in the same state on all ranks, and no workdir, got "
        assert found["with_workdir"]["workdir"].startswith(contract)
        assert found["with_workdir"]["workdir"].endswith("and workdir='here'")
        assert found["with_workdir"]["upscale"].endswith("and workdir='here'")
        assert found["with_workdir"]["generator"] == contract + "generator=None and workdir=None"


def test_stages_that_ranks_cannot_share_out_are_refused_before_anything_is_drawn(two: list[dict[str, Any]]) -> None:
    uneven = "has tokens of 4 x 4 pixels: 2 ranks split a picture into equal bands of rows at each of 2 levels, got 26 rows of tokens"
    for said in (found["uneven_stages"] for found in two):
        assert said.keys() == {"last", "middle"}
        assert said["last"].startswith(f"stage 2/2, 104 x 64, {uneven}: choose a height with a multiple of 4 rows, or another number")
        assert said["middle"].startswith(f"stage 2/3, 104 x 104, {uneven}")


def test_too_little_memory_of_one_rank_is_refused_on_all(two: list[dict[str, Any]]) -> None:
    needs = r"each of 2 ranks needs at most about \d\.\d GiB; 0\.0 GiB are available on rank 1; it needs .*"
    for said in (found["little_memory"] for found in two):
        for name in ("refused", "forced on another"):
            assert re.fullmatch(f"the run must fit into the memory of cpu, got 128 x 64: {needs}; force=True runs it .*", said[name])
        assert re.fullmatch(f"{needs}; --force runs it all the same", said["command"])
        assert said["impossible"].startswith("rank 1: the picture must fit into the memory of cpu, 0.0 GiB, got 128 x 64")


def test_a_rank_needs_at_most_what_is_estimated(trained_demo: Any, two: list[dict[str, Any]]) -> None:
    """And half of what one process needs, within a third."""
    arguments, size = refused_ranks.ARGUMENTS, refused_ranks.LARGE
    bound, whole = estimate_rank(trained_demo, arguments, size, Shares(2, 1, 2, 4)), estimate(trained_demo, arguments, size)
    for found in two:
        assert 0.7 * bound.denoiser < found["memory_of_a_band"] <= bound.denoiser
    assert bound.denoiser < 0.7 * whole.denoiser
    assert (bound.vae, bound.weights) == (band_bytes(trained_demo.vae, size, 1, 2), whole.weights)
    native = estimate(trained_demo, arguments, (64, 64)).denoiser
    assert estimate_rank(trained_demo, arguments, (128, 64), Shares(16, 1, 16, 32)).denoiser == native, "every rank draws the base stage"
    halves = estimate_rank(trained_demo, arguments, size, Shares(1, 2, 2, 1))
    assert halves.denoiser == pytest.approx(whole.denoiser / 2, rel=0.2)
    assert halves.halves == 1


def test_a_band_needs_a_fraction_of_the_memory() -> None:
    """SDXL's autoencoder at 8192 pixels: less with more ranks, but never less than a share and what is gathered."""
    vae = built(MODELS["sdxl"])[1].bfloat16()
    size = (8192, 8192)
    whole = vae_bytes(vae, size, 1, tiled=False)
    needs = [band_bytes(vae, size, 1, n) for n in (2, 4, 8)]
    assert needs == sorted(needs, reverse=True)
    for n, need in zip((2, 4, 8), needs, strict=True):
        assert whole / n < need < 2 * whole / n


@pytest.mark.slow
def test_four_processes_give_what_one_gives(tmp_path: Path) -> None:
    names = "split_rows", "drawn", "drawn_in_halves", "changed"
    cases = {name: split_ranks.CASES[name] for name in names}
    found = ranks.run(4, cases, tmp_path)
    for name in SPLIT.keys() - {"odd rows"}:  # 6, of latents
        check_split(found[3]["split_rows"][name], name, 4)
    expected = arrays(drawn_ranks.draw_sdxl())
    assert_same_stages(found[3]["drawn"]["SDXL"], expected)
    assert_same_stages(found[3]["drawn_in_halves"], expected)
    for name in CHANGED:
        assert_same_stages(found[3]["changed"][name], arrays(drawn_ranks.change(name)), ROUNDED.get(name, 1e-10))
