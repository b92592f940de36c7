"""Patched models under diffusers' context parallelism: two processes compute what one computes, in the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scalediff
from bench.models.zoo import WINDOW, ZOO
from scalediff.families import FAMILIES

diffusers = pytest.importorskip("diffusers", reason="context parallelism is diffusers'")

from tests.scalediff.patching import half_ranks, ranks, row_ranks  # noqa: E402
from tests.scalediff.patching.ranks import GRID, NATIVE, PATCHED, UNEVEN, build, inputs, output  # noqa: E402
from tests.scalediff.patching.row_ranks import BY_ROWS, UNETS  # noqa: E402

pytestmark = pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo")

SLOW = ("compiled", "hangs", "fails")  # cases of tests of their own
FAST = {name: case for name, case in ranks.CASES.items() if name not in SLOW}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes computed."""
    return ranks.run(2, FAST | row_ranks.CASES | half_ranks.CASES, tmp_path_factory.mktemp("two"))


def one_process(kind: str, rule: str = "window", *, heads: int = 2, grid: tuple[int, int] = GRID, **changes: Any) -> Tensor:
    model = build(kind, heads=heads)
    with scalediff.patch_model(model, window=WINDOW, text_queries=rule):
        return output(model, inputs(kind, grid, text=2 * heads if heads > 3 else 6) | changes)


def assert_same(out: Tensor, expected: Tensor) -> None:
    """Within rounding: models are in fp64, pipelines in fp32. Parts of a matrix product may be summed in another order."""
    relative = 1e-10 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out, expected, rtol=relative, atol=relative * expected.abs().max().item())


def check_patched(found: dict[str, Any], name: str, heads: int = 2) -> None:
    """Above the native size every call is in windows, once, and at it nothing changes."""
    kind, rule, _ = name.split(", ")
    assert_same(found["above"], one_process(kind, rule, heads=heads))
    assert found["calls"]
    assert set(found["calls"]) == {("patched", 1, 0)}
    assert torch.equal(found["native"], found["unpatched native"])
    assert (found["unpatched"] - found["above"]).abs().max() > 1e-3 * found["above"].abs().max()


@pytest.mark.composes("context parallelism", "network")
@pytest.mark.parametrize("name", PATCHED)
def test_two_processes_give_what_one_gives(name: str, two: list[dict[str, Any]]) -> None:
    check_patched(two[0][name], name)
    for key in ("above", "native"):
        assert torch.equal(two[0][name][key], two[1][name][key])


def test_families_with_a_plan_are_those_that_are_supported() -> None:
    known = [family.denoiser for family in FAMILIES.values() if not family.refusal]
    planned = {name for name in known if getattr(getattr(diffusers, name, None), "_cp_plan", None)}
    assert (
        planned
        == {family.denoiser for family in FAMILIES.values() if family.context_parallel}
        == {ZOO[kind].kind for kind in ranks.PLANNED}
    )


def test_masks_of_the_text_are_gathered(two: list[dict[str, Any]]) -> None:
    expected = one_process("Qwen-Image", encoder_hidden_states_mask=ranks.HOLES)
    assert_same(two[0]["masked"], expected)
    assert not torch.equal(expected, one_process("Qwen-Image"))


def test_parts_may_differ_in_length(two: list[dict[str, Any]]) -> None:
    model = build("FLUX.1")
    with scalediff.patch_model(model, window=WINDOW):
        assert_same(two[0]["anything"], output(model, inputs("FLUX.1", UNEVEN, text=5)))


def test_gradients_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    expected = ranks.gradients_of(build("FLUX.1"), inputs("FLUX.1", GRID))
    assert two[0]["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same(two[0]["gradients"][name], gradient)


def test_a_backend_that_never_calls_sdpa_is_replaced(two: list[dict[str, Any]]) -> None:
    found = two[0]["another_backend"]
    assert_same(found["above"], one_process("FLUX.1"))
    assert found["in windows"] == []
    assert found["all"] == [NATIVE[0] * NATIVE[1] + 6] * 3
    assert found["restored"]


def test_a_layout_says_how_tokens_of_another_model_arrive(two: list[dict[str, Any]]) -> None:
    model = build("Chroma")
    with scalediff.patch_model(model, window=WINDOW, text_rope=False):
        assert_same(two[0]["custom_plan"], output(model, inputs("Chroma", GRID)))


@pytest.mark.composes("context parallelism", "cascade")
def test_the_whole_cascade_draws_the_same_picture(two: list[dict[str, Any]]) -> None:
    one, other = (found["drawn"] for found in two)
    assert_same(one["latents"], ranks.draw(*ranks.built("FLUX")))
    assert torch.equal(one["latents"], other["latents"])
    assert one["refused"] == other["refused"]
    assert one["refused"].startswith(
        "stage 1/3, 20 x 12, has tokens of 4 x 4 pixels: ulysses_degree=2 splits image and text into equal parts"
    )


def test_an_unknown_layout_runs_full_attention_and_says_so(two: list[dict[str, Any]]) -> None:
    for found in (one["two_pictures"] for one in two):
        assert torch.equal(found["out"], found["expected"])
        assert "img_ids must be the ids of one picture" in found["said"][0]


def test_calls_that_are_not_seen_are_an_error(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "made no call of scaled_dot_product_attention" in found["unseen"]
        assert "(3 of 3 self-attention modules of FluxTransformer2DModel)" in found["unseen"]


def test_a_dry_run_of_a_parallel_model(two: list[dict[str, Any]]) -> None:
    assert two[0]["checked"] == ["patched"] * 3


# Pictures that are split by rows: `mesh=`


def check_by_rows(found: dict[str, Any], name: str, world: int) -> None:
    """Every rank's linear layers see its band of rows, every call is in windows, and the result is that of one process."""
    kind, rule = name.split(" by rows, ")
    heads = max(2, world)
    text = 2 * heads if heads > 2 else 6
    model = build(kind, heads=heads)
    with scalediff.patch_model(model, window=WINDOW, text_queries=rule, jitter="alternate"):
        expected, moved = (output(model, inputs(kind, GRID, text=text)) for _ in range(2))
    assert (moved - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_same(found["above"], expected)
    assert_same(found["moved"], moved)
    assert found["tokens"] == [GRID[0] * GRID[1] // world]
    assert set(found["calls"]) == {("patched", 1, 0)}
    assert_same(found["native"], output(build(kind, heads=heads), inputs(kind, NATIVE, text=text)))
    assert found["restored"]
    assert_same(found["alone"], output(build(kind, heads=heads), inputs(kind, GRID, text=text)))


@pytest.mark.parametrize("name", BY_ROWS)
def test_bands_of_rows_give_what_one_process_gives(name: str, two: list[dict[str, Any]]) -> None:
    check_by_rows(two[0][name], name, 2)
    assert torch.equal(two[0][name]["above"], two[1][name]["above"])


def test_the_whole_cascade_by_rows_draws_the_same_picture(two: list[dict[str, Any]]) -> None:
    one, other = (found["drawn_by_rows"] for found in two)
    assert_same(one["latents"], ranks.draw(*ranks.built("FLUX")))
    assert torch.equal(one["latents"], other["latents"])
    assert [(found["split"], found["saves"], found["after"]) for found in (one, other)] == [(True, True, None), (True, False, None)]


def test_rank_0_says_which_pictures_are_missing(two: list[dict[str, Any]]) -> None:
    for said in (found["missing_pictures"] for found in two):
        assert said["drawn"] == [1, 2]
        assert said["numbers"].endswith("got the number of pictures is 3 on rank 0 and 2 on rank 1")


def test_any_number_of_heads(two: list[dict[str, Any]]) -> None:
    assert_same(two[0]["odd_heads"]["above"], one_process("FLUX.1", heads=3))
    assert_same(two[0]["odd_heads"]["native"], output(build("FLUX.1", heads=3), inputs("FLUX.1", NATIVE, text=6)))


@pytest.mark.parametrize("name", UNETS)
def test_bands_of_a_unet_give_what_one_process_gives(name: str, two: list[dict[str, Any]]) -> None:
    check_unet(two[0][name], name, 2)
    assert torch.equal(two[0][name]["above"], two[1][name]["above"])


def check_unet(found: dict[str, Any], name: str, world: int) -> None:
    """Above the native size a band reaches the first convolution, and the whole picture at it and with full attention."""
    kind, halves = name.removesuffix(" halves").split(" by rows, ")
    batch, bands = 2 // int(halves), world // int(halves)
    model, rows = ZOO[kind].build().double(), row_ranks.UNET_GRID[0]
    with scalediff.patch_model(model, window=WINDOW, jitter="alternate") as handle:
        expected, moved = (output(model, row_ranks.unet_inputs(kind, row_ranks.UNET_GRID)) for _ in range(2))
        native = output(model, row_ranks.unet_inputs(kind, WINDOW))
        calls = [row.status for row in handle.report.rows]
    assert (moved - expected).abs().max() > 1e-5 * expected.abs().max()
    assert_same(found["above"], expected)
    assert_same(found["moved"], moved)
    assert torch.equal(found["native"], native)
    assert_same(found["full"], output(model, row_ranks.unet_inputs(kind, row_ranks.UNET_GRID)))
    assert found["rows"] == [(batch, rows // bands), (batch, rows // bands), (2, WINDOW[0]), (2, WINDOW[0]), (2, rows)]
    assert found["calls"] == found["dry"] == calls


@pytest.mark.parametrize("name", half_ranks.HALVED)
def test_halves_of_a_batch_give_what_one_process_gives(name: str, two: list[dict[str, Any]]) -> None:
    """Also of prompts of different lengths; every rank sees one sample, and passes with an odd batch or of the native size whole."""
    kind, found = name.removesuffix(" in halves"), two[0][name]
    model, given = ZOO[kind].build().double(), row_ranks.unet_inputs(kind, half_ranks.grid_of(kind))
    with scalediff.patch_model(model, window=WINDOW):
        assert_same(found["above"], output(model, given))
        assert_same(found["single"], output(model, half_ranks.first_sample(given)))
        assert_same(found["native"], output(model, row_ranks.unet_inputs(kind, WINDOW)))
    assert torch.equal(found["above"], two[1][name]["above"])
    assert found["calls"] == {"patched"}
    one = found["batches"][0]
    assert found["batches"] == [one, one, 2 * one]


def test_halves_may_be_of_other_lengths_than_the_batch(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert_same(found["ragged_halves"], torch.cat([half_ranks.joint([6]), half_ranks.joint([3])]))


def test_the_whole_cascade_in_halves_draws_the_same_picture(two: list[dict[str, Any]]) -> None:
    one, other = (found["drawn_in_halves"] for found in two)
    assert_same(one["latents"], ranks.draw(*ranks.built("SD3")))
    assert torch.equal(one["latents"], other["latents"])
    assert set(one["batches"]) == {1, 2}  # above the native size, and at it


@pytest.mark.parametrize("name", half_ranks.CONTROLLED)
def test_residuals_of_a_split_unet_are_cut(name: str, two: list[dict[str, Any]]) -> None:
    expected = half_ranks.with_control(None)
    for which, out in two[0][name].items():
        assert_same(out, expected[which])
        assert torch.equal(out, two[1][name][which])
    assert (expected["ControlNet"] - expected["adapter"]).abs().max() > 1e-3 * expected["adapter"].abs().max()


def test_residuals_of_a_transformer_are_halved(two: list[dict[str, Any]]) -> None:
    assert_same(two[0]["halved_control"], half_ranks.sd3_with_control(None))


def test_halves_of_what_a_network_returns(two: list[dict[str, Any]]) -> None:
    expected = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[5.0, 6.0, 7.0, 8.0]]])  # rank 1 adds 1 to its sample
    for found in (found["own_network"] for found in two):
        assert torch.equal(found["tensor"], expected)
        assert torch.equal(found["tuple"][0], expected)
        assert found["tuple"][1:] == ("more",)
        assert found["dict"] == "mesh= needs a network that returns a tensor, a tuple or a sample, got dict"


def test_what_has_no_halves(two: list[dict[str, Any]]) -> None:
    for said in (found["refused_halves"] for found in two):
        assert said["parallel"] == "this FluxTransformer2DModel is parallel already: pass mesh= or call enable_parallelism, not both"
        assert said["FLUX.1"].startswith(
            "mesh= splits FluxTransformer2DModel by rows alone, in one dimension: its pipelines run the model for"
        )
        assert said["ranks"] == "a mesh must have 2 ranks for guidance, got 1"
        assert said["control"] == "mesh= splits the rows of a transformer without ControlNets, got FluxControlNetModel"
        assert said["list"] == "a mesh with guidance halves latents in one tensor, got x in a list"
        assert said["gradients"] == "a mesh with guidance does not support gradients: use torch.no_grad()"


def test_the_whole_cascade_of_a_unet_draws_the_same_picture(two: list[dict[str, Any]]) -> None:
    one, other = (found["demo_by_rows"] for found in two)
    assert_same(one, row_ranks.drawn_demo(None))
    assert torch.equal(one, other)


def test_a_picture_is_split_for_its_run_alone(two: list[dict[str, Any]]) -> None:
    one, other = (found["generated_by_rows"] for found in two)
    assert_same(one["latents"], two[0]["demo_by_rows"])
    for found in (one, other):
        assert torch.equal(found["latents"], one["latents"])
        assert found["rows"] == [16, 22]  # a band of 32 rows, and the whole base stage
        assert found["restored"]
        assert found["wrap"] == "wrap is for models on one device: mesh= splits the rows of this one, got wrap=(False, True)"
        assert found["patched wrap"] == "mesh= splits pictures that do not continue on the other side, got wrap=(False, True)"
        assert found["patched"].startswith("mesh= of a run is for a pipeline that is not patched: pass it to patch_model")
        assert "the digest of the weights is" in found["weights"]


def test_what_a_split_unet_cannot_take(two: list[dict[str, Any]]) -> None:
    for said in (found["refused_unets"] for found in two):
        assert said["rows"].startswith("2 ranks split a picture into equal bands of rows, got 9 rows of tokens")
        assert said["mesh"].startswith("a mesh of two dimensions must be of 2 ranks for 'guidance' and others for 'rows', got DeviceMesh")
        assert said["FreeU"] == "mesh= does not split FreeU's Fourier transforms: call disable_freeu()"
        assert said["masks"] == "mesh= does not split the masks of an IP-Adapter, got ip_adapter_masks"
        assert said["tokens"].startswith("mesh= does not split full attention of a U-Net: image and text have the same number of tokens")
        assert said["PAG"].startswith("a mesh with guidance halves the batch, which perturbed-attention guidance needs whole")
        assert "runs full attention" in said["own"]


def test_a_compiled_unet_runs_uncompiled_where_its_rows_are_split(two: list[dict[str, Any]]) -> None:
    found, expected = two[0]["compiled_unet"], two[0]["SD1.5 by rows, 1 halves"]["above"]
    assert all(torch.equal(out, expected) for out in found["above"])
    assert found["graphs"] == 0
    assert ["compiled parts of UNet2DConditionModel run uncompiled" in said for said in found["said"]] == [True]


def test_a_split_model_can_be_patched_again(two: list[dict[str, Any]]) -> None:
    for found in (found["patched_again"] for found in two):
        assert_same(found["above"], one_process("FLUX.1"))
        assert found["restored"]


def test_what_cannot_be_split_is_refused_with_numbers(two: list[dict[str, Any]]) -> None:
    for said in (found["refused_by_rows"] for found in two):
        assert said["family"].endswith("name 'guidance' halves the batch of any model, got ChromaTransformer2DModel")
        assert said["parallel"] == "this FluxTransformer2DModel is parallel already: pass mesh= or call enable_parallelism, not both"
        assert said["rows"].startswith("2 ranks split a picture into equal bands of rows, got 7 rows of tokens: choose a height")
        assert "runs full attention: masks of the text are not supported over ranks" in said["mask"]
        assert said["accelerator"] == "mesh= needs an accelerator, as diffusers' context parallelism does: got none"
        assert said["gradients"] == "attention over ranks does not support gradients: use torch.no_grad()"


def test_a_part_of_the_processes_is_refused(two: list[dict[str, Any]]) -> None:
    assert two[0]["refused_by_rows"]["few"] == "mesh= must have all processes, got 1 of 2"


def test_ranks_that_differ_are_named(two: list[dict[str, Any]]) -> None:
    contract = "all ranks must have the same versions, model and inputs, got "
    for said in (found["refused_by_rows"] for found in two):
        assert said["seed"] == contract + "seed is 0 on rank 0 and 1 on rank 1"
        assert said["weights"].startswith(contract + "the digest of the weights is ")
        assert said["prompt"].startswith(contract + "encoder_hidden_states is (2, 6, 32) of torch.float64 with the checksum ")
        assert "the token layout is Layout(grid=(8, 6)" in said["size"]
        assert said["jitter"] == contract + "the jitter is alternate after 1 steps on rank 0 and alternate after 0 steps on rank 1"


# Longer runs


@pytest.mark.slow
def test_four_processes_give_what_one_gives(tmp_path: Path) -> None:
    found = ranks.run(4, PATCHED | BY_ROWS | UNETS, tmp_path)
    for name in UNETS:
        check_unet(found[3][name], name, 4)
    for name in PATCHED:
        check_patched(found[3][name], name, heads=4)
    for name in BY_ROWS:
        check_by_rows(found[3][name], name, 4)


@pytest.mark.slow
def test_a_compiled_model_gives_what_it_gives_uncompiled(tmp_path: Path) -> None:
    for out, grid in zip(ranks.run(2, {"compiled": ranks.compiled}, tmp_path)[0]["compiled"], (GRID, (6, 8)), strict=True):
        assert_same(out, one_process("FLUX.1", grid=grid))
