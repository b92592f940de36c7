"""What is measured of the pictures of a row, with standard errors, and their differences from the baseline of a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.quality import metrics
from bench.quality.metrics import Statistic, mean_of
from bench.quality.pictures import OTHER_SCENES, Pictures, border, native_pictures
from bench.quality.tables import LEVELS, PAIRED
from scalediff.cascade.pipeline import native_size
from scalediff.demo.scenes import HELD_OUT_SEED, PHRASES, PLACES, TIMES, caption, describe, render

DRAWS = 50  # of the bootstrap
_DIRECTIONS = 128  # of the sliced distances
Columns = dict[str, float]


class Measured(NamedTuple):
    """Columns of one row, and the values of its statistics in every draw of the bootstrap."""

    columns: Columns
    replicates: Mapping[str, Tensor]


def measure(pipe: Any, pictures: Pictures, truth: Tensor, first_scene: int) -> Measured:
    """The columns of one row, of consecutive scenes from `first_scene` on, beside the true renders `[N, 3, Y, X]` of its captions.

    A standard error is the standard deviation of a statistic over sets of pictures drawn with replacement, the same sets for all rows.
    """
    found = _statistics(pipe, pictures, truth, first_scene)
    n, draws = len(truth), metrics.resamples(len(truth), DRAWS)
    columns: Columns = {"n": n, "size": truth.shape[-1], **{name: statistic(torch.arange(n)) for name, statistic in found.items()}}
    replicates = {name: metrics.replicated(statistic, draws) for name, statistic in found.items()}
    columns |= {f"{name}_se": float(values.std()) for name, values in replicates.items()}
    if pictures.seconds:
        columns["seconds"] = statistics.median(pictures.seconds)
    if pictures.gflops is not None:
        columns["gflops"], columns["all_gflops"] = pictures.gflops
    return Measured(columns, replicates)


def differences(row: Measured, baseline: Measured) -> Columns:
    """The differences of a row's statistics from those of the baseline, with the standard errors of paired pictures."""
    both = [name for name in (*PAIRED, *LEVELS) if name in row.columns and name in baseline.columns]
    gaps = {f"{name}_gap": row.columns[name] - baseline.columns[name] for name in both}
    return gaps | {f"{name}_gap_se": float((row.replicates[name] - baseline.replicates[name]).std()) for name in both}


def _statistics(pipe: Any, pictures: Pictures, truth: Tensor, first_scene: int) -> dict[str, Statistic]:
    images, native = pictures.images, native_size(pipe)[0]
    discs = metrics.count_discs(images, native=native)
    edges = torch.tensor([metrics.FAINT_EDGES[describe(first_scene + i).time] for i in range(len(images))])
    seams = [list(metrics.seam_score(image[None], period=border(pipe)).values()) for image in images]
    by_level = metrics.sliced_distances(images, truth, generator=torch.Generator().manual_seed(0), directions=_DIRECTIONS)
    nyquist = 0.5 * native / images.shape[-1]
    above, true_above = (metrics.power_above(x, frequency=nyquist) for x in (images, truth))
    found: dict[str, Statistic] = {
        "one_disc": mean_of(discs == 1),
        "discs": mean_of(discs),
        "faint": mean_of(metrics.count_discs(images, native=native, edges=edges)),
        "swd": lambda chosen: statistics.mean(level(chosen) for level in by_level.values()),
        **{f"swd_{side}": level for side, level in by_level.items()},
        "above": lambda chosen: 10 * math.log10(above[chosen].sum() / true_above[chosen].sum()),
        "spectrum": metrics.spectrum_distance(metrics.radial_power(images), metrics.radial_power(truth)),
        "hf_ratio": mean_of(torch.tensor([metrics.high_frequency_ratio(image[None]) for image in images])),
        "seam": mean_of(torch.tensor([seam for seam, *_ in seams])),
        "seam_control": lambda chosen: float(torch.tensor(seams)[chosen, 1:].mean(0).max()),
    }
    if pictures.bases is not None:
        found["to_base"] = mean_of(metrics.base_distance(images, pictures.bases))
    return found


def native_rows(pipe: Any, *, n: int) -> dict[str, Columns]:
    """Discs in `n` pictures drawn at native size, and in 512 true renders, which shows how good the detector is."""
    prompts = [caption(describe(HELD_OUT_SEED + i)) for i in range(n)]
    side = native_size(pipe)[0]
    rows = {"native": native_pictures(pipe, prompts), "native-true": render(OTHER_SCENES, 512, side)}
    discs = {row: metrics.count_discs(images, native=side).double() for row, images in rows.items()}
    ones = {row: (count == 1).double() for row, count in discs.items()}
    return {row: {"n": len(d), "size": side, "one_disc": float(ones[row].mean()), "discs": float(d.mean())} for row, d in discs.items()}


def word_rows(pipe: Any, *, n: int) -> dict[str, Columns]:
    """How often native pictures show the hour and the place that their prompt names; `n` pictures of each of the 12 pairs.

    The hour is that of the true scenes whose mean sky colour is nearest; the place is the third of the picture that the
    disc's centre lies in.
    """
    side = native_size(pipe)[0]
    wanted = [(hour, place) for hour in TIMES for place in PLACES for _ in range(n)]
    prompts = [f"a {'moon' if t == 'night' else 'sun'} {PHRASES[p][0]} over hills {PHRASES[t][0]}" for t, p in wanted]
    drawn = native_pictures(pipe, prompts)
    true, scenes = render(OTHER_SCENES, 256, side), [describe(OTHER_SCENES + i) for i in range(256)]
    sky = torch.stack([metrics.sky_colors(true[[scene.time == hour for scene in scenes]]).mean(0) for hour in TIMES])
    hours = [TIMES[int(i)] for i in torch.cdist(metrics.sky_colors(drawn), sky).argmin(1)]
    places = [PLACES[min(2, int(3 * x))] if x == x else "none" for x in metrics.disc_columns(drawn).tolist()]
    hour_shown = statistics.mean(seen == hour for seen, (hour, _) in zip(hours, wanted, strict=True))
    place_shown = statistics.mean(seen == place for seen, (_, place) in zip(places, wanted, strict=True))
    return {"words": {"n": len(wanted), "size": side, "hour": hour_shown, "place": place_shown}}
