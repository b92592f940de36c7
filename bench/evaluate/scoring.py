"""The statistics of folders of pictures, with bootstrap intervals, and their paired differences from the first folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from bench.evaluate import distances
from bench.evaluate.distances import Interval
from bench.evaluate.folders import Folder, check_comparable, common_size, size_of
from bench.evaluate.measuring import SMALLEST, Measured, Task, measure
from bench.evaluate.networks import Clip, Inception
from bench.evaluate.protocols import Protocol
from bench.quality.metrics import Statistic, mean_of, replicated, resamples, sliced_distance, spectrum_distance

INCEPTION_STATISTICS = ("fid", "kid", "is", "fid_patch", "kid_patch", "is_patch")
NETWORK_STATISTICS = (*INCEPTION_STATISTICS, "clip")
REFERENCE = "(reference)"
CPU = torch.device("cpu")
_DIRECTIONS = 128
Features = list[tuple[Tensor, Tensor]]  # and logits


@dataclass(frozen=True)
class Options:
    """What to score."""

    wanted: Sequence[str] = ()  # of NETWORK_STATISTICS
    protocol: Protocol | None = None  # says which crops; the statistics of crops need it
    border: int | None = None  # pixels between borders of query patches; None for that in the run of each folder, if it has one
    draws: int = 100  # of the bootstrap
    splits: int = 10  # of the Inception score
    kid_subset: int | None = None  # rows of a subset; None for no subsets
    force: bool = False  # compute FID of fewer pictures than features
    device: torch.device = CPU  # of the computations with features, in fp64


@dataclass(frozen=True)
class Score:
    """One number of one folder, and its paired difference from that of the first folder."""

    value: Interval
    difference: Interval | None
    note: str = ""


def score(
    folders: Sequence[Folder],
    reference: Folder | None,
    options: Options,
    *,
    inception: Inception | None = None,
    clip: Clip | None = None,
) -> dict[str, dict[str, Score]]:
    """Scores by folder and statistic; those of the reference itself, where its pictures are as large, under `REFERENCE`.

    Raises:
        ValueError: The folders cannot be compared, a picture is unreadable or too small, a statistic lacks its reference or prompts, or FID
            would be of fewer pictures than features.
    """
    check_comparable(folders)
    size = size_of(folders[0].files[0])
    compared = None if reference is None else common_size(size, reference)
    if compared is not None and min(compared) < SMALLEST:
        raise ValueError(f"pictures and reference must have sides of at least {SMALLEST}, got {compared[0]} x {compared[1]} in common")
    _check_wanted(folders, reference, options, inception)
    border = _border(folders, size, options)
    crops = any(name.endswith("_patch") for name in options.wanted)
    task = Task(compared, border, options.protocol, crops, inception, clip)
    of_reference = None if reference is None else measure(reference, task, reference=True)
    draws = resamples(len(folders[0]), options.draws)
    found: dict[str, dict[str, Score]] = {}
    base: dict[str, tuple[float, Tensor]] = {}
    for folder in folders:
        measured = measure(folder, task)
        scores: dict[str, Score] = {}
        for name, statistic in _statistics(measured, of_reference, options).items():
            value, replicates = statistic(torch.arange(len(folder))), replicated(statistic, draws)
            first_value, first_replicates = base.setdefault(name, (value, replicates))
            gap = None if folder is folders[0] else distances.interval(value - first_value, replicates - first_replicates)
            scores[name] = Score(distances.interval(value, replicates), gap)
        found[folder.name] = scores | _of_subsets(measured, of_reference, options)
    if of_reference is not None and compared == size:  # what the HF ratio should be
        found[REFERENCE] = {"hf_ratio": Score(Interval(fmean(of_reference.numbers["hf_ratio"]), math.nan, math.nan), None)}
    return found


def _border(folders: Sequence[Folder], size: tuple[int, int], options: Options) -> int | None:
    """The border of the options, or of the runs where all have the same and the pictures are large enough for its seams."""
    of_runs = {folder.run.get("patch_border") for folder in folders}
    border = options.border or (of_runs.pop() if len(of_runs) == 1 else None)
    if border is None or (border >= 16 and min(size) >= 2 * round(1.25 * border)):
        return border
    if options.border is not None:
        raise ValueError(f"seams need a border of at least 16 and sides of 2.5 borders, got {border=} and {size[0]} x {size[1]}")
    return None


def _check_wanted(folders: Sequence[Folder], reference: Folder | None, options: Options, inception: Inception | None) -> None:
    protocol, n, m = options.protocol, len(folders[0]), 0 if reference is None else len(reference)
    if protocol is None and (cropped := [name for name in options.wanted if name.endswith("_patch")]):
        raise ValueError(f"{', '.join(cropped)} need a protocol, which says the crops: pass --protocol, got none")
    if reference is None and (lacking := [name for name in options.wanted if name.startswith(("fid", "kid"))]):
        raise ValueError(f"{', '.join(lacking)} need a reference: pass --reference FOLDER, got none")
    if "clip" in options.wanted and not folders[0].prompts:
        raise ValueError(f"the CLIP score needs the prompts of a manifest, got {folders[0].path} without one")
    crops = of_reference = 1
    if protocol is not None and any(name.endswith("_patch") for name in options.wanted):
        crops = protocol.crops_of(n)
        of_reference = protocol.crops_of(m) if m and protocol.crops_reference else 1
    for suffix, what, rows in (("", "whole pictures", (n, m)), ("_patch", "crops", (n * crops, m * of_reference))):
        if f"is{suffix}" in options.wanted and rows[0] < options.splits:
            raise ValueError(f"IS needs at least one picture or crop for each of {options.splits} splits, got {rows[0]}: pass --splits")
        size, most = options.kid_subset, min(rows)
        if f"kid{suffix}" in options.wanted and size is not None and not 2 <= size <= most:
            raise ValueError(f"a KID subset must have 2 to {most} {what}, those of the smaller side, got --kid-subset {size}")
        if f"fid{suffix}" in options.wanted and inception is not None and min(rows) < inception.features and not options.force:
            raise ValueError(
                f"FID of {inception.features} features needs as many {what} on each side, got {rows[0]} and {rows[1]}: its covariance "
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
    for suffix, ours, theirs in _feature_sets(measured, reference):
        features, logits = (torch.stack(parts).to(options.device) for parts in zip(*ours, strict=True))
        if f"is{suffix}" in options.wanted:
            found[f"is{suffix}"] = partial(_inception_score, logits, options.splits)
        if theirs is None:
            continue
        others = torch.stack([one for one, _ in theirs]).to(options.device)
        if f"fid{suffix}" in options.wanted:
            found[f"fid{suffix}"] = partial(_frechet, features, distances.moments(others))
        if f"kid{suffix}" in options.wanted:
            found[f"kid{suffix}"] = partial(_kernel, distances.kernel_sums(features, others))
    return found


def _feature_sets(measured: Measured, reference: Measured | None) -> list[tuple[str, Features, Features | None]]:
    """Suffix, features of the pictures, and what they are compared with: for crops the reference's crops, or its whole pictures."""
    sets: list[tuple[str, Features, Features | None]] = []
    if measured.whole:
        sets.append(("", measured.whole, reference.whole if reference else None))
    if measured.crops:
        sets.append(("_patch", measured.crops, (reference.crops or reference.whole) if reference else None))
    return sets


def _of_subsets(measured: Measured, reference: Measured | None, options: Options) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for suffix, *sides in _feature_sets(measured, reference):
        if options.kid_subset is not None and f"kid{suffix}" in options.wanted:
            a, b = (torch.stack([features for features, _ in side or []]).to(options.device) for side in sides)
            how = {"size": options.kid_subset, "subsets": 100}
            mean, std = distances.kernel_distance_of_subsets(a, b, **how, generator=torch.Generator().manual_seed(0))
            note = f"100 subsets of {options.kid_subset}, standard deviation {std:.6g}"
            found[f"kid{suffix}_subsets"] = Score(Interval(mean, math.nan, math.nan), None, note)
    return found


def _sliced(ours: Mapping[int, list[Tensor]], theirs: Mapping[int, list[Tensor]]) -> dict[str, Statistic]:
    """As `bench.quality.metrics.sliced_distances`: the mean over the levels, and the finest level."""
    generator = torch.Generator().manual_seed(0)
    sets = [(torch.stack(ours[level]), torch.stack(theirs[level])) for level in sorted(ours, reverse=True)]
    levels = [sliced_distance(*patches, generator=generator, directions=_DIRECTIONS) for patches in sets]
    return {"swd": lambda chosen: sum(level(chosen) for level in levels) / len(levels), "swd_fine": levels[0]}


def _inception_score(logits: Tensor, splits: int, chosen: Tensor) -> float:
    return distances.inception_score(logits[chosen], splits=splits)


def _frechet(features: Tensor, target: distances.Moments, chosen: Tensor) -> float:
    return distances.frechet_distance(distances.moments(features[chosen]), target)


def _kernel(sums: distances.KernelSums, chosen: Tensor) -> float:
    return distances.kernel_distance(sums, chosen.bincount(minlength=len(sums.cross)))
