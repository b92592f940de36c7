"""The pictures of every row of `bench.quality`, what is measured of them, and the useful work in one."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import scalediff
from bench.flops.work import Work, plan, without_weights
from bench.harness.timing import percentiles
from bench.quality.metrics import count_discs, disc_columns, high_frequency_ratio, laplacian_swd, seam_score, sky_colors, spectrum_distance
from bench.quality.tables import CASCADES, LABELS, METHODS, RECORDED, SPREAD, SWITCHES, UNDRAWN
from scalediff.cascade.pipeline import native_size, preset, stage_sizes
from scalediff.cost.recorded import RecordedWork, recorded_work
from scalediff.demo.scenes import HELD_OUT_SEED, PHRASES, PLACES, TIMES, caption, describe, render
from scalediff.families.grid import patch_of
from scalediff.methods.demofusion import phase_sizes
from scalediff.patching.networks import denoiser_of

BATCH = 4  # pictures
FLOOR_SEED = HELD_OUT_SEED + 1_000_000  # scenes that share nothing with the prompts
Columns = dict[str, float]


class Task(NamedTuple):
    """What all rows share: the pipeline, the number and size of the pictures, and the seed of the first."""

    pipe: Any
    n: int
    size: int
    seed: int


@dataclass
class Drawn:
    """What a row has so far: pictures `[3, size, size]` in 256 levels, for every batch the seconds of one picture, its recorded work."""

    images: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gflops: tuple[float, float] = (0.0, 0.0)


def draw(task: Task, row: str, first: int, drawn: Drawn) -> None:
    """Add the batch of a row that begins with picture number `first`."""
    prompts = [caption(describe(HELD_OUT_SEED + i)) for i in range(first, min(first + BATCH, task.n))]
    since = time.perf_counter()
    if row in CASCADES or row in METHODS:
        chosen: dict[str, Any] = {"method": row} if row in METHODS else {"preset": replace(preset(task.pipe), **CASCADES[row])}
        generators = _generators(task.seed + first, len(prompts))
        with recorded_work(task.pipe) as recorded:
            images = scalediff.generate(task.pipe, prompts, height=task.size, width=task.size, generator=generators, **chosen).images
        if row in RECORDED and not drawn.images:
            since += _count(drawn, recorded, len(prompts))
        drawn.images += map(_to_tensor, images)
    else:
        drawn.images += _direct(task.pipe, prompts, seed=task.seed + first, size=task.size)
    drawn.seconds.append((time.perf_counter() - since) / len(prompts))
    print(f"{row}: {len(drawn.images)}/{task.n} pictures, {drawn.seconds[-1]:.2f} s each", file=sys.stderr, flush=True)


def _count(drawn: Drawn, recorded: RecordedWork, pictures: int) -> float:
    """Keep the work of one picture of a recorded batch; returns the seconds that counting took."""
    since = time.perf_counter()
    attention, total = recorded.count()
    drawn.gflops = 1e3 * attention / pictures, 1e3 * total / pictures
    return time.perf_counter() - since


def _direct(pipe: Any, prompts: Sequence[str], *, seed: int, size: int) -> list[Tensor]:
    settings = preset(pipe)
    options = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    images = pipe(list(prompts), height=size, width=size, generator=_generators(seed, len(prompts)), **options).images
    return [_to_tensor(picture) for picture in images]


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def in_turn(task: Task, rows: Sequence[str]) -> Iterator[tuple[str, Drawn]]:
    """Draw batch by batch, every row in each round; yields each row when its last batch is done."""
    found = {row: Drawn() for row in rows}
    for first in range(0, task.n, BATCH):
        for row, drawn in found.items():
            if row not in UNDRAWN:
                draw(task, row, first, drawn)
            if first + BATCH >= task.n:
                yield row, drawn


def measure(task: Task, row: str, drawn: Drawn, reference: Tensor) -> tuple[Columns, Tensor]:
    """The columns of one row of the ablation, the switches or the sweep, and its pictures `[N, 3, size, size]`."""
    columns: Columns = {}
    if row in UNDRAWN:
        images = quantised(render(FLOOR_SEED, task.n, task.size))
        if row == "autoencoded":
            images = torch.cat([_autoencoded(task.pipe, batch) for batch in images.split(BATCH)])
    else:
        images = torch.stack(drawn.images)
        columns = _spread(drawn.seconds) if row not in SWITCHES else {}
        columns["gflops"], columns["all_gflops"] = drawn.gflops if row in RECORDED else work(task.pipe, task.size, row)
    swd = laplacian_swd(images, reference, generator=torch.Generator().manual_seed(0))
    seam, *controls = seam_score(images, period=border(task.pipe)).values()
    columns |= _discs(images, task.pipe) | {"swd": statistics.mean(swd.values()), "swd_fine": swd[max(swd)]}
    columns |= {"spectrum": spectrum_distance(images, reference), "hf_ratio": high_frequency_ratio(images)}
    return columns | {"seam": seam, "seam_control": max(controls)}, images


def native_rows(pipe: Any, *, n: int, seed: int) -> dict[str, Columns]:
    """Discs in `n` pictures drawn at native size, and in 512 true renders, which shows how good the detector is."""
    native = native_size(pipe)[0]
    ((_, drawn),) = in_turn(Task(pipe, n, native, seed), ["native"])
    found = _discs(torch.stack(drawn.images), pipe) | _spread(drawn.seconds)
    return {"native": found, "native-true": _discs(render(FLOOR_SEED, 512, native), pipe)}


def word_rows(pipe: Any, *, n: int, seed: int) -> dict[str, Columns]:
    """How often native pictures show the hour and the place that their prompt names; `n` pictures of each of the 12 pairs.

    The hour is that of the true scenes whose mean sky colour is nearest; the place is the third of the picture that the
    disc's centre lies in.
    """
    native = native_size(pipe)[0]
    wanted = [(hour, place) for hour in TIMES for place in PLACES for _ in range(n)]
    prompts = [f"a {'moon' if t == 'night' else 'sun'} {PHRASES[p][0]} over hills {PHRASES[t][0]}" for t, p in wanted]
    batches = range(0, len(prompts), 4 * BATCH)
    drawn = torch.stack([x for i in batches for x in _direct(pipe, prompts[i : i + 4 * BATCH], seed=seed + i, size=native)])
    true, scenes = render(FLOOR_SEED, 256, native), [describe(FLOOR_SEED + i) for i in range(256)]
    sky = torch.stack([sky_colors(true[[scene.time == hour for scene in scenes]]).mean(0) for hour in TIMES])
    hours = [TIMES[int(i)] for i in torch.cdist(sky_colors(drawn), sky).argmin(1)]
    places = [PLACES[min(2, int(3 * x))] if x == x else "none" for x in disc_columns(drawn).tolist()]
    hour_share = statistics.mean(seen == hour for seen, (hour, _) in zip(hours, wanted, strict=True))
    place_share = statistics.mean(seen == place for seen, (_, place) in zip(places, wanted, strict=True))
    return {"words": {"n": len(wanted), "size": native, "hour": hour_share, "place": place_share}}


def work(pipe: Any, size: int, row: str) -> tuple[float, float]:
    """GFLOPs of one square picture, all stages and both passes of guidance: of self-attention, and of denoiser and autoencoder together."""
    settings, denoiser = replace(preset(pipe), **CASCADES.get(row, {})), without_weights(denoiser_of(pipe))
    config, tokens, native = denoiser.config, pipe.tokenizer.model_max_length, native_size(pipe)[0]

    def inputs(y: int, x: int) -> dict[str, Any]:
        text = torch.empty(1, tokens, config.cross_attention_dim)
        return {"sample": torch.empty(1, config.in_channels, y, x), "timestep": torch.tensor(1.0), "encoder_hidden_states": text}

    sizes = stage_sizes(pipe, size, size) if row in CASCADES else phase_sizes(pipe, size, size) if row == "demofusion" else [(size, size)]
    above: Any = {"multidiffusion": "views", "demofusion": "phases"}.get(row) or ("window" if settings.attention == "npa" else "full")
    how: dict[str, Any] = {"cascade": row in CASCADES, "native": native, "settings": settings, "guided": settings.guidance_scale > 1}
    counted = Work(denoiser, without_weights(pipe.vae), inputs, native=native, factor=pipe.vae_scale_factor)
    run, coded = counted.run(plan([side for side, _ in sizes], above, **how))
    return 1e3 * run.attention, 1e3 * (sum(run) + coded)


def border(pipe: Any) -> int:
    """Pixels between borders of the query patches."""
    native = native_size(pipe)[0] // pipe.vae_scale_factor
    return patch_of((native, native), 0)[0] * int(pipe.vae_scale_factor)


def quantised(images: Tensor) -> Tensor:
    """As in a picture file: what the pipeline draws is rounded too, and spectra of dark skies show that."""
    return (images * 255).round() / 255


def _spread(seconds: Sequence[float]) -> Columns:
    return dict(zip((SPREAD[0], "seconds", SPREAD[1]), percentiles(seconds), strict=True))


def _discs(images: Tensor, pipe: Any) -> Columns:
    discs = count_discs(images, native=native_size(pipe)[0]).double()
    return {"n": len(images), "size": images.shape[-1], "one_disc": (discs == 1).double().mean().item(), "discs": discs.mean().item()}


@torch.no_grad()
def _autoencoded(pipe: Any, images: Tensor) -> Tensor:
    restored: Tensor = pipe.vae.decode(pipe.vae.encode(images * 2 - 1).latent_dist.mode()).sample
    return quantised((restored / 2 + 0.5).clamp(0, 1))


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def write_sheet(path: Path, rows: Mapping[str, Tensor], *, columns: int = 6) -> None:
    """A contact sheet: one labelled row of pictures per method."""
    size, header = next(iter(rows.values())).shape[-1], 14
    count = min(columns, max(len(images) for images in rows.values()))
    sheet = Image.new("RGB", (count * (size + 2) - 2, len(rows) * (size + header)), "white")
    pen = ImageDraw.Draw(sheet)
    for top, (name, images) in zip(range(0, sheet.height, size + header), rows.items(), strict=True):
        pen.text((2, top + 1), LABELS.get(name, name), fill="black")
        for column, image in enumerate(images[:count]):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
            sheet.paste(Image.fromarray(pixels.numpy()), (column * (size + 2), top + header))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
