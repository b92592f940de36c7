"""What every kernel's launch needs: the device by name, why it cannot run, and one kernel with its arguments."""

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
    """One kernel with everything it is called with: run it, or compile it for a device that is not there.

    `then`: what runs after it, on what it wrote.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Any
    then: Launch | None = None

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments)
        if self.then is not None:
            self.then.run()


def device_name(device: torch.device) -> str:
    """`"sm_90"` or `"gfx942"`; the interpreter runs on the CPU and stands for a GPU without descriptors."""
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in words; None where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"the kernel needs a CUDA or ROCm device (or TRITON_INTERPRET=1 to try it slowly on the CPU), got {device=}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the kernel needs compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Make a GPU the current one for a launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_triton() -> bool:
    return find_spec("triton") is not None
