"""Helpers for kernel launches: a kernel with its arguments, the device's name, and whether it can run the kernels."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, which can be run, or compiled for a device that is not present.

    Attributes:
        kernel: The Triton kernel.
        programs: Number of programs.
        arguments: Arguments of the kernel, by name.
        config: The launch configuration.
        then: A second launch that runs afterwards, on the output of the first.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Any
    then: Launch | None = None

    def run(self) -> None:
        """Run the kernel, and then the second launch."""
        self.kernel[(self.programs,)](**self.arguments)
        if self.then is not None:
            self.then.run()


def device_name(device: torch.device) -> str:
    """Name of a GPU architecture, such as `"sm_90"` or `"gfx942"`. The CPU, for Triton's interpreter, counts as `"sm_80"`."""
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"the kernel needs a CUDA or ROCm device (or TRITON_INTERPRET=1 to try it slowly on the CPU), got {device=}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the kernel needs compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Make a GPU the current device for a launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_triton() -> bool:
    """Whether the triton package is installed."""
    return find_spec("triton") is not None
