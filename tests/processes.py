"""Several processes with gloo on the CPU.

They are started from a server that has imported the heavy modules once. A process that fails ends the others.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import signal
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


def run(work: Callable[[], Any], world: int, folder: Path, *, imported: Iterable[str] = (), seconds: float = 600) -> list[Any]:
    """What `work` returns in each of `world` processes. Raises the first error of any process, or TimeoutError."""
    started = start(work, world, folder, imported=imported)
    deadline = time.monotonic() + seconds
    try:
        while not started.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} processes did not finish in {seconds} s")
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def said_of_a_loss(
    work: Callable[[Callable[[], None]], Any], world: int, folder: Path, *, imported: Iterable[str] = (), code: int = -signal.SIGKILL
) -> dict[int, tuple[type[Exception], str]]:
    """What `work` raises when process 1 calls the function that it is given, which ends it by SIGKILL, or ends with another exit code.

    All others must end with an error within 30 s of that, before a collective that waits for the process fails by its own limit.
    """
    started = start(functools.partial(_until_lost, work, folder), world, folder, imported=imported)
    try:
        started.processes[1].join(300)
        deadline = time.monotonic() + 30
        for process in started.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in started.processes] == [code if i == 1 else 1 for i in range(world)]
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
    files = {rank: folder / f"said {rank}.pt" for rank in range(world)}
    return {rank: torch.load(file, weights_only=False) for rank, file in files.items() if rank != 1 or file.exists()}


def _until_lost(work: Callable[[Callable[[], None]], Any], folder: Path) -> None:
    rank = distributed.get_rank()
    try:
        work(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)
    except Exception as error:
        torch.save((type(error), str(error)), folder / f"said {rank}.pt")
        raise


def _work(rank: int, world: int, work: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    where, limit = f"file://{folder / 'meeting'}", datetime.timedelta(seconds=300)
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)
    torch.save(work(), folder / f"{rank}.pt")
    distributed.destroy_process_group()
