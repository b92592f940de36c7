"""The statistics of folders of pictures, with bootstrap intervals, and their paired differences from the first folder.

Every picture is read once, and all that the statistics need of it is kept.

Legend: N pictures, C crops, D features, K classes, P patches, R rings of a spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench.evaluate import distances
from bench.evaluate.distances import Interval, interval
from bench.evaluate.folders import Folder, common_size, comparison_size, read_picture
from bench.evaluate.networks import Clip, Inception
from bench.evaluate.protocols import Protocol
from bench.evaluate.repetition import WORKING, repetition
from bench.quality import metrics
from bench.quality.metrics import Statistic, mean_of
from bench.quality.pictures import batch_of
from scalediff.cascade.metadata import read_metadata

INCEPTION_STATISTICS = ("fid", "kid", "is", "fid_patch", "kid_patch", "is_patch")
NETWORK_STATISTICS = (*INCEPTION_STATISTICS, "clip")
REFERENCE = "(reference)"
SMALLEST = 16  # pixels per side that spectra and pyramids need
PATCHES = 128  # of each level of each picture
DEMO = "demo"  # the model whose pictures have discs to count
BICUBIC = Image.Resampling.BICUBIC
CPU = torch.device("cpu")
_DIRECTIONS = 128


@dataclass(frozen=True)
class Options:
    wanted: Sequence[str] = ()  # of NETWORK_STATISTICS
    protocol: Protocol | None = None  # says which crops; the statistics of crops need it
    inception: Inception | None = None  # where its statistics are wanted, as the next
    clip: Clip | None = None
    draws: int = 100  # of the bootstrap
    splits: int = 10  # of the Inception score
    force: bool = False  # compute FID of fewer pictures than features
    device: torch.device = CPU  # of the computations with features, in fp64

    @property
    def crops(self) -> Protocol | None:
        """The protocol, where statistics of crops are wanted."""
        return self.protocol if any(name.endswith("_patch") for name in self.wanted) else None


@dataclass(frozen=True)
class Score:
    """One number of one folder, and its paired difference from that of the first folder."""

    value: Interval
    difference: Interval | None = None


def score(folders: Sequence[Folder], reference: Folder | None, options: Options) -> dict[str, dict[str, Score]]:
    """Scores by folder and statistic; under `REFERENCE` the repetition of the reference, and its HF ratio and sharpness at the same size.

    ValueError where folders cannot be compared, a picture is unreadable or too small, a statistic lacks its reference or prompts, or FID
    would be of fewer pictures than features.
    """
    size = common_size(folders)
    compared = None if reference is None else comparison_size(size, reference)
    if compared is not None and min(compared) < SMALLEST:
        raise ValueError(f"pictures and reference must have sides of at least {SMALLEST}, got {compared[0]} x {compared[1]} in common")
    check_wanted(folders[0], reference, options, features=options.inception.features if options.inception else 0)
    of_reference = None if reference is None else measure(reference, compared, options, reference=True)
    every, draws = torch.arange(len(folders[0])), metrics.resamples(len(folders[0]), options.draws)
    found: dict[str, dict[str, Score]] = {}
    first: dict[str, tuple[float, Tensor]] = {}
    for folder in folders:
        statistics = _statistics(measure(folder, compared, options), of_reference, options)
        values = {name: (statistic(every), metrics.replicated(statistic, draws)) for name, statistic in statistics.items()}
        gaps = {
            name: interval(value - first[name][0], by_draw - first[name][1]) for name, (value, by_draw) in values.items() if name in first
        }
        found[folder.name] = {name: Score(interval(*both), gaps.get(name)) for name, both in values.items()}
        first = first or values
    if of_reference is not None:  # what the numbers should be; all but the repetition depend on the size
        shown = {"repetition", *(("hf_ratio", "sharpness") if compared == size else ())} & of_reference.keys()
        if shown:
            found[REFERENCE] = {name: Score(Interval(float(of_reference[name].mean()))) for name in sorted(shown)}
    return found


def check_wanted(folder: Folder, reference: Folder | None, options: Options, *, features: int) -> None:
    """Find what is missing before networks see the first picture; `features` is the number of them that FID has. ValueError as `score`."""
    wanted, n, m = options.wanted, len(folder), 0 if reference is None else len(reference)
    if options.protocol is None and (cropped := [name for name in wanted if name.endswith("_patch")]):
        raise ValueError(f"{', '.join(cropped)} need a protocol, which says the crops: pass --protocol, got none")
    if reference is None and (lacking := [name for name in wanted if name.startswith(("fid", "kid"))]):
        raise ValueError(f"{', '.join(lacking)} need a reference: pass --reference FOLDER, got none")
    if "clip" in wanted and not folder.run:
        raise ValueError(f"the CLIP score needs the prompts of a folder that `generate` drew, got {folder.path}")
    rows = {"": ("whole pictures", n, m)}
    if crops := options.crops:
        rows["_patch"] = ("crops", n * crops.crops_of(n), m * crops.crops_of(m) if m and crops.crops_reference else m)
    for suffix, (what, ours, theirs) in rows.items():
        if f"is{suffix}" in wanted and ours < options.splits:
            raise ValueError(f"IS needs at least one picture or crop for each of {options.splits} splits, got {ours}: pass --splits")
        if f"fid{suffix}" in wanted and min(ours, theirs) < features and not options.force:
            raise ValueError(
                f"FID of {features} features needs as many {what} on each side, got {ours} and {theirs}: its covariance "
                f"would be singular and FID too large, by more the fewer there are. Leave fid{suffix} out of --statistics, or compute it "
                "all the same with --force"
            )


def _statistics(measured: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None, options: Options) -> dict[str, Statistic]:
    """Of the pictures with the numbers that it is given; FID and KID beside the reference."""
    found = {name: mean_of(values) for name, values in measured.items() if values.ndim == 1}
    if "controls" in measured:
        found["seam_control"] = lambda chosen: float(measured["controls"][chosen].mean(0).max())
    if reference is not None:
        found["spectrum"] = metrics.spectrum_distance(measured["radial"], reference["radial"])
        found |= _sliced(measured, reference)
    for suffix in ("", "_patch"):
        if f"is{suffix}" in options.wanted:
            logits = measured[f"logits{suffix}"].to(options.device)
            found[f"is{suffix}"] = distances.inception_statistic(logits, splits=options.splits)
        for name, statistic in (("fid", distances.frechet_statistic), ("kid", distances.kernel_distance)):
            if f"{name}{suffix}" in options.wanted:
                assert reference is not None
                ours = measured[f"features{suffix}"]
                theirs = reference.get(f"features{suffix}", reference["features"])  # for crops its crops, or its whole pictures
                found[f"{name}{suffix}"] = statistic(ours.to(options.device), theirs.to(options.device))
    return found


def _sliced(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Statistic]:
    """As `bench.quality.metrics.sliced_distances`: the mean over the levels, and the finest level."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name in ours if name.startswith("patches")]
    levels = [metrics.sliced_distance(ours[name], theirs[name], generator=generator, directions=_DIRECTIONS) for name in names]
    return {"swd": lambda chosen: fmean(level(chosen) for level in levels), "swd_fine": levels[0]}


def measure(folder: Folder, compared: tuple[int, int] | None, options: Options, *, reference: bool = False) -> dict[str, Tensor]:
    """Measure generated pictures, or those of the reference, of any sizes; of these also what `_alone` finds, at the compared size.

    By name `[N]` fp64 of each statistic that is a mean over pictures, and what the others are made of: `controls`, `[N, 6]` seam scores at
    the control periods; `features` `[N, C, D]` and `logits` `[N, C, K]` of whole pictures, where C is 1, and with the suffix `_patch` of
    crops. With a reference, at the (height, width) `compared`: `radial`, `[N, R]` power spectra; `patches SIDE`, `[N, P, 3, 7, 7]` of each
    level, the finest first. ValueError where a picture is unreadable, or smaller than a crop.
    """
    found = []
    for number, file in enumerate(folder.files):
        picture = read_picture(file)
        one = {} if reference else _measure_alone(picture, file, folder.run, options)
        if compared is not None:
            image = batch_of(ImageOps.fit(picture, compared[::-1], BICUBIC)).float() / 255
            one |= _compare(image, number)
            if reference:
                one |= _alone(image)
        if options.inception is not None:
            sizes = (options.inception.side, options.inception.side)
            one["features"], one["logits"] = options.inception(batch_of(picture.resize(sizes, BICUBIC)))
            if options.crops and (options.crops.crops_reference or not reference):
                crops = random_crops(picture, file.name, options.crops, count=len(folder), seed=number)
                resized = [crop.resize(sizes, BICUBIC) for crop in crops] if options.crops.resized else crops
                one["features_patch"], one["logits_patch"] = options.inception(batch_of(*resized))
        found.append(one)
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def _compare(image: Tensor, number: int) -> dict[str, Tensor]:
    """Spectrum and patches. Picture number i of every folder has its patches at the same places."""
    found = {"radial": metrics.radial_power(image)[0]}
    generator = torch.Generator().manual_seed(number)
    for level in metrics.laplacian_pyramid(image):
        y, x = (torch.randint(0, n - 6, (1, PATCHES), generator=generator) for n in level.shape[2:])
        found[f"patches {min(level.shape[2:])}"] = metrics.patches_at(level, y, x)
    return found


def _measure_alone(picture: Image.Image, file: Path, run: Mapping[str, Any], options: Options) -> dict[str, Tensor]:
    """What a generated picture shows without a reference."""
    pixels, border = batch_of(picture), run.get("patch_border", 0)
    image = pixels.float() / 255
    found = _alone(image)
    if run:
        record = read_metadata(file)
        found["seconds"] = _number(record["seconds"])
        if options.clip is not None:
            found["clip"] = _number(100 * max(float(options.clip(pixels, [record["prompt"]])[0]), 0.0))
    if run.get("model") == DEMO:
        found["discs"] = _number(metrics.count_discs(image)[0])
    if border >= 16 and min(picture.size) >= 2 * round(1.25 * border):  # what a seam score needs
        found["seam"], *controls = map(_number, metrics.seam_score(image, period=border).values())
        found["controls"] = torch.stack(controls)
    return found


def _alone(image: Tensor) -> dict[str, Tensor]:
    """What any picture shows, true ones too."""
    found = {"hf_ratio": _number(metrics.high_frequency_ratio(image)), "sharpness": _number(metrics.sharpness(image))}
    return found | ({"repetition": repetition(image)[0]} if min(image.shape[2:]) >= WORKING else {})


def _number(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def random_crops(picture: Image.Image, name: str, protocol: Protocol, *, count: int, seed: int) -> list[Image.Image]:
    """The crops that a protocol takes from one of `count` pictures, at places drawn uniformly with the seed; raises as `measure`."""
    each, side = protocol.crops_of(count), protocol.crop or 0
    if min(picture.size) < side:
        raise ValueError(f"a picture must be as large as a crop, {side} x {side}, got {picture.height} x {picture.width} in {name}")
    generator = torch.Generator().manual_seed(seed)
    sizes = (picture.height, picture.width)
    places = [[int(torch.randint(n - side + 1, (1,), generator=generator)) for n in sizes] for _ in range(each)]
    return [picture.crop((x, y, x + side, y + side)) for y, x in places]
