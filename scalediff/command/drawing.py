"""The commands `scalediff generate` and `scalediff upscale`: load a model, generate pictures one by one, and save every stage."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scalediff.cascade.checks import check_run
from scalediff.cascade.fitting import check_possible, describe_fit, fitting_size
from scalediff.cascade.memory import available_bytes, estimate, format_gib, is_offloaded, needs_tiling
from scalediff.cascade.metadata import save_png
from scalediff.cascade.pipeline import guidance_argument, named_preset, native_size, stage_sizes
from scalediff.cascade.progress import Step, show_pipeline_bar
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import check_scheduler
from scalediff.command.allocator import MEMORY_HEADROOM, keep_freed_memory
from scalediff.command.loading import UsageError, load_model, one_line
from scalediff.command.pictures import check_writable, open_picture, side_by_side
from scalediff.draw import Result, generate, upscale
from scalediff.settings import Settings

# Fields of Settings; each is a command-line option of the same name.
_SETTING_OPTIONS = (
    "steps", "restart", "guidance_scale", "guidance_until", "attention", "jitter", "lfm", "sg", "lfm_cutoff", "sg_cutoff",
    "sg_cutoff_start", "filter", "anchor", "size_conditioning",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One picture to generate: prompt, seed and output file."""

    prompt: str
    seed: int
    out: Path


def generate_pictures(options: Namespace) -> None:
    """Generate a picture for every prompt and seed, and save every stage; with --compare, save a comparison too."""
    jobs = _jobs(options, _prompts(options))
    pipe = _load_pipeline(options)
    settings = _resolve_settings(pipe, options)
    native = native_size(pipe)
    height, width = options.size or (4 * native[0], 4 * native[1])
    sizes = stage_sizes(pipe, height, width, options.sizes)
    check_run(pipe, {}, sizes, settings, restarts=len(sizes) - 1)
    _print_memory_estimate(pipe, options, jobs[0], (height, width), settings)
    for job in jobs:
        _print_status(f"{' -> '.join(f'{h} x {w}' for h, w in sizes)}, seed {job.seed}, {_device_name(pipe)}")
        run_metadata = {"sizes": [f"{h}x{w}" for h, w in sizes]}
        with _stage_saver(pipe, options, job, run_metadata) as (save, written):
            run_arguments = _run_arguments(pipe, options, job, settings, several=len(jobs) > 1)
            result = generate(pipe, job.prompt, height=height, width=width, sizes=options.sizes, **run_arguments, on_stage=save)
            seconds = _print_result(result, job, options)
            if options.compare:
                path = job.out.with_name(f"{job.out.stem}.compare.png")
                panels = _comparison_panels(pipe, options, job, result, run_arguments, seconds)
                metadata = _metadata(pipe, options, job, result.settings) | run_metadata | {"kind": "comparison", "panels": list(panels)}
                save_png(side_by_side(list(panels.values()), list(panels)), path, metadata=metadata)
                written.append(path)
                _print_status(f"{path}: {' | '.join(panels)}")


def upscale_pictures(options: Namespace) -> None:
    """Upscale a picture once for every seed, and save every stage."""
    jobs = _jobs(options, [options.prompt], name=options.file.stem)
    if any(job.out.resolve() == options.file.resolve() for job in jobs):
        raise UsageError(f"--out must not be the input picture, got {options.file}")
    image = open_picture(options.file)
    pipe = _load_pipeline(options)
    settings = _resolve_settings(pipe, options)
    height, width = options.size or (2 * image.height, 2 * image.width)
    run_metadata = {"picture": options.file.name, "picture_size": f"{image.height}x{image.width}"}
    check_scheduler(pipe.scheduler)
    stage_sizes(pipe, height, width)
    _print_memory_estimate(pipe, options, jobs[0], (height, width), settings)
    for job in jobs:
        _print_status(f"{image.height} x {image.width} -> {height} x {width}, seed {job.seed}, {_device_name(pipe)}")
        with _stage_saver(pipe, options, job, run_metadata) as (save, _):
            run_arguments = _run_arguments(pipe, options, job, settings, several=len(jobs) > 1)
            result = upscale(pipe, image, job.prompt, height=height, width=width, sizes=options.sizes, **run_arguments, on_stage=save)
            _print_result(result, job, options)


def _prompts(options: Namespace) -> list[str]:
    """The prompts of the command line, then those of the file, one per line."""
    prompts = list(options.prompt)
    if options.prompts is not None:
        try:
            prompts += [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts must be a text file with one prompt per line, got {options.prompts}: {error}") from error
    if not prompts:
        raise UsageError("a prompt is required, as an argument or in a file with --prompts")
    return prompts


def _jobs(options: Namespace, prompts: Sequence[str], name: str = "") -> list[Job]:
    """One job per prompt and seed. All files are checked to be writable; several pictures go to a folder, under different names."""
    if not all(prompt.strip() for prompt in prompts):
        _print_status("a prompt is empty: its picture follows no text")
    wanted = [(prompt, seed) for prompt in prompts for seed in options.seed]
    out: Path | None = options.out
    if out is not None and len(wanted) > 1 and not out.is_dir():
        raise UsageError(f"--out must be an existing folder for {len(wanted)} pictures, got {out}")
    folder = out if out is not None and out.is_dir() else Path()
    jobs: dict[Path, Job] = {}
    for prompt, seed in wanted:
        stem = f"{name or _slug(prompt)}-{seed}"
        names = (f"{stem}.png", *(f"{stem}-again-{i}.png" for i in range(1, len(wanted))))
        file = out if out is not None and not out.is_dir() else next(folder / one for one in names if folder / one not in jobs)
        check_writable(file)
        jobs[file] = Job(prompt, seed, file)
    return list(jobs.values())


def _load_pipeline(options: Namespace) -> Any:
    return load_model(
        options.model, device=options.device, dtype=options.dtype, scheduler=options.scheduler, spacing=options.timestep_spacing,
        low_memory=options.low_memory,
    )  # fmt: skip


def _resolve_settings(pipe: Any, options: Namespace) -> Settings:
    """The settings of the preset, overridden by those of the command line."""
    named = {name: getattr(options, name) for name in _SETTING_OPTIONS if getattr(options, name) is not None}
    return replace(named_preset(pipe, options.preset).settings, **named)


def _run_arguments(pipe: Any, options: Namespace, job: Job, settings: Settings, *, several: bool) -> dict[str, Any]:
    """The arguments that `generate` and `upscale` have in common."""
    preset = named_preset(pipe, options.preset)
    return {
        "preset": replace(preset, settings=settings),
        "negative_prompt": options.negative_prompt,
        "generator": torch.Generator().manual_seed(job.seed),
        "progress": not options.quiet,
        "workdir": options.workdir / job.out.stem if options.workdir is not None and several else options.workdir,
        "vae_tiling": _vae_tiling(options),
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


def _print_memory_estimate(pipe: Any, options: Namespace, job: Job, size: tuple[int, int], settings: Settings) -> None:
    """Print the memory that the run needs, and refuse a run that does not fit; on a CPU with plenty, keep freed memory.

    Raises:
        UsageError: Too little memory is available, and --force is not given.
        ValueError: The picture alone is larger than the device's memory.
    """
    arguments = {"prompt": job.prompt, **guidance_argument(pipe, settings.guidance_scale), "num_inference_steps": settings.steps}
    if options.negative_prompt is not None:
        arguments["negative_prompt"] = options.negative_prompt
    check_possible(pipe, arguments, size)
    try:
        needs = estimate(pipe, arguments, size)
    except NotImplementedError as why:
        _print_status(f"memory: no estimate: {one_line(why)}")
        return

    def used_at(size: tuple[int, int]) -> dict[str, bool]:
        tiling = _vae_tiling(options)
        return {
            "tiled": needs_tiling(pipe, size, 1) if tiling is None else tiling,
            "split": options.low_memory or options.split_guidance,
            "offloaded": is_offloaded(pipe),
        }

    used = used_at(size)
    peak, available = needs.peak(**used), available_bytes(pipe._execution_device)
    if available is None:
        _print_status(f"memory: this run needs about {format_gib(peak)}")
    elif peak > available:
        advice = needs.advice(available, **used)
        problem = f"this run needs about {format_gib(peak)}; {format_gib(available)} are available; {advice}"
        if not options.force:
            fits = describe_fit(fitting_size(pipe, arguments, size, available, used_at))
            raise UsageError(f"{problem}; {fits}; --force runs it all the same")
        _print_status(f"memory: {problem}")
    else:
        _print_status(f"memory: this run needs about {format_gib(peak)}; {format_gib(available)} are available")
        if pipe._execution_device.type == "cpu" and MEMORY_HEADROOM * peak <= available:
            keep_freed_memory()


def _vae_tiling(options: Namespace) -> bool | None:
    """Whether to tile the autoencoder. --vae-tiling and --no-vae-tiling take precedence over --low-memory."""
    tiling: bool | None = options.vae_tiling
    return True if tiling is None and options.low_memory else tiling


@contextmanager
def _stage_saver(
    pipe: Any, options: Namespace, job: Job, run_metadata: Mapping[str, Any]
) -> Iterator[tuple[Callable[[Stage], None], list[Path]]]:
    """Yield a function that saves a finished stage with its metadata, and the list of files written; print the list on Ctrl-C."""
    written: list[Path] = []
    if pipe._execution_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe._execution_device)

    def save(stage: Stage) -> None:
        last = stage.index == stage.of
        path = job.out if last else job.out.with_name(f"{job.out.stem}.stage{stage.index}-{stage.height}x{stage.width}.png")
        save_png(
            stage.images[0], path, metadata={**_metadata(pipe, options, job, stage.settings), **run_metadata, **_stage_metadata(stage)}
        )
        written.append(path)

    try:
        yield save, written
    except KeyboardInterrupt:
        _print_status("interrupted; files written: " + (", ".join(map(str, written)) or "none"))
        raise
    _preview_path(job).unlink(missing_ok=True)


def _print_result(result: Result, job: Job, options: Namespace) -> float:
    """Print the file, size, time and memory of a finished picture, as JSON too with --json; return the seconds."""
    last, seconds = result.stages[-1], sum(stage.seconds for stage in result.stages)
    _print_status(f"{job.out}: {last.height} x {last.width} in {seconds:.1f} s, peak memory {_peak_memory(last.latents.device)}")
    if options.json:
        summary = {"file": str(job.out), "prompt": job.prompt, "seed": job.seed, "seconds": round(seconds, 3)}
        stages = [_stage_metadata(stage) for stage in result.stages]
        print(json.dumps({**summary, "settings": asdict(result.settings), "stages": stages}, ensure_ascii=False), flush=True)
    return seconds


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
        **guidance_argument(pipe, settings.guidance_scale),
    ).images[0]
    direct_seconds = time.perf_counter() - since
    again = {"generator": torch.Generator().manual_seed(job.seed), "attention": "full", "workdir": None, "on_step": None}
    full = generate(pipe, job.prompt, height=final.height, width=final.width, sizes=options.sizes, **{**run_arguments, **again})
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


def _metadata(pipe: Any, options: Namespace, job: Job, settings: Settings) -> dict[str, Any]:
    """The metadata of a picture: with the same machine, versions and threads, it can be reproduced from them."""
    return {
        "prompt": job.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": job.seed,
        "model": options.model,
        "preset": options.preset,
        "scheduler": type(pipe.scheduler).__name__,
        "timestep_spacing": pipe.scheduler.config.get("timestep_spacing"),
        "vae": {"tiling": _vae_tiling(options), "attention": options.vae_attention},
        "split_guidance": options.low_memory or options.split_guidance,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": _device_name(pipe),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("scalediff", "torch", "diffusers", "transformers")},
    }


def _stage_metadata(stage: Stage) -> dict[str, Any]:
    place = f"{stage.index}/{stage.of}"
    return {"stage": place, "height": stage.height, "width": stage.width, "steps": stage.steps, "seconds": round(stage.seconds, 3)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _peak_memory(device: torch.device) -> str:
    """Peak memory of the process, or of the GPU if the picture was generated on one."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {torch.cuda.get_device_name(device)}"
    try:
        import resource
    except ImportError:  # Windows has no such module
        return "unknown on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


def _device_name(pipe: Any) -> str:
    device = pipe._execution_device
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"


def _print_status(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
