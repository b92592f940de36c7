"""Scores of folders: each statistic is that of NumPy or of `bench.quality.metrics`, pairs are pairs, and what does not match is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench.evaluate.folders import comparison_size, open_folder, read_picture
from bench.evaluate.networks import Inception
from bench.evaluate.protocols import PROTOCOLS, described
from bench.evaluate.repetition import repetition
from bench.evaluate.scoring import BICUBIC, NETWORK_STATISTICS, REFERENCE, Options, Score, random_crops, score
from bench.quality.metrics import high_frequency_ratio, radial_power, seam_score, sharpness, sliced_distances, spectrum_distance
from bench.quality.pictures import batch_of
from tests.bench.evaluate.pictures import RedMeansRed, generated_folder, picture, plain_folder, small_inception
from tests.bench.evaluate.test_distances import fid_by_numpy, kid_by_numpy

PROMPTS = [f"a {'red' if i % 2 else 'blue'} fox {i}" for i in range(12)]
SMALL = PROTOCOLS["scalediff"].with_crops(3, 32)


def pictures_of(path: Path) -> list[Image.Image]:
    return [read_picture(file) for file in sorted(path.glob("*.png"))]


def images_of(path: Path) -> Tensor:
    return batch_of(*pictures_of(path)).float() / 255


def features_of(pictures: Sequence[Image.Image]) -> np.ndarray:
    network = small_inception()
    features = torch.cat([network(batch_of(one.resize((32, 32), BICUBIC)))[0] for one in pictures])
    return features.double().numpy()


def spectrum(ours: Tensor, theirs: Tensor) -> float:
    return spectrum_distance(radial_power(ours), radial_power(theirs))(torch.arange(len(ours)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    generated_folder(root / "sharp", PROMPTS)
    generated_folder(root / "smooth", PROMPTS, blur=True)
    plain_folder(root / "true", range(50, 70))
    return root


@pytest.fixture(scope="module")
def scores(folders: Path) -> dict[str, dict[str, Score]]:
    options = Options(NETWORK_STATISTICS, SMALL, small_inception(), RedMeansRed(), draws=20, splits=2)
    return score([open_folder(folders / name) for name in ("sharp", "smooth")], open_folder(folders / "true"), options)


def test_fid_and_kid_are_those_of_numpy(folders: Path, scores: dict[str, dict[str, Score]]) -> None:
    true = features_of(pictures_of(folders / "true"))
    for name in ("sharp", "smooth"):
        pictures = pictures_of(folders / name)
        crops = [crop for i, one in enumerate(pictures) for crop in random_crops(one, "", SMALL, count=12, seed=i)]
        assert len(crops) == 36
        for suffix, ours in (("", features_of(pictures)), ("_patch", features_of(crops))):
            found = scores[name]
            assert found[f"fid{suffix}"].value.value == pytest.approx(fid_by_numpy(ours, true), rel=1e-4)
            assert found[f"kid{suffix}"].value.value == pytest.approx(kid_by_numpy(ours, true), rel=1e-6)


def test_without_a_network_the_statistics_are_those_of_bench_quality(folders: Path, scores: dict[str, dict[str, Score]]) -> None:
    true = images_of(folders / "true")
    for name in ("sharp", "smooth"):
        images, found = images_of(folders / name), scores[name]
        assert found["hf_ratio"].value.value == pytest.approx(high_frequency_ratio(images), rel=1e-5)
        assert found["sharpness"].value.value == pytest.approx(sharpness(images), rel=1e-5)
        assert found["spectrum"].value.value == pytest.approx(spectrum(images, true), rel=1e-5)
        seam, *controls = seam_score(images, period=16).values()
        assert found["seam"].value.value == pytest.approx(float(seam), rel=1e-4)
        assert found["seam_control"].value.value == pytest.approx(max(map(float, controls)), rel=1e-4)
        assert found["seconds"].value.value == 6.5
        swd = sliced_distances(images, true[:12], generator=torch.Generator().manual_seed(0), directions=512)[48]
        assert found["swd_fine"].value.value == pytest.approx(swd(torch.arange(12)), rel=0.25)


def test_the_reference_is_nearer_to_the_sharp_pictures(scores: dict[str, dict[str, Score]]) -> None:
    for name in ("spectrum", "swd", "swd_fine"):
        difference = scores["smooth"][name].difference
        assert difference is not None
        assert 0 < difference.low < difference.value < difference.high


def test_the_reference_shows_its_own_numbers(folders: Path, scores: dict[str, dict[str, Score]]) -> None:
    true, found = images_of(folders / "true"), scores[REFERENCE]
    assert found["hf_ratio"].value.value == pytest.approx(high_frequency_ratio(true), rel=1e-5)
    assert found["sharpness"].value.value == pytest.approx(sharpness(true), rel=1e-5)
    assert scores["smooth"]["sharpness"].value.value < 0.1 * scores["sharp"]["sharpness"].value.value


@pytest.mark.parametrize("side", [128, 160])
def test_repetition_is_that_of_any_pictures_and_of_the_reference_at_any_size(tmp_path: Path, side: int) -> None:
    plain_folder(tmp_path / "ours", range(2), (160, 160), blur=True)
    plain_folder(tmp_path / "true", range(5, 7), (side, side), blur=True)
    scores = score([open_folder(tmp_path / "ours")], open_folder(tmp_path / "true"), Options(draws=0))
    for name, folder in (("ours", "ours"), (REFERENCE, "true")):
        expected = float(repetition(images_of(tmp_path / folder)).mean())
        assert scores[name]["repetition"].value.value == pytest.approx(expected, rel=1e-9)
    assert ("sharpness" in scores[REFERENCE]) == ("hf_ratio" in scores[REFERENCE]) == (side == 160)


def test_differences_are_of_pairs(scores: dict[str, dict[str, Score]]) -> None:
    """Both folders have the same shapes, so that a picture's own level falls out of the difference."""
    sharp, smooth = scores["sharp"]["clip"], scores["smooth"]["clip"]
    assert sharp.difference is None
    assert smooth.difference is not None
    assert smooth.difference.value == pytest.approx(smooth.value.value - sharp.value.value)
    assert smooth.difference.high - smooth.difference.low < 0.3 * (smooth.value.high - smooth.value.low)


def test_the_clip_score_is_a_hundred_cosines_and_never_below_zero(folders: Path, scores: dict[str, dict[str, Score]]) -> None:
    red = images_of(folders / "sharp")[:, 0].double().mean((1, 2))
    expected = 100 * sum(red[i] for i in range(12) if "red" in PROMPTS[i]) / 12
    assert scores["sharp"]["clip"].value.value == pytest.approx(float(expected), rel=1e-6)


def test_a_folder_scored_against_itself(folders: Path) -> None:
    folder = open_folder(folders / "sharp")
    found = score([folder], folder, Options(("fid", "kid"), None, small_inception(), draws=0))["sharp"]
    for name in ("fid", "spectrum", "swd"):
        assert found[name].value.value == pytest.approx(0, abs=1e-6)
        assert math.isnan(found[name].value.low)
    ours = features_of(pictures_of(folder.path))
    assert found["kid"].value.value == pytest.approx(kid_by_numpy(ours, ours), rel=1e-6)


def test_a_reference_that_is_cropped_too(folders: Path) -> None:
    both = PROTOCOLS["lsrna"].with_crops(2, 32)
    ours, true = (open_folder(folders / name) for name in ("sharp", "true"))
    found = score([ours], true, Options(("fid_patch",), both, small_inception(), draws=0))
    sides = [
        features_of([crop for i, one in enumerate(pictures_of(folder.path)) for crop in random_crops(one, "", both, count=9, seed=i)])
        for folder in (ours, true)
    ]
    assert found["sharp"]["fid_patch"].value.value == pytest.approx(fid_by_numpy(*sides), rel=1e-4)


def test_without_a_reference_only_what_needs_none(folders: Path) -> None:
    found = score([open_folder(folders / "sharp")], None, Options(("is",), None, small_inception(), draws=3, splits=2))
    assert set(found["sharp"]) == {"seconds", "hf_ratio", "sharpness", "discs", "seam", "seam_control", "is"}
    with pytest.raises(ValueError, match="fid, kid need a reference: pass --reference FOLDER, got none"):
        score([open_folder(folders / "sharp")], None, Options(("fid", "kid")))


def test_smaller_and_oblong_references_are_compared_at_their_size(tmp_path: Path) -> None:
    plain_folder(tmp_path / "ours", range(3), (64, 48))
    plain_folder(tmp_path / "true", range(2), (40, 36))
    ours, true = open_folder(tmp_path / "ours"), open_folder(tmp_path / "true")
    assert comparison_size((64, 48), true) == (40, 30)
    scores = score([ours], true, Options(draws=0))
    assert REFERENCE not in scores  # its numbers are of another size
    found = scores["ours"]
    fitted = ([ImageOps.fit(one, (30, 40), BICUBIC) for one in pictures_of(folder.path)] for folder in (ours, true))
    assert found["spectrum"].value.value == pytest.approx(spectrum(*(batch_of(*images).float() / 255 for images in fitted)), rel=1e-5)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_says_its_biases_and_what_is_unknown(name: str) -> None:
    text = described(name, PROTOCOLS[name])
    assert "- biased: " in text
    assert "- not established: " in text
    assert (not PROTOCOLS[name].crops_reference) == ("against whole photos" in text)


def test_crops_in_all_are_spread_over_the_pictures() -> None:
    assert PROTOCOLS["lsrna"].crops_of(1000) == 50
    assert PROTOCOLS["lsrna"].crops_of(3001) == 17
    assert PROTOCOLS["accdiffusion"].crops_of(3) == 10


@pytest.mark.parametrize("name", ["hiflow", "pixelrush"])
def test_crops_that_are_not_established_are_not_guessed(name: str) -> None:
    with pytest.raises(ValueError, match=r"are not established .* pass --crops and --crop-size"):
        PROTOCOLS[name].crops_of(10)
    assert PROTOCOLS[name].with_crops(4, 299).crops_of(10) == 4


def test_crops_lie_anywhere_and_a_seed_repeats_them() -> None:
    one, protocol = picture(0), PROTOCOLS["fam"].with_crops(60, 40)
    crops, again = ([crop.tobytes() for crop in random_crops(one, "", protocol, count=1, seed=3)] for _ in range(2))
    places = {(y, x) for y in range(9) for x in range(9) if one.crop((x, y, x + 40, y + 40)).tobytes() in crops}
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))
    assert crops == again


def test_crops_larger_than_a_picture_are_refused(folders: Path) -> None:
    large = Options(("is_patch",), PROTOCOLS["scalediff"].with_crops(2, 64), small_inception(), splits=2)
    with pytest.raises(ValueError, match=r"as large as a crop, 64 x 64, got 48 x 48 in 000000-0\.png"):
        score([open_folder(folders / "sharp")], None, large)


def test_fid_of_fewer_pictures_than_features_needs_force(folders: Path) -> None:
    many = Inception(small_inception().network, torch.device("cpu"), features=2048, side=32)
    ours, true = [open_folder(folders / "sharp")], open_folder(folders / "true")
    with pytest.raises(ValueError, match=r"FID of 2048 features needs as many whole pictures on each side, got 12 and 20: .* --force"):
        score(ours, true, Options(("fid",), None, many))
    assert score(ours, true, Options(("fid",), None, many, draws=0, force=True))["sharp"]["fid"].value.value > 0
    with pytest.raises(ValueError, match=r"as many crops on each side, got 36 and 20: .* Leave fid_patch out"):
        score(ours, true, Options(("fid_patch",), SMALL, many))


def test_scores_that_lack_something(folders: Path) -> None:
    plain, sharp, network = open_folder(folders / "true"), open_folder(folders / "sharp"), small_inception()
    with pytest.raises(ValueError, match=r"the CLIP score needs the prompts of a folder that `generate` drew, got .*true"):
        score([plain], None, Options(("clip",), None, None, RedMeansRed()))
    with pytest.raises(ValueError, match="fid_patch need a protocol, which says the crops: pass --protocol, got none"):
        score([sharp], plain, Options(("fid_patch",), None, network))
    with pytest.raises(ValueError, match="one picture or crop for each of 13 splits, got 12: pass --splits"):
        score([sharp], None, Options(("is",), None, network, splits=13))


def test_pictures_smaller_than_two_query_patches_and_a_half_have_no_seam_score(tmp_path: Path) -> None:
    folder = open_folder(generated_folder(tmp_path / "small", PROMPTS[:2], (32, 48)))
    assert set(score([folder], None, Options(draws=0))["small"]) == {"seconds", "hf_ratio", "sharpness", "discs"}


def test_pictures_too_small_to_compare(tmp_path: Path) -> None:
    plain_folder(tmp_path / "small", range(2), (12, 48))
    with pytest.raises(ValueError, match="sides of at least 16, got 12 x 48 in common"):
        score([open_folder(tmp_path / "small")], open_folder(tmp_path / "small"), Options())
