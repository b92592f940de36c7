"""What the command line does, once its arguments are parsed."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scalediff.cascade import Stage
from scalediff.demo import load_demo
from scalediff.draw import Result, generate, upscale
from scalediff.families import FAMILIES
from scalediff.flops import count
from scalediff.pictures import check_writable, open_picture, read_metadata, save_png, side_by_side
from scalediff.pipelines import native_size, stage_sizes
from scalediff.settings import Settings

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The schedulers that high-resolution stages know, by their usual short names.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_SWITCHES = ("steps", "restart", "guidance_scale", "attention", "lfm", "sg", "lfm_cutoff", "sg_cutoff")


class UsageError(Exception):
    """Bad input in one line; the command ends with exit code 2."""


def generate_picture(options: Namespace) -> None:
    """Draw, save every stage as it ends, and compare if asked; an interruption says which files are there."""
    out: Path = options.out or Path(f"{_slug(options.prompt)}-{options.seed}.png")
    check_writable(out)
    pipe = load_model(options.model, device=options.device, dtype=options.dtype, scheduler=options.scheduler)
    native = native_size(pipe)
    height, width = options.size or (4 * native[0], 4 * native[1])
    sizes = stage_sizes(pipe, height, width)
    _say(f"{' -> '.join(f'{h} x {w}' for h, w in sizes)}, seed {options.seed}, {_device_name(pipe)}")
    told = {"sizes": [f"{h}x{w}" for h, w in sizes]}
    with _saved(pipe, options, out, told) as (keep, written):
        result = _draw(pipe, options, height, width, on_stage=keep)
        seconds = _tell(result, out)
        if options.compare:
            path = out.with_name(f"{out.stem}.compare.png")
            panels = _compare(pipe, options, result, seconds)
            metadata = _metadata(pipe, options, result.settings) | told | {"kind": "comparison", "panels": list(panels)}
            save_png(side_by_side(list(panels.values()), list(panels)), path, metadata=metadata)
            written.append(path)
            _say(f"{path}: {' | '.join(panels)}")


def upscale_picture(options: Namespace) -> None:
    """Enlarge, save every stage as it ends; an interruption says which files are there."""
    out: Path = options.out or Path(f"{options.file.stem}-{options.seed}.png")
    if out.resolve() == options.file.resolve():
        raise UsageError(f"--out must be another file than the picture itself, got {out}")
    check_writable(out)
    image = open_picture(options.file)
    pipe = load_model(options.model, device=options.device, dtype=options.dtype, scheduler=options.scheduler)
    height, width = options.size or (2 * image.height, 2 * image.width)
    _say(f"{image.height} x {image.width} -> {height} x {width}, seed {options.seed}, {_device_name(pipe)}")
    told = {"picture": options.file.name, "picture_size": f"{image.height}x{image.width}"}
    with _saved(pipe, options, out, told) as (keep, _):
        _tell(upscale(pipe, image, options.prompt, height=height, width=width, **_how(options), on_stage=keep), out)


@contextmanager
def _saved(pipe: Any, options: Namespace, out: Path, told: Mapping[str, Any]) -> Iterator[tuple[Callable[[Stage], None], list[Path]]]:
    """What saves a stage, with what is told of the run, when it ends, and the files so far; an interruption names them."""
    written: list[Path] = []

    def keep(stage: Stage) -> None:
        last = stage.index == stage.of
        path = out if last else out.with_name(f"{out.stem}.stage{stage.index}-{stage.height}x{stage.width}.png")
        save_png(stage.images[0], path, metadata={**_metadata(pipe, options, stage.settings), **told, **_of_stage(stage)})
        written.append(path)

    try:
        yield keep, written
    except KeyboardInterrupt:
        _say("interrupted; finished: " + (", ".join(map(str, written)) or "nothing yet"))
        raise


def _tell(result: Result, out: Path) -> float:
    """Say what has been drawn; returns its seconds."""
    last, seconds = result.stages[-1], sum(stage.seconds for stage in result.stages)
    _say(f"{out}: {last.height} x {last.width} in {seconds:.1f} s, peak memory {_peak_memory()}")
    return seconds


def show_plan(options: Namespace) -> None:
    """Print the work of every stage, as a table or as JSON."""
    try:
        settings, rows = count(options.model, options.size, attention=options.attention)
    except ImportError as error:
        raise UsageError(f'counting needs diffusers: pip install "scalediff[diffusers]" ({error})') from error
    parts = ("attention", "linear", "convolution", "vae", "total")
    if options.json:
        stages = [asdict(row) | {"total": row.total} for row in rows]
        print(json.dumps({"model": options.model, "unit": "TFLOP", "settings": asdict(settings), "stages": stages}, indent=2))
        return
    print(f"{options.model}, TFLOPs by stage; attention above the native size: {options.attention}")
    print(f"{'pixels':>13} {'steps':>6} {'passes':>7}" + "".join(f"{part:>13}" for part in parts))
    for row in rows:
        print(
            f"{row.height:>5} x {row.width:<5} {row.steps:>6} {row.passes:>7}" + "".join(f"{getattr(row, part):>13.1f}" for part in parts)
        )
    whole = {part: sum(getattr(row, part) for row in rows) for part in parts}
    print(f"{'all':>28}" + "".join(f"{whole[part]:>13.1f}" for part in parts))
    print(f"{'share':>28}" + "".join(f"{whole[part] / whole['total']:>13.1%}" for part in parts))


def show_models(options: Namespace) -> None:
    """Print the known denoisers: those that the cascade draws with, those whose attention is patched, and the refused."""
    known = [family for family in FAMILIES.values() if not family.refusal]
    width = max(len(family.denoiser) for family in known)
    for family in known:
        print(f"{family.denoiser:<{width}}  {'cascade and attention' if family.cascade else 'attention'}; text: {family.text}")
    print(f"refused, with the reason: {', '.join(name for name, family in FAMILIES.items() if family.refusal)}")
    print("any other module: patch_model(module, grid=, text=, window=); see docs/models.md")


def show_info(options: Namespace) -> None:
    """Print the metadata of a picture as JSON."""
    print(json.dumps(read_metadata(options.file), indent=2, ensure_ascii=False))


def load_model(name: str, *, device: str, dtype: str, scheduler: str | None = None) -> Any:
    """The embedded model ("demo"), a pipeline folder or a Hugging Face model id, on a device.

    Raises:
        UsageError: diffusers is missing, there is no such model, or no such device.
    """
    try:
        import diffusers
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise UsageError(f'drawing needs diffusers and transformers: pip install "scalediff[diffusers]" ({error})') from error
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place = _device(device)
    if dtype == "auto":
        dtype = "fp32" if place.type == "cpu" or name == "demo" else "bf16"
    try:
        pipe = load_demo() if name == "demo" else diffusers.DiffusionPipeline.from_pretrained(name, dtype=_DTYPES[dtype])
    except Exception as error:  # foreign code on a foreign folder: whatever it stumbles over, the model could not be had
        if os.environ.get("SCALEDIFF_DEBUG"):
            raise
        raise UsageError(
            f"--model must be demo, a pipeline folder or a model id that can be reached, got {name!r}: {one_line(error)}"
        ) from error
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    return pipe.to(place, _DTYPES[dtype])


def _device(name: str) -> torch.device:
    """A device that can hold a tensor; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch built without CUDA asserts
        raise UsageError(f"--device must be a device of this machine, got {name!r}: {one_line(error)}") from error
    return device


def _draw(pipe: Any, options: Namespace, height: int, width: int, **changes: Any) -> Result:
    return generate(pipe, options.prompt, height=height, width=width, **{**_how(options), **changes})


def _how(options: Namespace) -> dict[str, Any]:
    """Arguments that drawing and enlarging share."""
    return {name: getattr(options, name) for name in (*_SWITCHES, "negative_prompt")} | {
        "generator": torch.Generator().manual_seed(options.seed),
        "progress": not options.quiet,
        "workdir": options.workdir,
    }


def _compare(pipe: Any, options: Namespace, result: Result, seconds: float) -> dict[str, Any]:
    """Label to picture: direct inference, the cascade with full attention, and the result, each with its time."""
    final, settings = result.stages[-1], result.settings
    pipe.set_progress_bar_config(desc=f"direct  {final.height} x {final.width}", disable=options.quiet)
    since = time.perf_counter()
    direct = pipe(
        options.prompt,
        negative_prompt=options.negative_prompt,
        height=final.height,
        width=final.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    direct_seconds = time.perf_counter() - since
    full = _draw(pipe, options, final.height, final.width, attention="full", workdir=None)
    full_seconds = sum(stage.seconds for stage in full.stages)
    return {
        f"direct {direct_seconds:.1f} s": direct,
        f"full attention {full_seconds:.1f} s": full.images[0],
        f"{_name(settings)} {seconds:.1f} s": result.images[0],
    }


def _name(settings: Settings) -> str:
    """ScaleDiff, or which of its parts were switched off."""
    off = [name for name, on in (("NPA", settings.attention == "npa"), ("LFM", settings.lfm), ("SG", settings.sg)) if not on]
    return "ScaleDiff" + (f" without {', '.join(off)}" if off else "")


def _metadata(pipe: Any, options: Namespace, settings: Settings) -> dict[str, Any]:
    """What made a picture; the same machine, versions and threads make it again."""
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "model": options.model,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": _device_name(pipe),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("scalediff", "torch", "diffusers", "transformers")},
    }


def _of_stage(stage: Stage) -> dict[str, Any]:
    place = f"{stage.index}/{stage.of}"
    return {"stage": place, "height": stage.height, "width": stage.width, "steps": stage.steps, "seconds": round(stage.seconds, 3)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _peak_memory() -> str:
    """Of the process, or of the device where the picture was made on one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on {torch.cuda.get_device_name()}"
    try:
        import resource
    except ImportError:  # Windows has no such module
        return "unknown on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


def _device_name(pipe: Any) -> str:
    return torch.cuda.get_device_name() if pipe.device.type == "cuda" else f"{pipe.device.type}, {torch.get_num_threads()} threads"


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
