"""The statistics of folders of pictures, with bootstrap intervals, and their paired differences from the first folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from bench.evaluate import distances
from bench.evaluate.distances import Interval, interval
from bench.evaluate.folders import Folder, common_size, comparison_size
from bench.evaluate.measuring import Measured, Options, measure
from bench.quality.metrics import Statistic, mean_of, replicated, resamples, sliced_distance, spectrum_distance

INCEPTION_STATISTICS = ("fid", "kid", "is", "fid_patch", "kid_patch", "is_patch")
NETWORK_STATISTICS = (*INCEPTION_STATISTICS, "clip")
REFERENCE = "(reference)"
SMALLEST = 16  # pixels per side that spectra and pyramids need
_DIRECTIONS = 128


@dataclass(frozen=True)
class Score:
    """One number of one folder, and its paired difference from that of the first folder."""

    value: Interval
    difference: Interval | None = None


def score(folders: Sequence[Folder], reference: Folder | None, options: Options) -> dict[str, dict[str, Score]]:
    """Scores by folder and statistic; those of the reference itself, where its pictures are as large, under `REFERENCE`.

    Raises:
        ValueError: The folders cannot be compared, a picture is unreadable or too small, a statistic lacks its reference or prompts, or FID
            would be of fewer pictures than features.
    """
    size = common_size(folders)
    compared = None if reference is None else comparison_size(size, reference)
    if compared is not None and min(compared) < SMALLEST:
        raise ValueError(f"pictures and reference must have sides of at least {SMALLEST}, got {compared[0]} x {compared[1]} in common")
    _check_wanted(folders[0], reference, options)
    of_reference = None if reference is None else measure(reference, compared, options, reference=True)
    draws = resamples(len(folders[0]), options.draws)
    found: dict[str, dict[str, Score]] = {}
    first: dict[str, tuple[float, Tensor]] = {}
    for folder in folders:
        measured = measure(folder, compared, options)
        statistics = _statistics(measured, of_reference, options)
        values = {name: (statistic(torch.arange(len(folder))), replicated(statistic, draws)) for name, statistic in statistics.items()}
        gaps = {
            name: interval(value - first[name][0], by_draw - first[name][1]) for name, (value, by_draw) in values.items() if name in first
        }
        found[folder.name] = {name: Score(interval(*both), gaps.get(name)) for name, both in values.items()}
        first = first or values
    if of_reference is not None and compared == size:  # what the HF ratio should be
        found[REFERENCE] = {"hf_ratio": Score(Interval(fmean(of_reference.numbers["hf_ratio"])))}
    return found


def _check_wanted(folder: Folder, reference: Folder | None, options: Options) -> None:
    """Find what is missing before networks see the first picture."""
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
        if f"fid{suffix}" in wanted and options.inception and min(ours, theirs) < options.inception.features and not options.force:
            raise ValueError(
                f"FID of {options.inception.features} features needs as many {what} on each side, got {ours} and {theirs}: its covariance "
                f"would be singular and FID too large, by more the fewer there are. Leave fid{suffix} out of --statistics, or compute it "
                "all the same with --force"
            )


def _statistics(measured: Measured, reference: Measured | None, options: Options) -> dict[str, Statistic]:
    """Of the pictures with the numbers that it is given; FID and KID beside the reference."""
    found = {name: mean_of(torch.tensor(values, dtype=torch.float64)) for name, values in measured.numbers.items()}
    if measured.controls:
        controls = torch.stack(measured.controls)
        found["seam_control"] = lambda chosen: float(controls[chosen].mean(0).max())
    if reference is not None:
        found["spectrum"] = spectrum_distance(torch.stack(measured.radial), torch.stack(reference.radial))
        found |= _sliced(measured.patches, reference.patches)
    for suffix in measured.features:
        if f"is{suffix}" in options.wanted:
            logits = torch.stack([one for _, one in measured.features[suffix]]).to(options.device)
            found[f"is{suffix}"] = distances.inception_statistic(logits, splits=options.splits)
        if f"fid{suffix}" in options.wanted:
            found[f"fid{suffix}"] = distances.frechet_statistic(*_features(measured, reference, suffix, options))
        if f"kid{suffix}" in options.wanted:
            found[f"kid{suffix}"] = distances.kernel_distance(*_features(measured, reference, suffix, options))
    return found


def _features(measured: Measured, reference: Measured | None, suffix: str, options: Options) -> tuple[Tensor, Tensor]:
    """`[N, C, D]` of the pictures, and what they are compared with: for crops the reference's crops, or its whole pictures."""
    assert reference is not None
    sides = measured.features[suffix], reference.features.get(suffix) or reference.features[""]
    ours, theirs = (torch.stack([features for features, _ in side]).to(options.device) for side in sides)
    return ours, theirs


def _sliced(ours: Mapping[int, list[Tensor]], theirs: Mapping[int, list[Tensor]]) -> dict[str, Statistic]:
    """As `bench.quality.metrics.sliced_distances`: the mean over the levels, and the finest level."""
    generator = torch.Generator().manual_seed(0)
    sets = [(torch.stack(ours[level]), torch.stack(theirs[level])) for level in sorted(ours, reverse=True)]
    levels = [sliced_distance(*patches, generator=generator, directions=_DIRECTIONS) for patches in sets]
    return {"swd": lambda chosen: fmean(level(chosen) for level in levels), "swd_fine": levels[0]}
