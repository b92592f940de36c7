"""The command `scalediff compare`, and `scalediff generate --compare`: the same prompt and seed by several methods, side by side."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scalediff.cascade.checks import check_run
from scalediff.cascade.metadata import save_png
from scalediff.cascade.pipeline import stage_sizes, wrap_of
from scalediff.cascade.upsampling import resolve_upsampler
from scalediff.command.jobs import plan_jobs, prompts_of
from scalediff.command.loading import UsageError, one_line
from scalediff.command.method_options import check_effects, check_upsampler_effect, method_facts, method_objects, options_of_scalediff
from scalediff.command.pictures import side_by_side
from scalediff.command.ranks import check_one_process
from scalediff.command.reporting import Job, picture_metadata, print_status
from scalediff.command.runs import SHARED, load_pipeline, print_memory_estimate, resolve_settings, run_arguments, target_size
from scalediff.cost.recorded import RecordedWork, recorded_work
from scalediff.draw import Result, generate
from scalediff.methods import METHODS, MethodOptions, method_title
from scalediff.settings import Settings

FULL = "full-attention"  # ScaleDiff with the model's own attention
COMPARABLE = ("scalediff", FULL, *METHODS)
_UNSUPPORTED = ("workdir", "preview")


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison.

    Attributes:
        method: Its name in `COMPARABLE`.
        title: What the sheet calls it.
        result: What `generate` returned.
        tflops: The work of the run; None if it cannot be counted.
        facts: The method and its options, for the metadata.
    """

    method: str
    title: str
    result: Result
    tflops: float | None
    facts: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Seconds of all stages, including decoding."""
        return sum(stage.seconds for stage in self.result.stages)

    @property
    def label(self) -> str:
        """The title, and below it time and work."""
        work = "" if self.tflops is None else f", {self.tflops:.3g} TFLOPs"
        return f"{self.title}\n{self.seconds:.1f} s{work}"


def compare_methods(options: Namespace) -> None:
    """Draw every prompt and seed by every method of --methods; save each picture, and a labelled sheet of all of them."""
    unsupported = [f"--{name}" for name in _UNSUPPORTED if getattr(options, name) is not None]
    if unsupported:
        raise UsageError(f"`scalediff compare` does not support {', '.join(unsupported)}")
    without_effect = [name for name in options_of_scalediff(options) if name != "--low-memory"]  # which also offloads the model
    if without_effect and not {"scalediff", FULL} & set(options.methods):
        raise UsageError(f"{', '.join(without_effect)} must be with scalediff or {FULL} in --methods, got {','.join(options.methods)}")
    check_one_process("compare")
    check_effects(options)
    jobs, methods = plan_jobs(options, prompts_of(options)), method_objects(options.methods, options.option)
    check_upsampler_effect(methods, options.upsampler)
    pipe, upsampler = load_pipeline(options), resolve_upsampler(options.upsampler)
    settings, size = resolve_settings(pipe, options), target_size(pipe, options)
    sizes = stage_sizes(pipe, *size, options.sizes, wrap=wrap_of(pipe, settings))
    if {"scalediff", FULL} & set(methods):
        check_run(pipe, {}, sizes, settings, restarts=len(sizes) - 1)
    print_memory_estimate(pipe, options, jobs[0], size, settings)
    for job in jobs:
        panels: list[Panel] = []
        for name, method in methods.items():
            arguments = run_arguments(pipe, options, job, settings, upsampler, several=False)
            panel = draw_panel(pipe, name, method, job, size, arguments)
            file = job.out.with_name(f"{job.out.stem}.{name}.png")
            metadata = picture_metadata(pipe, options, job, panel.result.settings)
            save_png(panel.result.images[0], file, metadata={**metadata, **panel.facts, **_measured(panel)})
            print_status(f"{file}: {panel.label.replace(chr(10), ', ')}")
            panels.append(panel)
        save_sheet(pipe, options, job, panels, job.out, settings)
        if options.json:
            files = [{"method": one.method, "file": f"{job.out.stem}.{one.method}.png", **_measured(one)} for one in panels]
            summary = {"file": str(job.out), "prompt": job.prompt, "seed": job.seed, "panels": files}
            print(json.dumps(summary, ensure_ascii=False), flush=True)


def draw_panel(pipe: Any, name: str, method: MethodOptions | None, job: Job, size: tuple[int, int], arguments: Mapping[str, Any]) -> Panel:
    """Draw one picture of a comparison and count its work.

    Args:
        pipe: The pipeline.
        name: A name of `COMPARABLE`.
        method: The method's options object; None for ScaleDiff and `FULL`. A picture that should wrap does not by another method, and
            its title says so.
        job: Prompt and seed.
        size: (height, width) in pixels.
        arguments: Arguments of `generate` for ScaleDiff. Other methods take those that all have, and the upsampler if they have one.
    """
    given = {**arguments, "generator": torch.Generator().manual_seed(job.seed)}
    if name == FULL:
        given["attention"] = "full"
    if method is not None:
        preset = replace(given["preset"], settings=replace(given["preset"].settings, wrap=None))
        given = {one: given[one] for one in SHARED if one in given} | {"method": method, "preset": preset}
        if not hasattr(method, "upsampler"):
            given["upsampler"] = None
    if given["progress"]:
        print_status(f"{_title(name)}, {size[0]} x {size[1]}")
    with recorded_work(pipe) as work:
        result = generate(pipe, job.prompt, height=size[0], width=size[1], **given)
    panel = compared(name, result, work, {"method": name} if method is None else method_facts(name, method))
    if method is not None and any(wrap_of(pipe, arguments["preset"].settings)):
        return replace(panel, title=f"{panel.title}, not seamless")
    return panel


def compared(name: str, result: Result, work: RecordedWork, facts: Mapping[str, Any]) -> Panel:
    """The panel of a finished picture. If its work cannot be counted, the label lacks it, and a line on stderr says why."""
    tflops: float | None = None
    try:
        tflops = work.tflops()
    except NotImplementedError as error:
        print_status(f"no TFLOPs: {one_line(error)}")
    return Panel(name, _scalediff_title(result.settings) if name == "scalediff" else _title(name), result, tflops, facts)


def save_sheet(pipe: Any, options: Namespace, job: Job, panels: Sequence[Panel], path: Path, settings: Settings) -> None:
    """Save the pictures side by side with their labels, and print the file and the labels."""
    labels = [panel.label for panel in panels]
    sheet = side_by_side([panel.result.images[0] for panel in panels], labels)
    shown = [{"title": panel.title, **panel.facts, **_measured(panel)} for panel in panels]
    save_png(sheet, path, metadata=picture_metadata(pipe, options, job, settings) | {"kind": "comparison", "panels": shown})
    print_status(f"{path}: {' | '.join(label.replace(chr(10), ' ') for label in labels)}")


def _measured(panel: Panel) -> dict[str, Any]:
    return {"seconds": round(panel.seconds, 3), "tflops": None if panel.tflops is None else round(panel.tflops, 6)}


def _title(name: str) -> str:
    return "full attention" if name == FULL else method_title(name)


def _scalediff_title(settings: Settings) -> str:
    """`ScaleDiff`, with the parts that are turned off."""
    off = [name for name, on in (("NPA", settings.attention == "npa"), ("LFM", settings.lfm), ("SG", settings.sg)) if not on]
    return "ScaleDiff" + (f" without {', '.join(off)}" if off else "")
