"""What the commands that draw tell about a picture: lines on stderr, JSON, and the metadata in the file."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scalediff.cascade.describing import describe_run, describe_stage
from scalediff.draw import Result
from scalediff.settings import Settings


@dataclass(frozen=True)
class Job:
    """One picture to generate: prompt, seed and output file."""

    prompt: str
    seed: int
    out: Path


def print_status(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_result(result: Result, options: Namespace, job: Job) -> float:
    """Print the file, size, time and memory of a finished picture, as JSON too with --json; return the seconds."""
    last, seconds = result.stages[-1], sum(stage.seconds for stage in result.stages)
    print_status(f"{job.out}: {last.height} x {last.width} in {seconds:.1f} s, peak memory {_peak_memory(last.latents.device)}")
    if options.json:
        summary = {"file": str(job.out), "prompt": job.prompt, "seed": job.seed, "seconds": round(seconds, 3)}
        stages = [describe_stage(stage) for stage in result.stages]
        print(json.dumps({**summary, "settings": asdict(result.settings), "stages": stages}, ensure_ascii=False), flush=True)
    return seconds


def picture_metadata(pipe: Any, options: Namespace, job: Job, settings: Settings) -> dict[str, Any]:
    """The metadata of a picture from the options of the command."""
    return describe_run(
        pipe,
        settings,
        prompt=job.prompt,
        negative_prompt=options.negative_prompt,
        seed=job.seed,
        model=options.model,
        preset=options.preset,
        vae_tiling=vae_tiling(options),
        vae_attention=options.vae_attention,
        split_guidance=options.low_memory or options.split_guidance,
        upsampler=None if options.upsampler is None else Path(options.upsampler).name,
    )


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


def vae_tiling(options: Namespace) -> bool | None:
    """Whether to tile the autoencoder. --vae-tiling and --no-vae-tiling take precedence over --low-memory."""
    tiling: bool | None = options.vae_tiling
    return True if tiling is None and options.low_memory else tiling
