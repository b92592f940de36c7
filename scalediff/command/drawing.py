"""The commands `scalediff generate` and `scalediff upscale`: generate pictures one by one, and save every stage."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from scalediff.cascade.changing import changing_pipeline
from scalediff.cascade.checks import check_run
from scalediff.cascade.describing import describe_stage, device_name
from scalediff.cascade.metadata import save_png
from scalediff.cascade.pictures import BEHIND_MASK
from scalediff.cascade.pipeline import enlarged_size, stage_sizes, wrap_of
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import check_scheduler
from scalediff.cascade.upsampling import resolve_upsampler
from scalediff.command.comparing import FULL, compared, draw_panel, save_sheet
from scalediff.command.jobs import plan_jobs, prompts_of
from scalediff.command.loading import UsageError
from scalediff.command.method_options import check_effects, chosen_method, method_facts, method_object
from scalediff.command.pictures import open_picture
from scalediff.command.ranks import check_one_process, check_together, drawing_together, own_jobs, process_group
from scalediff.command.reporting import Job, picture_metadata, print_result, print_status
from scalediff.command.runs import (
    SHARED,
    load_pipeline,
    named_size,
    preview_path,
    print_memory_estimate,
    resolve_settings,
    run_arguments,
    target_size,
)  # fmt: skip
from scalediff.cost.recorded import recorded_work
from scalediff.draw import generate, upscale
from scalediff.settings import Settings

SILENT = {"on_step": None, "progress": False}  # arguments of a process that saves no picture


def generate_pictures(options: Namespace) -> None:
    """Generate a picture for every prompt and seed, and save every stage; with --compare, save a comparison too."""
    planned = plan_pictures(options)
    with process_group(options):
        jobs = own_jobs(options, planned)
        if not jobs:
            return
        pipe, draw = prepare(options, jobs[0], several=len(planned) > 1)
        with drawing_together(options, pipe) as saves:
            for job in jobs:
                draw(job, saves)


def plan_pictures(options: Namespace) -> list[Job]:
    """All pictures of `scalediff generate`; options that do not fit together raise an error."""
    planned = plan_jobs(options, prompts_of(options))
    check_together(options)
    check_effects(options)
    if options.compare and chosen_method(options) != "scalediff":
        raise UsageError(f"--compare is for --method scalediff; `scalediff compare` draws any methods, got --method {options.method}")
    return planned


def prepare(options: Namespace, first: Job, *, several: bool) -> tuple[Any, Callable[[Job, bool], None]]:
    """Load the pipeline of `scalediff generate`, and check the run.

    Args:
        options: The options of the command.
        first: The first picture, for whose prompt memory is estimated.
        several: Whether each picture has a workdir of its own.

    Returns:
        The pipeline, and a function that generates a picture, and saves it if its second argument is true.
    """
    method = chosen_method(options)
    pipe, upsampler = load_pipeline(options), resolve_upsampler(options.upsampler)
    settings = resolve_settings(pipe, options)
    size = target_size(pipe, options)
    sizes = [size]
    if method == "scalediff":
        sizes = stage_sizes(pipe, *size, options.sizes, wrap=wrap_of(pipe, settings))
        check_run(pipe, {}, sizes, settings, restarts=len(sizes) - 1)
    print_memory_estimate(pipe, options, first, size, settings)

    def draw(job: Job, saves: bool) -> None:
        facts = {"sizes": [f"{h}x{w}" for h, w in sizes]} if method == "scalediff" else method_facts(options.method, method)
        arguments = run_arguments(pipe, options, job, settings, upsampler, several=several)
        if method != "scalediff":
            arguments = {name: arguments[name] for name in SHARED if name in arguments} | {"method": method}
        if saves:
            print_status(f"{' -> '.join(f'{h} x {w}' for h, w in sizes)}, seed {job.seed}, {device_name(pipe)}")
            _generate_one(pipe, options, job, size, arguments, facts, settings)
        else:
            generate(pipe, job.prompt, height=size[0], width=size[1], **(arguments | SILENT))

    return pipe, draw


def _generate_one(
    pipe: Any, options: Namespace, job: Job, size: tuple[int, int], arguments: dict[str, Any], facts: dict[str, Any], settings: Settings
) -> None:
    """Generate a picture and save it, and a comparison with --compare."""
    with _stage_saver(pipe, options, job, facts) as (save, written):
        with recorded_work(pipe) if options.compare else nullcontext() as work:
            result = generate(pipe, job.prompt, height=size[0], width=size[1], **arguments, on_stage=save)
        print_result(result, options, job)
        if work is not None:
            again = {**arguments, "workdir": None, "on_step": None}
            direct = draw_panel(pipe, "direct", method_object("direct", ()), job, size, again)
            panels = [direct, draw_panel(pipe, FULL, None, job, size, again), compared("scalediff", result, work, facts)]
            path = job.out.with_name(f"{job.out.stem}.compare.png")
            save_sheet(pipe, options, job, panels, path, settings)
            written.append(path)


def upscale_pictures(options: Namespace) -> None:
    """Upscale a picture once for every seed, and save every stage."""
    if not options.split_picture:
        check_one_process("upscale", "--split-picture draws every picture together")
    check_together(options)
    check_effects(options)
    jobs = plan_jobs(options, [options.prompt], name=options.file.stem)
    if any(job.out.resolve() == options.file.resolve() for job in jobs):
        raise UsageError(f"--out must not be the input picture, got {options.file}")
    image = open_picture(options.file)
    mask = None if options.mask is None else open_picture(options.mask, behind=BEHIND_MASK)
    pipe, upsampler = load_pipeline(options), resolve_upsampler(options.upsampler)
    if options.strength is not None:
        pipe = changing_pipeline(pipe, with_mask=mask is not None)
    settings = resolve_settings(pipe, options)
    height, width = named_size(options) or enlarged_size(pipe, image, wrap_of(pipe, settings))
    changes = {"mask": options.mask and options.mask.name, "strength": options.strength}
    facts = {"picture": options.file.name, "picture_size": f"{image.height}x{image.width}"}
    facts |= {name: value for name, value in changes.items() if value is not None}
    check_scheduler(pipe.scheduler)
    stage_sizes(pipe, height, width, wrap=wrap_of(pipe, settings))
    with process_group(options):
        print_memory_estimate(pipe, options, jobs[0], (height, width), settings)
        with drawing_together(options, pipe) as saves:
            for job in jobs:
                arguments = run_arguments(pipe, options, job, settings, upsampler, several=len(jobs) > 1)
                arguments |= {"mask_image": mask, "strength": options.strength, "height": height, "width": width}
                if not saves:
                    upscale(pipe, image, job.prompt, **(arguments | SILENT))
                    continue
                print_status(f"{image.height} x {image.width} -> {height} x {width}, seed {job.seed}, {device_name(pipe)}")
                with _stage_saver(pipe, options, job, facts) as (save, _):
                    print_result(upscale(pipe, image, job.prompt, **arguments, on_stage=save), options, job)


@contextmanager
def _stage_saver(pipe: Any, options: Namespace, job: Job, facts: Mapping[str, Any]) -> Iterator[tuple[Callable[[Stage], None], list[Path]]]:
    """Yield a function that saves a finished stage with its metadata, and the list of files written; print the list on Ctrl-C."""
    written: list[Path] = []
    if pipe._execution_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe._execution_device)

    def save(stage: Stage) -> None:
        last = stage.index == stage.of
        path = job.out if last else job.out.with_name(f"{job.out.stem}.stage{stage.index}-{stage.height}x{stage.width}.png")
        save_png(
            stage.images[0],
            path,
            metadata={**picture_metadata(pipe, options, job, stage.settings), **facts, **describe_stage(stage)},
        )
        written.append(path)

    try:
        yield save, written
    except KeyboardInterrupt:
        written += [preview_path(job)] if preview_path(job).exists() else []
        print_status("interrupted; files written: " + (", ".join(map(str, written)) or "none"))
        raise
    preview_path(job).unlink(missing_ok=True)
