"""The device while it is measured: memory that is given back, and what is lost when a call fails."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch


def device_lost(device: str) -> bool:
    """Whether this process can use the GPU no more, as after an illegal access."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.empty(1, device=device)
    except RuntimeError as error:
        return not isinstance(error, torch.OutOfMemoryError)
    return False


def forget(device: str) -> None:
    """Free memory that nothing references, and return it to the system and the device."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def first_line(problem: Exception) -> str:
    """The first line of its message, cut to 200 characters."""
    return (str(problem).splitlines() or [""])[0][:200]


def broken(problem: Exception, device: str) -> dict[str, str]:
    """Status and note of a row that raised: "error", or "FAILED", which is not tried again, where the device was lost."""
    status = "FAILED" if device_lost(device) else "error"
    return {"status": status, "note": f"{type(problem).__name__}: {first_line(problem)}"}
