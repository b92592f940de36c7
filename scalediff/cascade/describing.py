"""What a picture's metadata says about the run that made it."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from scalediff.cascade.results import Stage
from scalediff.settings import Attention, Settings


def describe_run(
    pipe: Any,
    settings: Settings,
    *,
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    model: str,
    preset: str,
    vae_tiling: bool | None,
    vae_attention: Attention,
    split_guidance: bool,
    upsampler: str | None = None,
) -> dict[str, Any]:
    """The metadata of a run: with the same machine, versions and threads, its picture can be reproduced from them.

    Args:
        pipe: The pipeline, with its own scheduler.
        settings: The settings of the run.
        prompt, negative_prompt, seed: What the picture was drawn from.
        model: The name that the pipeline was loaded by.
        preset: The name of the preset.
        vae_tiling, vae_attention, split_guidance: As in `generate`.
        upsampler: The name of the network that enlarged the stages' pictures; None for bicubic interpolation.
    """
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "model": model,
        "preset": preset,
        "scheduler": type(pipe.scheduler).__name__,
        "timestep_spacing": pipe.scheduler.config.get("timestep_spacing"),
        "vae": {"tiling": vae_tiling, "attention": vae_attention},
        "split_guidance": split_guidance,
        "upsampler": upsampler,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": device_name(pipe),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in ("scalediff", "torch", "diffusers", "transformers")},
    }


def describe_stage(stage: Stage) -> dict[str, Any]:
    """The metadata of one stage."""
    place = f"{stage.index}/{stage.of}"
    return {"stage": place, "height": stage.height, "width": stage.width, "steps": stage.steps, "seconds": round(stage.seconds, 3)}


def device_name(pipe: Any) -> str:
    """The GPU's name, or the kind of device with the number of torch's threads."""
    device = pipe._execution_device
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def package_version(package: str) -> str:
    """The version of an installed package, which its own metadata holds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
