"""Marks in time and bytes in memory, on CPUs and GPUs alike."""

from __future__ import annotations

import ctypes
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks in time, and seconds between them; `wait` before asking."""

    def mark(self) -> Any: ...

    def seconds(self, first: Any, last: Any) -> float: ...

    def wait(self) -> None: ...


class HostClock:
    """Of a CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def wait(self) -> None:
        pass


class DeviceClock:
    """Of a GPU: events in its stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return float(first.elapsed_time(last)) / 1000

    def wait(self) -> None:
        torch.cuda.synchronize()


class Memory:
    """Bytes of a device: what is there, and the most there was since the last `reset`; None where the system does not tell.

    On a GPU what torch has allocated; on a CPU the resident set of the process, libraries and all, and what the allocator has kept since
    the last `give_back`.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def give_back(self) -> None:
        """What the allocator of a CPU's process keeps, to the system."""
        if self._device == "cpu":
            with suppress(OSError, AttributeError):  # glibc's alone
                ctypes.CDLL(None).malloc_trim(0)

    def reset(self) -> None:
        """The peak begins again."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set begins again
        except OSError:
            self._device = "unknown"

    def now(self) -> int | None:
        return int(torch.cuda.memory_allocated()) if self._device == "cuda" else self._resident("VmRSS")

    def peak(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self._device == "cuda" else self._resident("VmHWM")

    def _resident(self, name: str) -> int | None:
        told = Path("/proc/self/status")
        found = re.search(rf"^{name}:\s*(\d+) kB", told.read_text(), re.MULTILINE) if self._device == "cpu" and told.exists() else None
        return 1024 * int(found[1]) if found else None
