"""What `bench.quality` measures, and its page: the rows by table, the columns, the useful work of a row, the tables as markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.harness import rows as harness
from scalediff.cascade.pipeline import native_size, preset, stage_sizes
from scalediff.cost.flops import FACTOR, autoencoder_work, forward_work
from scalediff.demo.scenes import HELD_OUT_SEED
from scalediff.families.grid import Grid
from scalediff.methods.demofusion import phase_sizes
from scalediff.methods.views import corners
from scalediff.patching.networks import denoiser_of
from scalediff.patching.subclass import original_class

# Keyword arguments of scalediff.generate for every row that the cascade draws.
ABLATION: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "npa": {"attention": "npa"},
    "npa-no-lfm": {"attention": "npa", "lfm": False},
    "npa-no-sg": {"attention": "npa", "sg": False},
    "npa-alone": {"attention": "npa", "lfm": False, "sg": False},
}
SWEEP: dict[str, dict[str, Any]] = {
    f"restart-{restart}-cutoff-{cutoff}": {"attention": "npa", "restart": restart, "lfm_cutoff": cutoff, "sg_cutoff": cutoff}
    for restart in (0.2, 0.3, 0.4, 0.5)
    for cutoff in (0.125, 0.25, 0.5)
}
# Every switch by itself, beside the row with none. Settings of the embedded model's preset that a row changes.
SWITCHES: dict[str, dict[str, Any]] = {
    "no-switch": {},
    "lfm-cutoff-0.25": {"lfm_cutoff": 0.25},
    "sg-cutoff-0.25": {"sg_cutoff": 0.25},
    "sg-annealed": {"sg_cutoff_start": 0.5},
    "gaussian": {"filter": "gaussian"},
    "butterworth": {"filter": "butterworth"},
    "trajectory": {"anchor": "trajectory"},
    "alternate": {"jitter": "alternate"},
    "guided-two-thirds": {"guidance_until": 2 / 3},
}
CASCADES = ABLATION | SWEEP | SWITCHES
METHODS = ("multidiffusion", "demofusion")
UNDRAWN = ("autoencoded", "true")  # rows that no model draws
LABELS = {
    "direct": "direct inference",
    "full": "full attention + LFM + SG",
    "npa": "NPA + LFM + SG",
    "npa-no-lfm": "NPA without LFM",
    "npa-no-sg": "NPA without SG",
    "npa-alone": "NPA without both",
    "multidiffusion": "MultiDiffusion",
    "demofusion": "DemoFusion",
    "no-switch": "as the preset has it",
    "lfm-cutoff-0.25": "LFM cutoff 0.25 in place of 0.125",
    "sg-cutoff-0.25": "SG cutoff 0.25 in place of 0.125",
    "sg-annealed": "SG cutoff from 0.5 to 0.125",
    "gaussian": "Gaussian filter",
    "butterworth": "Butterworth filter",
    "trajectory": "SG to the base stage's trajectory",
    "alternate": "alternating patch grid",
    "guided-two-thirds": "guidance in the first two thirds",
    "autoencoded": "true renders, autoencoded",
    "true": "true renders",
    "native": "native size",
    "native-true": "true renders, native size",
    "words": "prompts of an hour and a place",
}
TABLES = {
    "The parts of the method": ("direct", *METHODS, *ABLATION, *UNDRAWN),
    "The switches": tuple(SWITCHES),
    "Restart and cutoff": tuple(SWEEP),
    "At native size": ("native", "native-true"),
    "Words": ("words",),
}

# Field, heading, format.
COLUMNS = (
    ("n", "pictures", "{:.0f}"),
    ("size", "pixels", "{:.0f}"),
    ("one_disc", "exactly one disc", "{:.1%}"),
    ("hour", "hour as prompted", "{:.1%}"),
    ("place", "place as prompted", "{:.1%}"),
    ("discs", "discs", "{:.2f}"),
    ("swd", "SWD, all levels", "{:.1f}"),
    ("swd_fine", "SWD, finest", "{:.1f}"),
    ("spectrum", "spectrum distance", "{:.3f}"),
    ("hf_ratio", "HF ratio", "{:.4f}"),
    ("seam", "seam z", "{:+.2f}"),
    ("seam_control", "control z", "{:+.2f}"),
    ("seconds", "s per picture", "{:.2f}"),
    ("gflops", "attention GFLOPs", "{:.2f}"),
    ("all_gflops", "all GFLOPs", "{:.1f}"),
)
SPREAD = ("seconds_p20", "seconds_p80")  # beside the median, in its cell

BATCH = 4  # pictures
FACTS = ("command", "model", *harness.FACTS)
FIELDS = ("row", *(name for name, _, _ in COLUMNS), *SPREAD, *FACTS)
LEGEND = f"""Every row has the same seeds and the same captions, those of the held-out scenes from seed {HELD_OUT_SEED} on, whose true
renders are the reference. Discs: a true picture has one. SWD: sliced Wasserstein distance per Laplacian level, x 1000; spectrum
distance: mean |log10| ratio of radial power; both are best low. HF ratio: share of the power above 0.25 cycles per pixel, best
where the true renders have it. Seam z: steepness at the borders of the query patches, beside the largest of six other periods; a
seam is 3 above them. Attention GFLOPs: useful FLOPs of self-attention for one picture, all stages and both passes of guidance,
2 per multiply-add. All GFLOPs: all matrix products and convolutions of the denoiser and the autoencoder; "-" where nothing is drawn or
the row is older than the column. A switch is changed alone. MultiDiffusion and DemoFusion have views half a window apart.

Seconds: p50 (p20 - p80) over batches of {BATCH}, a batch's time shared out. Rows with a spread were drawn in turn, batch by batch, by a
process that keeps freed memory as the command `scalediff` does ([adr/0009](../adr/0009-the-command-keeps-freed-memory.md)); rows without
one, one row after the other by a process that gave it back.

The last rows of the first table are true pictures of other scenes: what the distances are where only the distribution agrees. The rows
above share hour, terrain and place with the reference and can come nearer on the coarse levels. Autoencoded: true pictures that went
once through the model's autoencoder, the best texture that anything it decodes can have.

The first pictures of that table's rows are side by side in [ablation.jpg](ablation.jpg). This page is written by every run, and
without measuring by `python -m bench.quality --doc`."""


class Work(NamedTuple):
    """GFLOPs of one square picture.

    Attributes:
        attention: Of self-attention.
        whole: Of the denoiser and the autoencoder.
    """

    attention: float
    whole: float


def work(pipe: Any, size: int, row: str) -> Work:
    """Useful work of a row: all stages and both passes of guidance, counted as in `scalediff.cost.flops` on networks without weights."""
    with torch.device("meta"):
        denoiser, vae = _twin(denoiser_of(pipe)), _twin(pipe.vae)
    attention = whole = 0.0
    for latent, kind, passes in _passes(pipe, size, row):
        one = forward_work(denoiser, _inputs(pipe, latent), attention=kind)
        attention += passes * one.attention
        whole += passes * sum(one)
    return Work(1e3 * attention, 1e3 * (whole + _coded(pipe, vae, size, row)))


def _twin(network: nn.Module) -> Any:
    cls: Any = original_class(type(network))
    return cls.from_config(network.config).eval()


def _inputs(pipe: Any, latent: Grid) -> dict[str, Tensor]:
    """Of one pass of a U-Net that is told a prompt alone."""
    config: Any = denoiser_of(pipe).config
    text = torch.empty(1, pipe.tokenizer.model_max_length, config.cross_attention_dim, device="meta")
    sample = torch.empty(1, config.in_channels, *latent, device="meta")
    return {"sample": sample, "timestep": torch.tensor(1.0), "encoder_hidden_states": text}


def _coded(pipe: Any, vae: Any, size: int, row: str) -> float:
    """TFLOPs of the autoencoder: what is drawn is decoded, stage by stage, and the next stage of a cascade is encoded."""
    sizes = [(size, size)]
    if row in CASCADES:
        sizes = stage_sizes(pipe, size, size)
    elif row == "demofusion":
        sizes = phase_sizes(pipe, size, size)
    total = 0.0
    for here, after in zip(sizes, [*sizes[1:], None], strict=True):
        y, x = (FACTOR * side // pipe.vae_scale_factor for side in here)  # as of an autoencoder of its factor
        total += autoencoder_work(vae, (y, x), after if row in CASCADES else None)
    return total


def _passes(pipe: Any, size: int, row: str) -> list[tuple[Grid, Literal["npa", "full"], int]]:
    """The latent grids that a row's forward passes see, with what attention, and how many there are, both of guidance counted."""
    factor, native = pipe.vae_scale_factor, native_grid(pipe)
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


def views_of(pipe: Any, size: Grid) -> int:
    """Overlapping native windows on a picture of a size in pixels, half a window apart."""
    y, x = native_grid(pipe)
    return len(corners((size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor), window=(y, x), stride=(y // 2, x // 2)))


def native_grid(pipe: Any) -> Grid:
    """Latents of a picture of native size."""
    height, width = native_size(pipe)
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def markdown(*results: Mapping[str, Mapping[str, str]]) -> str:
    """One section per group of rows, in it one table per machine's results, and under it what each row was measured with."""
    lines = ["# Picture quality on the embedded model", "", LEGEND]
    for title, names in TABLES.items():
        tables = [rows for records in results if (rows := [records[name] for name in names if name in records])]
        if tables:
            lines += ["", f"## {title}"]
        for rows in tables:
            lines += ["", *_table(rows), *_measured_with(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    shown = [column for column in COLUMNS if any(row.get(column[0]) for row in rows)]
    lines = [" | ".join(["", "row", *(heading for _, heading, _ in shown), ""]).strip(), "|---|" + "--:|" * len(shown)]
    for row in rows:
        cells = [_cell(row, name, form) for name, _, form in shown]
        if row.get("seconds") and all(row.get(name) for name in SPREAD):
            at = [name for name, _, _ in shown].index("seconds")
            cells[at] += " ({} - {})".format(*(f"{float(row[name]):.2f}" for name in SPREAD))
        lines.append(" | ".join(["", LABELS.get(row["row"], row["row"]), *cells, ""]).strip())
    return lines


def _cell(row: Mapping[str, str], name: str, form: str) -> str:
    return form.format(float(row[name])) if row.get(name) else "-"


def _measured_with(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines, groups = [], dict[tuple[str, ...], list[str]]()
    for row in rows:
        groups.setdefault(tuple(row[fact] for fact in FACTS), []).append(row["row"])
    for (command, model, *versions), members in groups.items():
        which = "" if len(groups) == 1 else f" ({', '.join(members)})"
        torch_version, diffusers_version, machine, threads, commit = versions
        lines += ["", f"`{command}`{which}: model {model}, torch {torch_version}, diffusers {diffusers_version},"]
        lines.append(f"{machine}, {threads} threads, commit {commit}.")
    return lines


def summary(records: Mapping[str, Mapping[str, str]]) -> str:
    """The README's table: the main columns of the ablation."""
    names = [name for name in ("direct", *METHODS, *ABLATION) if name in records]
    wanted = ("one_disc", "discs", "swd", "seconds", "gflops", "all_gflops")
    shown = [column for column in COLUMNS if column[0] in wanted and any(records[name].get(column[0]) for name in names)]
    lines = ["| | " + " | ".join(heading for _, heading, _ in shown) + " |", "|---|" + "--:|" * len(shown)]
    for row in names:
        cells = [_cell(records[row], name, form) for name, _, form in shown]
        lines.append("| " + " | ".join([LABELS[row], *cells]) + " |")
    return "\n".join(lines)
