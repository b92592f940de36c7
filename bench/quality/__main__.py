"""What each part of the method does for the picture, on the embedded model: `python -m bench.quality`.

The captions are those of held-out scenes, so the true picture of every prompt exists at the target size and is the
reference of every column. All rows share prompts and seeds, hence their base pictures. They take turns, batch by batch, so
that what else the machine does meets all of them alike: all are complete in the last round, and a run that is interrupted before that
adds no row. A row goes to the CSV and to the markdown table as soon as it is measured; rows that stand there and are not measured stay.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import scalediff
from bench.harness import rows as harness
from bench.quality.metrics import count_discs, disc_columns, high_frequency_ratio, laplacian_swd, seam_score, sky_colors, spectrum_distance
from bench.quality.rows import (
    BATCH,
    CASCADES,
    COLUMNS,
    FIELDS,
    LABELS,
    METHODS,
    SPREAD,
    SWEEP,
    SWITCHES,
    TABLES,
    UNDRAWN,
    markdown,
    native_grid,
    work,
)
from scalediff.cascade.pipeline import native_size, preset, stage_sizes
from scalediff.command.allocator import keep_freed_memory
from scalediff.demo.scenes import HELD_OUT_SEED, PHRASES, PLACES, TIMES, caption, describe, render
from scalediff.families.grid import patch_of
from scalediff.patching.networks import denoiser_of

FLOOR_SEED = HELD_OUT_SEED + 1_000_000  # scenes that share nothing with the prompts
RESULTS = harness.ROOT / "bench" / "results"
PAGE = harness.ROOT / "docs" / "evidence" / "quality.md"


@dataclass(frozen=True)
class Task:
    """What all rows share."""

    pipe: Any
    n: int
    size: int
    seed: int

    @property
    def prompts(self) -> list[str]:
        return [caption(describe(HELD_OUT_SEED + i)) for i in range(self.n)]


@dataclass
class Drawn:
    """What a row has so far: pictures `[3, size, size]` in 256 levels, and by batch the seconds of a picture."""

    images: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def draw(task: Task, row: str, first: int, drawn: Drawn) -> None:
    """Add the batch of a row that begins with picture number `first`."""
    prompts = task.prompts[first : first + BATCH]
    generators = [torch.Generator().manual_seed(task.seed + first + i) for i in range(len(prompts))]
    task.pipe.set_progress_bar_config(disable=True)
    since = time.perf_counter()
    if row in CASCADES or row in METHODS:
        chosen: dict[str, Any] = {"method": row} if row in METHODS else {"preset": replace(preset(task.pipe), **CASCADES[row])}
        images = scalediff.generate(task.pipe, prompts, height=task.size, width=task.size, generator=generators, **chosen).images
    else:
        settings = preset(task.pipe)
        images = task.pipe(
            prompts,
            height=task.size,
            width=task.size,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
        ).images
    drawn.seconds.append((time.perf_counter() - since) / len(prompts))
    drawn.images += [_to_tensor(picture) for picture in images]
    print(f"{row}: {len(drawn.images)}/{task.n} pictures, {drawn.seconds[-1]:.2f} s each", file=sys.stderr, flush=True)


def in_turn(task: Task, rows: Sequence[str]) -> Iterator[tuple[str, Drawn]]:
    """Every row once its last batch is drawn, all in the last round; rows that no model draws come in their turn there, with nothing."""
    found = {row: Drawn() for row in rows}
    for first in range(0, task.n, BATCH):
        for row, drawn in found.items():
            if row not in UNDRAWN:
                draw(task, row, first, drawn)
            if first + BATCH >= task.n:
                yield row, drawn


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """The columns of a row's time."""
    p20, p50, p80 = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()
    return dict(zip(("seconds", *SPREAD), (p50, p20, p80), strict=True))


def measure(task: Task, row: str, drawn: Drawn, reference: Tensor) -> tuple[dict[str, float], Tensor]:
    """The columns of one row of the ablation, the switches or the sweep, and its pictures `[N, 3, size, size]`."""
    columns: dict[str, float] = {}
    if row in UNDRAWN:
        images = _quantised(render(FLOOR_SEED, task.n, task.size))
        if row == "autoencoded":
            images = torch.cat([_autoencoded(task.pipe, batch) for batch in images.split(BATCH)])
    else:
        images = torch.stack(drawn.images)
        columns = _spread(drawn.seconds) if row not in SWITCHES else {}
        attention, whole = work(task.pipe, task.size, row)
        columns |= {"gflops": attention, "all_gflops": whole}
    swd = laplacian_swd(images, reference, generator=torch.Generator().manual_seed(0))
    seam, *controls = seam_score(images, period=_border(task.pipe)).values()
    columns |= _discs(images, task.pipe) | {
        "swd": statistics.mean(swd.values()),
        "swd_fine": swd[max(swd)],
        "spectrum": spectrum_distance(images, reference),
        "hf_ratio": high_frequency_ratio(images),
        "seam": seam,
        "seam_control": max(controls),
    }
    return columns, images


def _border(pipe: Any) -> int:
    """Pixels from border to border of the query patches."""
    return patch_of(native_grid(pipe), 0)[0] * int(pipe.vae_scale_factor)


def native_rows(pipe: Any, *, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Discs in `n` pictures drawn at native size, and in 512 true renders, where they say how good the detector is."""
    native = native_size(pipe)[0]
    ((_, drawn),) = in_turn(Task(pipe, n, native, seed), ["native"])
    found = _discs(torch.stack(drawn.images), pipe) | _spread(drawn.seconds)
    return {"native": found, "native-true": _discs(render(FLOOR_SEED, 512, native), pipe)}


def word_rows(pipe: Any, *, n: int, seed: int) -> dict[str, dict[str, float]]:
    """How often native pictures show the hour and the place that their prompt names; `n` pictures of each of the 12 pairs.

    The hour is that of the true scenes whose mean sky colour is nearest; the place is the third of the picture that the
    disc's centre lies in.
    """
    wanted = [(time, place) for time in TIMES for place in PLACES for _ in range(n)]
    prompts = [f"a {'moon' if t == 'night' else 'sun'} {PHRASES[p][0]} over hills {PHRASES[t][0]}" for t, p in wanted]
    settings, images = preset(pipe), []
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), 4 * BATCH):
        batch = prompts[first : first + 4 * BATCH]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
        options = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
        images += [_to_tensor(picture) for picture in pipe(batch, generator=generators, **options).images]
    drawn = torch.stack(images)
    true, scenes = render(FLOOR_SEED, 256, native_size(pipe)[0]), [describe(FLOOR_SEED + i) for i in range(256)]
    sky = torch.stack([sky_colors(true[[scene.time == time for scene in scenes]]).mean(0) for time in TIMES])
    hours = [TIMES[int(i)] for i in torch.cdist(sky_colors(drawn), sky).argmin(1)]
    places = [PLACES[min(2, int(3 * x))] if x == x else "none" for x in disc_columns(drawn).tolist()]
    hour_share = statistics.mean(hour == time for hour, (time, _) in zip(hours, wanted, strict=True))
    place_share = statistics.mean(seen == place for seen, (_, place) in zip(places, wanted, strict=True))
    return {"words": {"n": len(wanted), "size": native_size(pipe)[0], "hour": hour_share, "place": place_share}}


def _discs(images: Tensor, pipe: Any) -> dict[str, float]:
    discs = count_discs(images, native=native_size(pipe)[0])
    shape = {"n": len(images), "size": images.shape[-1]}
    return {**shape, "one_disc": (discs == 1).double().mean().item(), "discs": discs.double().mean().item()}


@torch.no_grad()
def _autoencoded(pipe: Any, images: Tensor) -> Tensor:
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    restored: Tensor = pipe.vae.decode(latents).sample
    return _quantised((restored / 2 + 0.5).clamp(0, 1))


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def _quantised(images: Tensor) -> Tensor:
    """As a picture file has it: what the pipeline draws is rounded too, and spectra of dark skies see that."""
    return (images * 255).round() / 255


def _command(options: argparse.Namespace, row: str) -> str:
    """The command that measures this row again."""
    if row == "words":
        return f"python -m bench.quality --words {options.words} --seed {options.seed}" + (
            f" --model {options.model}" if options.model else ""
        )
    what = f"--native {options.native}" if options.native else f"--n {options.n} --size {options.size}" + " --sweep" * (row in SWEEP)
    what += " --switches" * (row in SWITCHES)
    return f"python -m bench.quality {what} --seed {options.seed}" + (f" --model {options.model}" if options.model else "")


def committed() -> list[dict[str, dict[str, str]]]:
    """The rows of every machine that has been measured."""
    return [harness.read_rows(path) for path in sorted(RESULTS.glob("quality-*.csv"))]


def write_sheet(path: Path, rows: Mapping[str, Tensor], *, columns: int = 6) -> None:
    """A contact sheet: one labelled row of pictures per method."""
    size, header = next(iter(rows.values())).shape[-1], 14
    count = min(columns, max(len(images) for images in rows.values()))
    sheet = Image.new("RGB", (count * (size + 2) - 2, len(rows) * (size + header)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (size + header)
        pen.text((2, top + 1), LABELS.get(name, name), fill="black")
        for column, image in enumerate(images[:count]):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
            sheet.paste(Image.fromarray(pixels.numpy()), (column * (size + 2), top + header))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _parser() -> argparse.ArgumentParser:
    known = (*TABLES["The parts of the method"], *SWITCHES, *SWEEP)
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=16, help="pictures per row (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder of another pipeline (default: the embedded model)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rows", default="", help=f"rows to measure, of {','.join(known)}")
    what.add_argument("--sweep", action="store_true", help="measure restart x cutoff instead of the ablation")
    what.add_argument("--switches", action="store_true", help="the rows of the switches instead")
    what.add_argument("--native", type=int, metavar="N", help="only count the discs of N pictures of native size")
    what.add_argument("--words", type=int, metavar="N", help="only check the words of N pictures per hour and place")
    what.add_argument("--doc", action="store_true", help="measure nothing, write the page from the rows that are there")
    parser.add_argument("--out", type=Path, help="page (default: docs/evidence/quality.md; beside a --csv that is elsewhere)")
    results = f"quality-{harness.slug(harness.machine())}.csv"
    parser.add_argument("--csv", type=Path, default=RESULTS / results, help="results by row (default: bench/results/quality-MACHINE.csv)")
    parser.add_argument("--sheet", type=Path, help="contact sheet, a .png or .jpg")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for, refused in words where it cannot be."""
    options = parser.parse_args(arguments)
    default = TABLES["The parts of the method"]
    named = options.rows.split(",") if options.rows else SWEEP if options.sweep else SWITCHES if options.switches else default
    options.rows = list(dict.fromkeys(named))
    known = (*default, *SWITCHES, *SWEEP)
    if unknown := [row for row in options.rows if row not in known]:
        parser.error(f"--rows takes {', '.join(known)}, got {', '.join(unknown)}")
    for name in ("n", "native", "words"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, got {options.seed}")
    if options.model and not (options.model / "model_index.json").is_file():
        parser.error(f"--model must be the folder of a pipeline, with its model_index.json, got {options.model}")
    if options.sheet and options.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--sheet must be a .png or .jpg, got {options.sheet}")
    options.csv = options.csv.resolve()
    options.out = options.out or (PAGE if options.csv.parent == RESULTS else options.csv.with_suffix(".md"))
    try:
        records = harness.read_rows(options.csv)
    except ValueError as error:
        parser.error(f"--csv: {error}")
    if foreign := {name for row in records.values() for name in row} - set(FIELDS):
        parser.error(f"--csv must have no columns but those of this benchmark, got {', '.join(sorted(foreign))} in {options.csv}")
    return options


def _loaded(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Any:
    """The pipeline, refused in words where it cannot draw what was asked for."""
    if options.model:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(str(options.model), local_files_only=True)
    else:
        pipe = scalediff.load_demo()
    denoiser: Any = denoiser_of(pipe)
    if not hasattr(denoiser, "config") or denoiser.config.get("addition_embed_type", "none") is not None:
        parser.error(f"--model must have a U-Net that is told a prompt alone, got {type(pipe).__name__}")
    if not options.native and not options.words:
        try:
            stage_sizes(pipe, options.size, options.size)
            seam_score(torch.zeros(1, 3, options.size, options.size), period=_border(pipe))
        except ValueError as error:
            parser.error(f"--size {options.size}: {error}")
    return pipe


def _write_page(options: argparse.Namespace) -> None:
    """Of all machines where results are committed, so that a run on another loses none of theirs."""
    results = committed() if options.csv.parent == RESULTS else [harness.read_rows(options.csv)]
    harness.write_text(options.out, markdown(*results))


def _in_order(records: Mapping[str, Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Rows as the tables have them, then any that no table knows."""
    known = [name for names in TABLES.values() for name in names]
    return [records[name] for name in (*known, *(name for name in records if name not in known)) if name in records]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = _options(parser, arguments)
    if options.doc:
        _write_page(options)
        return
    keep_freed_memory()
    pipe = _loaded(parser, options)
    measured_with = {"model": options.model.name if options.model else "embedded", **harness.facts()}

    def keep(row: str, columns: Mapping[str, float]) -> None:
        cells = {name: f"{value:.6g}" for name, value in columns.items()}
        records = {**harness.read_rows(options.csv), row: {"row": row, **cells, "command": _command(options, row), **measured_with}}
        harness.write_rows(options.csv, FIELDS, _in_order(records))
        _write_page(options)
        print(", ".join([row, *(f"{heading} {form.format(columns[f])}" for f, heading, form in COLUMNS if f in columns)]), flush=True)

    if options.words or options.native:
        counted, n = (word_rows, options.words) if options.words else (native_rows, options.native)
        for row, columns in counted(pipe, n=n, seed=options.seed).items():
            keep(row, columns)
        return
    task = Task(pipe, options.n, options.size, options.seed)
    reference = _quantised(render(HELD_OUT_SEED, task.n, task.size))
    pictures = {"true renders of the captions": reference}
    for row, drawn in in_turn(task, options.rows):
        columns, pictures[row] = measure(task, row, drawn, reference)
        keep(row, columns)
        if options.sheet:
            write_sheet(options.sheet, pictures)


if __name__ == "__main__":
    main()
