"""Models for the command line."""

from __future__ import annotations

import os
from typing import Any

import torch

from scalediff.demo import load_demo

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The schedulers that high-resolution stages know, by their usual short names.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class UsageError(Exception):
    """Bad input in one line; the command ends with exit code 2."""


def load_model(
    name: str, *, device: str, dtype: str, scheduler: str | None = None, spacing: str | None = None, low_memory: bool = False
) -> Any:
    """The embedded model ("demo"), a pipeline folder or a Hugging Face model id, on a device.

    With `low_memory`, on a GPU, a component is there only while it works.

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
    place = parse_device(device)
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
    if scheduler is not None or spacing is not None:
        kind = getattr(diffusers, SCHEDULERS[scheduler]) if scheduler is not None else type(pipe.scheduler)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **({"timestep_spacing": spacing} if spacing is not None else {}))
    if not low_memory or place.type == "cpu":
        try:
            return pipe.to(place, _DTYPES[dtype])
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"the weights of {name} do not fit on {place}: --low-memory, or a smaller --dtype") from error
    pipe.to(dtype=_DTYPES[dtype])
    pipe.enable_model_cpu_offload(device=place)
    return pipe


def parse_device(name: str) -> torch.device:
    """A device that can hold a tensor; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch built without CUDA asserts
        raise UsageError(f"--device must be a device of this machine, got {name!r}: {one_line(error)}") from error
    return device


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
