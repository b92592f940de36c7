"""Time and memory of a device: what `bench.cascade.watch` measures with."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Marks in time: events in a GPU's stream, the host's clock on a CPU. Call `wait` before asking for the seconds between two."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1000 if self._cuda else last - first

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Memory:
    """Bytes in use now and at most since the last `reset`: what torch has allocated on a GPU, the process's resident set on a CPU.

    None where the system does not report it: outside Linux, or where its peak cannot be reset.
    """

    def __init__(self, device: str) -> None:
        self._cuda, self._known = device == "cuda", True

    def reset(self) -> None:
        """Start the peak again."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._known = False

    def now(self) -> int | None:
        return torch.cuda.memory_allocated() if self._cuda else self._resident("VmRSS")

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._cuda else self._resident("VmHWM")

    def _resident(self, name: str) -> int | None:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE) if self._known else None
        return 1024 * int(found[1]) if found else None
