"""The commands `scalediff generate` and `scalediff upscale`: load a model, generate pictures one by one, and save every stage."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scalediff.cascade.checks import check_run
from scalediff.cascade.fitting import check_possible, describe_fit, fitting_size
from scalediff.cascade.memory import available_bytes, estimate, format_gib, is_offloaded, needs_tiling
from scalediff.cascade.metadata import save_png
from scalediff.cascade.pipeline import cascade_of, named_preset, native_size, stage_sizes
from scalediff.cascade.progress import Step, show_pipeline_bar
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import check_scheduler
from scalediff.cascade.upsampling import Upsampler, resolve_upsampler
from scalediff.command.allocator import MEMORY_HEADROOM, keep_freed_memory
from scalediff.command.jobs import plan_jobs, prompts_of
from scalediff.command.loading import UsageError, load_model, one_line
from scalediff.command.method_options import IN_PARTS, SETTING_OPTIONS, chosen_method, method_facts
from scalediff.command.pictures import open_picture, side_by_side
from scalediff.command.reporting import Job, device_name, picture_metadata, print_result, print_status, stage_metadata, vae_tiling
from scalediff.draw import Result, generate, upscale
from scalediff.settings import Settings

# Arguments of `generate` that every method has; an upsampler is refused by those that enlarge no picture.
SHARED = ("preset", "negative_prompt", "generator", "progress", "upsampler")


def generate_pictures(options: Namespace) -> None:
    """Generate a picture for every prompt and seed, and save every stage; with --compare, save a comparison too."""
    jobs = plan_jobs(options, prompts_of(options))
    method = chosen_method(options)
    if options.compare and method != "scalediff":
        raise UsageError(f"--compare is for --method scalediff; `scalediff compare` draws any methods, got --method {options.method}")
    pipe, upsampler = load_pipeline(options), resolve_upsampler(options.upsampler)
    settings = resolve_settings(pipe, options)
    size = target_size(pipe, options)
    sizes = [size]
    if method == "scalediff":
        sizes = stage_sizes(pipe, *size, options.sizes)
        check_run(pipe, {}, sizes, settings, restarts=len(sizes) - 1)
    print_memory_estimate(pipe, options, jobs[0], size, settings)
    for job in jobs:
        print_status(f"{' -> '.join(f'{h} x {w}' for h, w in sizes)}, seed {job.seed}, {device_name(pipe)}")
        facts = {"sizes": [f"{h}x{w}" for h, w in sizes]} if method == "scalediff" else method_facts(options.method, method)
        with _stage_saver(pipe, options, job, facts) as (save, written):
            run_arguments = _run_arguments(pipe, options, job, settings, upsampler, several=len(jobs) > 1)
            if method != "scalediff":
                run_arguments = {name: run_arguments[name] for name in SHARED} | {"method": method}
            result = generate(pipe, job.prompt, height=size[0], width=size[1], **run_arguments, on_stage=save)
            seconds = print_result(result, options, job)
            if options.compare:
                path = job.out.with_name(f"{job.out.stem}.compare.png")
                panels = _comparison_panels(pipe, options, job, result, run_arguments, seconds)
                metadata = picture_metadata(pipe, options, job, result.settings) | facts
                metadata |= {"kind": "comparison", "panels": list(panels)}
                save_png(side_by_side(list(panels.values()), list(panels)), path, metadata=metadata)
                written.append(path)
                print_status(f"{path}: {' | '.join(panels)}")


def target_size(pipe: Any, options: Namespace) -> tuple[int, int]:
    """(height, width) of --size; four times the native size without it."""
    native = native_size(pipe)
    return options.size or (4 * native[0], 4 * native[1])


def upscale_pictures(options: Namespace) -> None:
    """Upscale a picture once for every seed, and save every stage."""
    jobs = plan_jobs(options, [options.prompt], name=options.file.stem)
    if any(job.out.resolve() == options.file.resolve() for job in jobs):
        raise UsageError(f"--out must not be the input picture, got {options.file}")
    image = open_picture(options.file)
    pipe, upsampler = load_pipeline(options), resolve_upsampler(options.upsampler)
    settings = resolve_settings(pipe, options)
    height, width = options.size or (2 * image.height, 2 * image.width)
    facts = {"picture": options.file.name, "picture_size": f"{image.height}x{image.width}"}
    check_scheduler(pipe.scheduler)
    stage_sizes(pipe, height, width)
    print_memory_estimate(pipe, options, jobs[0], (height, width), settings)
    for job in jobs:
        print_status(f"{image.height} x {image.width} -> {height} x {width}, seed {job.seed}, {device_name(pipe)}")
        with _stage_saver(pipe, options, job, facts) as (save, _):
            run_arguments = _run_arguments(pipe, options, job, settings, upsampler, several=len(jobs) > 1)
            result = upscale(pipe, image, job.prompt, height=height, width=width, **run_arguments, on_stage=save)
            print_result(result, options, job)


def load_pipeline(options: Namespace) -> Any:
    """The pipeline of --model, with the scheduler, device and dtype of the command line."""
    return load_model(
        options.model, device=options.device, dtype=options.dtype, scheduler=options.scheduler, spacing=options.timestep_spacing,
        low_memory=options.low_memory,
    )  # fmt: skip


def resolve_settings(pipe: Any, options: Namespace) -> Settings:
    """The settings of the preset, overridden by those of the command line."""
    named = {name: getattr(options, name) for name in SETTING_OPTIONS if getattr(options, name) is not None}
    return replace(named_preset(pipe, options.preset).settings, **named)


def _run_arguments(
    pipe: Any, options: Namespace, job: Job, settings: Settings, upsampler: Upsampler | None, *, several: bool
) -> dict[str, Any]:
    """The arguments that `generate` and `upscale` have in common."""
    preset = named_preset(pipe, options.preset)
    return {
        "preset": replace(preset, settings=settings),
        "negative_prompt": options.negative_prompt,
        "generator": torch.Generator().manual_seed(job.seed),
        "progress": not options.quiet,
        "upsampler": upsampler,
        "sizes": options.sizes,
        "workdir": options.workdir / job.out.stem if options.workdir is not None and several else options.workdir,
        "vae_tiling": vae_tiling(options),
        "vae_attention": options.vae_attention,
        "split_guidance": options.low_memory or options.split_guidance,
        "on_step": _preview_callback(options.preview, job) if options.preview else None,
    }


def _preview_callback(every: int, job: Job) -> Callable[[Step], None]:
    def show(step: Step) -> None:
        if step.step % every == 0:
            position = {"stage": f"{step.stage}/{step.stages}", "step": f"{step.step}/{step.steps}"}
            save_png(step.preview()[0], _preview_path(job), metadata={"prompt": job.prompt, "seed": job.seed, **position})

    return show


def _preview_path(job: Job) -> Path:
    return job.out.with_name(f"{job.out.stem}.preview.png")


def print_memory_estimate(pipe: Any, options: Namespace, job: Job, size: tuple[int, int], settings: Settings) -> None:
    """Print the memory that the run needs, and refuse a run that does not fit; on a CPU with plenty, keep freed memory.

    Methods whose denoiser never sees the whole picture need less, which is not estimated.

    Raises:
        UsageError: Too little memory is available, and --force is not given.
        ValueError: The picture alone is larger than the device's memory.
    """
    arguments = {"prompt": job.prompt, cascade_of(pipe).guidance: settings.guidance_scale, "num_inference_steps": settings.steps}
    if options.negative_prompt is not None:
        arguments["negative_prompt"] = options.negative_prompt
    check_possible(pipe, arguments, size)
    if getattr(options, "method", "") in IN_PARTS:
        print_status(f"memory: no estimate for {options.method}, whose denoiser does not see the whole picture at once")
        return
    try:
        needs = estimate(pipe, arguments, size)
    except NotImplementedError as why:
        print_status(f"memory: no estimate: {one_line(why)}")
        return

    def used_at(size: tuple[int, int]) -> dict[str, bool]:
        tiling = vae_tiling(options)
        return {
            "tiled": needs_tiling(pipe, size, 1) if tiling is None else tiling,
            "split": options.low_memory or options.split_guidance,
            "offloaded": is_offloaded(pipe),
        }

    used = used_at(size)
    peak, available = needs.peak(**used), available_bytes(pipe._execution_device)
    if available is None:
        print_status(f"memory: this run needs about {format_gib(peak)}")
    elif peak > available:
        advice = needs.advice(available, **used)
        problem = f"this run needs about {format_gib(peak)}; {format_gib(available)} are available; {advice}"
        if not options.force:
            fits = describe_fit(fitting_size(pipe, arguments, size, available, used_at))
            raise UsageError(f"{problem}; {fits}; --force runs it all the same")
        print_status(f"memory: {problem}")
    else:
        print_status(f"memory: this run needs about {format_gib(peak)}; {format_gib(available)} are available")
        if pipe._execution_device.type == "cpu" and MEMORY_HEADROOM * peak <= available:
            keep_freed_memory()


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
            metadata={**picture_metadata(pipe, options, job, stage.settings), **facts, **stage_metadata(stage)},
        )
        written.append(path)

    try:
        yield save, written
    except KeyboardInterrupt:
        print_status("interrupted; files written: " + (", ".join(map(str, written)) or "none"))
        raise
    _preview_path(job).unlink(missing_ok=True)


def _comparison_panels(
    pipe: Any, options: Namespace, job: Job, result: Result, run_arguments: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Pictures by label: direct inference, the cascade with full attention, and the result. Labels include the time."""
    final, settings = result.stages[-1], result.settings
    show_pipeline_bar(pipe, f"direct  {final.height} x {final.width}", show=not options.quiet)
    since = time.perf_counter()
    direct = pipe(
        job.prompt,
        negative_prompt=options.negative_prompt,
        height=final.height,
        width=final.width,
        num_inference_steps=settings.steps,
        generator=torch.Generator().manual_seed(job.seed),
        **{cascade_of(pipe).guidance: settings.guidance_scale},
    ).images[0]
    direct_seconds = time.perf_counter() - since
    again = {"generator": torch.Generator().manual_seed(job.seed), "attention": "full", "workdir": None, "on_step": None}
    full = generate(pipe, job.prompt, height=final.height, width=final.width, **{**run_arguments, **again})
    full_seconds = sum(stage.seconds for stage in full.stages)
    return {
        f"direct {direct_seconds:.1f} s": direct,
        f"full attention {full_seconds:.1f} s": full.images[0],
        f"{_method_label(settings)} {seconds:.1f} s": result.images[0],
    }


def _method_label(settings: Settings) -> str:
    """`ScaleDiff`, with the parts that are turned off."""
    off = [name for name, on in (("NPA", settings.attention == "npa"), ("LFM", settings.lfm), ("SG", settings.sg)) if not on]
    return "ScaleDiff" + (f" without {', '.join(off)}" if off else "")
