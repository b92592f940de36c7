"""What the commands that draw have in common: the pipeline, the settings, the arguments of a run, and the memory that it needs."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from scalediff.cascade.changing import blank_arguments
from scalediff.cascade.fitting import Switches, check_possible, describe_fit, fit_of
from scalediff.cascade.metadata import save_png
from scalediff.cascade.pipeline import guidance_argument, named_preset, native_size, wrap_of
from scalediff.cascade.progress import Step
from scalediff.cascade.ranks import on_all_ranks, ranks_of
from scalediff.cascade.upsampling import Upsampler
from scalediff.command.allocator import MEMORY_HEADROOM, keep_freed_memory
from scalediff.command.loading import UsageError, load_model, one_line
from scalediff.command.method_options import SETTING_OPTIONS
from scalediff.command.ranks import device_name
from scalediff.command.reporting import Job, print_status, vae_tiling
from scalediff.methods import METHODS
from scalediff.settings import TILES, Settings

# Arguments of `generate` that every method has; an upsampler is refused by those that enlarge no picture.
SHARED = ("preset", "negative_prompt", "call", "generator", "progress", "upsampler", "force")


def target_size(pipe: Any, options: Namespace) -> tuple[int, int]:
    """(height, width) of the last stage that the options name; four times the native size without any."""
    native = native_size(pipe)
    return named_size(options) or (4 * native[0], 4 * native[1])


def named_size(options: Namespace) -> tuple[int, int] | None:
    """(height, width) of --size, or else of the last of --sizes; None without both."""
    size: tuple[int, int] | None = options.size or (options.sizes[-1] if options.sizes else None)
    return size


def load_pipeline(options: Namespace) -> Any:
    """The pipeline of --model, with the scheduler, device and dtype of the command line."""
    return load_model(
        options.model, device=device_name(options), dtype=options.dtype, scheduler=options.scheduler, spacing=options.timestep_spacing,
        low_memory=options.low_memory,
    )  # fmt: skip


def resolve_settings(pipe: Any, options: Namespace) -> Settings:
    """The settings of the preset, overridden by those of the command line."""
    named = {name: getattr(options, name) for name in SETTING_OPTIONS if getattr(options, name) is not None}
    if "wrap" in named:
        named["wrap"] = TILES[named["wrap"]]
    return replace(named_preset(pipe, options.preset).settings, **named)


def run_arguments(
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
        "force": True,  # `print_memory_estimate` has refused what does not fit
    }


def _preview_callback(every: int, job: Job) -> Callable[[Step], None]:
    def show(step: Step) -> None:
        if step.step % every == 0:
            position = {"stage": f"{step.stage}/{step.stages}", "step": f"{step.step}/{step.steps}"}
            save_png(step.preview()[0], preview_path(job), metadata={"prompt": job.prompt, "seed": job.seed, **position})

    return show


def preview_path(job: Job) -> Path:
    """The file of a job's previews."""
    return job.out.with_name(f"{job.out.stem}.preview.png")


def print_memory_estimate(pipe: Any, options: Namespace, job: Job, size: tuple[int, int], settings: Settings) -> None:
    """Print the memory that the run needs, and refuse a run that does not fit; on a CPU with plenty, keep freed memory.

    Processes that draw together do so alike, by the one with the least to spare.

    Methods whose denoiser never sees the whole picture need less, which is not estimated.

    Raises:
        UsageError: Too little memory is available, and --force is not given.
        ValueError: The picture alone is larger than the device's memory.
    """
    arguments = {"prompt": job.prompt, **guidance_argument(pipe, settings.guidance_scale), "num_inference_steps": settings.steps}
    arguments |= blank_arguments(pipe)
    if options.negative_prompt is not None:
        arguments["negative_prompt"] = options.negative_prompt
    method = METHODS.get(getattr(options, "method", ""))
    if method is not None and method.in_parts:
        check_possible(pipe, arguments, size)
        print_status(f"memory: no estimate for {options.method}, whose denoiser does not see the whole picture at once")
        return
    together = distributed.group.WORLD if getattr(options, "split_picture", False) else None  # `compare` has no such option
    groups, shares = ranks_of(pipe, together, attention=settings.attention, vae_attention=options.vae_attention)
    first = not groups or distributed.get_rank() == 0  # of those that draw together, one says it
    switches = Switches(vae_tiling(options), options.low_memory or options.split_guidance, wrap_of(pipe, settings))
    find_fit = functools.partial(fit_of, pipe, arguments, size, switches, shares=shares)
    try:
        fits = on_all_ranks(find_fit, groups, "comparing their memory")
    except NotImplementedError as why:
        if first:
            print_status(f"memory: no estimate: {one_line(why)}")
        return
    rank, fit = min(fits.items(), key=lambda item: math.inf if item[1].available is None else item[1].available - item[1].peak)
    described = fit.describe(f" on rank {rank}" if groups else "") + (f"; {fit.advice}" if fit.advice else "")
    if fit.advice and not options.force:
        raise UsageError(f"{described}; {describe_fit(fit.size)}; --force runs it all the same")
    if first:
        print_status(f"memory: {described}")
    if fit.available is not None and pipe._execution_device.type == "cpu" and MEMORY_HEADROOM * fit.peak <= fit.available:
        keep_freed_memory()
