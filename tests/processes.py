"""Several processes with gloo on the CPU.

They are started from a server that has imported the heavy modules once. A process that fails ends the others.
"""

from __future__ import annotations

import datetime
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch import multiprocessing as processes


def start(work: Callable[[], Any], world: int, folder: Path, *, imported: Iterable[str] = ()) -> Any:
    """Start `world` processes that form a group, run `work` and save what it returns in the folder; torch's context of them."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed.device_mesh", *imported])
    return processes.start_processes(_work, (world, work, folder), world, join=False, start_method="forkserver")


def run(
    work: Callable[[], Any], world: int, folder: Path, *, imported: Iterable[str] = (), seconds: float = 180, grace: float | None = None
) -> list[Any]:
    """What `work` returns in each of `world` processes. Raises the first error of any process, or TimeoutError.

    `grace`: Seconds that the others have to end by themselves once a process has failed.
    """
    started = start(work, world, folder, imported=imported)
    deadline = time.monotonic() + seconds
    try:
        while not started.join(timeout=1.0, grace_period=grace):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} processes did not finish in {seconds} s")
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, work: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    where, limit = f"file://{folder / 'meeting'}", datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)
    torch.save(work(), folder / f"{rank}.pt")
    distributed.destroy_process_group()
