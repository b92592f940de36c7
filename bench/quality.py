"""What each part of the method does for the picture, on the embedded model: `python -m bench.quality`.

The captions are those of held-out scenes, so the true picture of every prompt exists at the target size and is the
reference of every column. All rows share prompts and seeds, hence their base pictures. A row goes to the CSV and to the
markdown table as soon as it is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import scalediff
from bench import harness
from bench.metrics import count_discs, disc_columns, high_frequency_ratio, laplacian_swd, seam_score, sky_colors, spectrum_distance
from bench.quality_rows import ABLATION, CASCADES, COLUMNS, LABELS, METHODS, SWEEP, SWITCHES, TABLES
from scalediff.demo.scenes import HELD_OUT_SEED, PHRASES, PLACES, TIMES, caption, describe, render
from scalediff.families import family_of
from scalediff.grid import level_grid, patch_of, window_of
from scalediff.hooks import denoiser_of
from scalediff.methods.demofusion import phase_sizes
from scalediff.methods.views import corners
from scalediff.pipelines import native_size, preset, stage_sizes
from scalediff_kernels.neighborhood.geometry import attention_flops

FLOOR_SEED = HELD_OUT_SEED + 1_000_000  # scenes that share nothing with the prompts
BATCH = 4

FACTS = ("command", "model", *harness.FACTS)
FIELDS = ("row", *(field for field, _, _ in COLUMNS), *FACTS)
LEGEND = f"""Every row has the same seeds and the same captions, those of the held-out scenes from seed {HELD_OUT_SEED} on, whose true
renders are the reference. Discs: a true picture has one. SWD: sliced Wasserstein distance per Laplacian level, x 1000; spectrum
distance: mean |log10| ratio of radial power; both are best low. HF ratio: share of the power above 0.25 cycles per pixel, best
where the true renders have it. Seam z: steepness at the borders of the query patches, beside the largest of six other periods; a
seam is 3 above them. Seconds: p50 over batches of {BATCH}, a batch's time shared out. Attention GFLOPs: useful FLOPs of
self-attention for one picture, all stages and both passes of guidance, 2 per multiply-add. A switch is changed alone.
MultiDiffusion and DemoFusion have views half a window apart. The last rows are true pictures of
other scenes: what the distances are where only the distribution agrees. The rows above share hour, terrain and place with the
reference and can come nearer on the coarse levels. Autoencoded: true pictures that went once through the model's autoencoder,
the best texture that anything it decodes can have."""


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


def draw(task: Task, row: str) -> tuple[Tensor, float]:
    """The row's pictures, `[N, 3, size, size]` in 256 levels, and its median seconds per picture."""
    images: list[Tensor] = []
    seconds: list[float] = []
    task.pipe.set_progress_bar_config(disable=True)
    for first in range(0, task.n, BATCH):
        prompts = task.prompts[first : first + BATCH]
        generators = [torch.Generator().manual_seed(task.seed + first + i) for i in range(len(prompts))]
        since = time.perf_counter()
        if row in CASCADES or row in METHODS:
            chosen: dict[str, Any] = {"method": row} if row in METHODS else {"preset": replace(preset(task.pipe), **CASCADES[row])}
            drawn = scalediff.generate(task.pipe, prompts, height=task.size, width=task.size, generator=generators, **chosen).images
        else:
            settings = preset(task.pipe)
            drawn = task.pipe(
                prompts,
                height=task.size,
                width=task.size,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=generators,
            ).images
        seconds.append((time.perf_counter() - since) / len(prompts))
        images += [_to_tensor(picture) for picture in drawn]
        print(f"{row}: {len(images)}/{task.n} pictures, {seconds[-1]:.2f} s each", file=sys.stderr, flush=True)
    return torch.stack(images), statistics.median(seconds)


def work(pipe: Any, size: int, row: str) -> int:
    """Useful FLOPs of self-attention for one square picture of a row."""
    denoiser = denoiser_of(pipe)
    family, native = family_of(denoiser), _native_grid(pipe)
    assert family is not None  # stage_sizes has refused others
    total = 0
    for latent, attention, passes in _passes(pipe, size, row):
        for site in family.sites(denoiser):
            if site.role == "self":
                grid = level_grid(latent, site.level)
                window = window_of(native, site.level) if attention == "npa" else grid
                module: Any = denoiser.get_submodule(site.name)
                head_dim = module.to_q.out_features // module.heads
                total += passes * attention_flops(grid=grid, window=window, heads=module.heads, head_dim=head_dim)
    return total


def _passes(pipe: Any, size: int, row: str) -> list[tuple[tuple[int, int], str, int]]:
    """The latent grids that a row's forward passes see, with what attention, and how many there are, both of guidance counted."""
    factor, native = pipe.vae_scale_factor, _native_grid(pipe)
    settings = replace(preset(pipe), **CASCADES.get(row, {}))
    both = 2 if settings.guidance_scale > 1 else 1
    steps = both * settings.steps
    if row == "multidiffusion":
        return [(native, "full", steps * views_of(pipe, (size, size)))]
    if row == "demofusion":
        phases = phase_sizes(pipe, size, size)
        windows = [1 if k == 1 else views_of(pipe, phase) + k**2 for k, phase in enumerate(phases, start=1)]
        return [(native, "full", steps * sum(windows))]
    if row not in CASCADES:
        return [((size // factor, size // factor), "full", steps)]
    assert isinstance(settings.guidance_until, float)
    guided = math.ceil(settings.guidance_until * settings.stage_steps)
    above = both * guided + settings.stage_steps - guided
    (y, x), *later = stage_sizes(pipe, size, size)
    return [((y // factor, x // factor), "full", steps), *(((y // factor, x // factor), settings.attention, above) for y, x in later)]


def views_of(pipe: Any, size: tuple[int, int]) -> int:
    """Overlapping native windows on a picture of a size in pixels, half a window apart."""
    y, x = _native_grid(pipe)
    return len(corners((size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor), window=(y, x), stride=(y // 2, x // 2)))


def _native_grid(pipe: Any) -> tuple[int, int]:
    height, width = native_size(pipe)
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def measure(task: Task, row: str, reference: Tensor) -> tuple[dict[str, float], Tensor]:
    """The columns of one row of the ablation or the sweep, and its pictures."""
    columns: dict[str, float] = {}
    if row in ("true", "autoencoded"):
        images = _quantised(render(FLOOR_SEED, task.n, task.size))
        if row == "autoencoded":
            images = torch.cat([_autoencoded(task.pipe, batch) for batch in images.split(BATCH)])
    else:
        images, seconds = draw(task, row)
        columns = {"seconds": seconds} if row not in SWITCHES else {}
        columns |= {"gflops": work(task.pipe, task.size, row) / 1e9}
    swd = laplacian_swd(images, reference, generator=torch.Generator().manual_seed(0))
    border = patch_of(_native_grid(task.pipe), 0)[0] * task.pipe.vae_scale_factor
    seam, *controls = seam_score(images, period=border).values()
    columns |= _discs(images, task.pipe) | {
        "swd": statistics.mean(swd.values()),
        "swd_fine": swd[max(swd)],
        "spectrum": spectrum_distance(images, reference),
        "hf_ratio": high_frequency_ratio(images),
        "seam": seam,
        "seam_control": max(controls),
    }
    return columns, images


def native_rows(pipe: Any, *, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Discs in `n` pictures drawn at native size, and in 512 true renders, where they say how good the detector is."""
    native = native_size(pipe)[0]
    images, seconds = draw(Task(pipe, n, native, seed), "native")
    return {"native": _discs(images, pipe) | {"seconds": seconds}, "native-true": _discs(render(FLOOR_SEED, 512, native), pipe)}


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


def markdown(records: Mapping[str, Mapping[str, str]]) -> str:
    """One table per group of rows that has been measured, and under it what each was measured with."""
    lines = ["# Picture quality on the embedded model", "", LEGEND]
    for title, names in TABLES.items():
        rows = [records[name] for name in names if name in records]
        shown = [column for column in COLUMNS if any(row.get(column[0]) for row in rows)]
        if rows:
            lines += ["", f"## {title}", "", " | ".join(["", "row", *(heading for _, heading, _ in shown), ""]).strip()]
            lines.append("|---|" + "--:|" * len(shown))
        for row in rows:
            cells = [form.format(float(row[field])) if row.get(field) else "-" for field, _, form in shown]
            lines.append(" | ".join(["", LABELS.get(row["row"], row["row"]), *cells, ""]).strip())
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            groups.setdefault(tuple(row[fact] for fact in FACTS), []).append(row["row"])
        for (command, model, *versions), members in groups.items():
            which = "" if len(groups) == 1 else f" ({', '.join(members)})"
            torch_version, diffusers_version, machine, threads, commit = versions
            lines += ["", f"`{command}`{which}: model {model}, torch {torch_version}, diffusers {diffusers_version},"]
            lines.append(f"{machine}, {threads} threads, commit {commit}.")
    return "\n".join(lines) + "\n"


def summary(records: Mapping[str, Mapping[str, str]]) -> str:
    """The README's table: the main columns of the ablation."""
    shown = [column for column in COLUMNS if column[0] in ("one_disc", "discs", "swd", "seconds", "gflops")]
    lines = ["| | " + " | ".join(heading for _, heading, _ in shown) + " |", "|---|" + "--:|" * len(shown)]
    for row in (name for name in ("direct", *METHODS, *ABLATION) if name in records):
        cells = [form.format(float(records[row][field])) for field, _, form in shown]
        lines.append("| " + " | ".join([LABELS[row], *cells]) + " |")
    return "\n".join(lines)


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


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = TABLES["The parts of the method"]
    known = (*default, *SWITCHES, *SWEEP)
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=16, help="pictures per row (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder of another pipeline (default: the embedded model)")
    parser.add_argument("--rows", default="", help=f"rows to measure, of {','.join(known)}")
    parser.add_argument("--sweep", action="store_true", help="measure restart x cutoff instead of the ablation")
    parser.add_argument("--switches", action="store_true", help="the rows of the switches instead")
    parser.add_argument("--native", type=int, default=0, metavar="N", help="only count the discs of N pictures of native size")
    parser.add_argument("--words", type=int, default=0, metavar="N", help="only check the words of N pictures per hour and place")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "docs" / "quality.md", help="markdown table")
    results = f"quality-{harness.slug(harness.machine())}.csv"
    parser.add_argument("--csv", type=Path, default=harness.ROOT / "bench" / "results" / results, help="results by row")
    parser.add_argument("--sheet", type=Path, help="contact sheet (PNG)")
    options = parser.parse_args(arguments)
    options.rows = options.rows.split(",") if options.rows else list(SWEEP if options.sweep else SWITCHES if options.switches else default)
    if unknown := [row for row in options.rows if row not in known]:
        parser.error(f"--rows takes {', '.join(known)}, got {', '.join(unknown)}")
    if options.n < 1 or options.native < 0:
        parser.error(f"--n must be at least 1 and --native at least 0, got {options.n} and {options.native}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.model:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(options.model, local_files_only=True)
    else:
        pipe = scalediff.load_demo()
    measured_with = {"model": options.model.name if options.model else "embedded", **harness.facts()}

    def keep(row: str, columns: Mapping[str, float]) -> None:
        cells = {field: f"{columns[field]:.6g}" if field in columns else "" for field, _, _ in COLUMNS}
        record = {"row": row, **cells, "command": _command(options, row), **measured_with}
        records = {**harness.read_rows(options.csv), row: record}
        harness.write_rows(options.csv, FIELDS, [records[name] for names in TABLES.values() for name in names if name in records])
        harness.write_text(options.out, markdown(records))
        print(", ".join([row, *(f"{heading} {form.format(columns[f])}" for f, heading, form in COLUMNS if f in columns)]), flush=True)

    if options.words:
        for row, columns in word_rows(pipe, n=options.words, seed=options.seed).items():
            keep(row, columns)
        return
    if options.native:
        for row, columns in native_rows(pipe, n=options.native, seed=options.seed).items():
            keep(row, columns)
        return
    task = Task(pipe, options.n, options.size, options.seed)
    reference = _quantised(render(HELD_OUT_SEED, task.n, task.size))
    pictures = {"true renders of the captions": reference}
    for row in options.rows:
        columns, pictures[row] = measure(task, row, reference)
        keep(row, columns)
        if options.sheet:
            write_sheet(options.sheet, pictures)


if __name__ == "__main__":
    main()
