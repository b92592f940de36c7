"""Load a pipeline for the command line."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

from scalediff.demo import load_demo

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The schedulers that high-resolution stages support, by common short names.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_FLOW = ("flow-euler", "flow-heun")


class UsageError(Exception):
    """Invalid input. The command prints the message, one line, and exits with code 2."""


def load_model(
    name: str, *, device: str, dtype: str, scheduler: str | None = None, spacing: str | None = None, low_memory: bool = False
) -> Any:
    """Load a pipeline.

    Args:
        name: `"demo"` for the embedded model, a pipeline folder, or a Hugging Face model id.
        device: `"auto"` or a torch device.
        dtype: `"auto"`, `"fp32"`, `"fp16"` or `"bf16"`.
        scheduler: A key of `SCHEDULERS`; the model's scheduler when None.
        spacing: `timestep_spacing` of the scheduler; unchanged when None.
        low_memory: On a GPU, keep each component on the device only while it is in use.

    Raises:
        UsageError: diffusers is missing, the model or device does not exist, the scheduler is for flow models and the model is none, or a
            spacing is given and the scheduler has none.
        torch.OutOfMemoryError: The weights do not fit on the device.
    """
    try:
        import diffusers
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise UsageError(f'this command needs diffusers and transformers: pip install "scalediff[diffusers]" ({error})') from error
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch_device = parse_device(device)
    if dtype == "auto":
        dtype = "fp32" if torch_device.type == "cpu" or name == "demo" else "bf16"
    try:
        pipe = load_demo() if name == "demo" else diffusers.DiffusionPipeline.from_pretrained(name, dtype=_DTYPES[dtype])
    except Exception as error:  # diffusers may raise anything here; in every case the model cannot be loaded
        if os.environ.get("SCALEDIFF_DEBUG"):
            raise
        raise UsageError(
            f"--model must be demo, a pipeline folder or the id of an accessible model, got {name!r}: {_why_not_loaded(name, error)}"
        ) from error
    if scheduler is not None or spacing is not None:
        prediction_type = pipe.scheduler.config.get("prediction_type", "flow_prediction")
        if scheduler in _FLOW and prediction_type != "flow_prediction":
            raise UsageError(f"--scheduler {scheduler} is for flow models, got {name} with {prediction_type=}")
        kind = getattr(diffusers, SCHEDULERS[scheduler]) if scheduler is not None else type(pipe.scheduler)
        if spacing is not None and "timestep_spacing" not in inspect.signature(kind).parameters:
            raise UsageError(f"{kind.__name__} has no timestep spacing, got --timestep-spacing {spacing}")
        options: dict[str, Any] = {"timestep_spacing": spacing} if spacing is not None else {}
        if scheduler == "pndm":
            options["skip_prk_steps"] = True  # as Stable Diffusion has it; high-resolution stages need it
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    if not low_memory or torch_device.type == "cpu":
        try:
            return pipe.to(torch_device, _DTYPES[dtype])
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the weights of {name} do not fit on {torch_device}: use --low-memory or a smaller --dtype"
            ) from error
    pipe.to(dtype=_DTYPES[dtype])
    pipe.enable_model_cpu_offload(device=torch_device)
    return pipe


def _why_not_loaded(name: str, error: BaseException) -> str:
    """One line: the cause that diffusers' error names, instead of its advice for callers from Python and for readers of a traceback."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):  # its first paragraph is the HTTP status
        sentences = str(cause).partition("\n\n")[2].split()
        return f"the hub does not give it: {' '.join(sentences) or one_line(cause)}"
    if isinstance(error, OSError) and cause is not error and not os.path.exists(name):
        fetch = f"`hf download {name}` puts it there where the hub can be reached"
        return f"it is not in the Hugging Face cache, and fetching it failed with: {one_line(cause).rstrip('.')}; {fetch}"
    return one_line(cause)


def parse_device(name: str) -> torch.device:
    """The torch device with this name, checked to work; `"auto"` is the GPU if there is one.

    Raises:
        UsageError: The device does not exist or does not work.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA raises AssertionError
        raise UsageError(f"--device must be a device of this machine, got {name!r}: {one_line(error)}") from error
    return device


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
