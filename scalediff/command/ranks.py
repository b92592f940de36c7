"""The processes that torchrun starts: they share the pictures out, or draw every picture together."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import distributed

from scalediff.command.loading import UsageError
from scalediff.command.reporting import Job, print_status
from scalediff.patch import patch_model


class Place(NamedTuple):
    """Number of this process among `world`, and its number on its machine; `local` is None if torchrun did not start it."""

    rank: int
    world: int
    local: int | None


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place, from the variables that torchrun sets.

    Raises:
        UsageError: They are not numbers, or the rank is not below the number of processes.
    """
    texts = [environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK must be those of torchrun, got {', '.join(texts)}")
    rank, world, local = map(int, texts)
    return Place(rank, world, local if "LOCAL_RANK" in environment else None)


def device_name(options: Namespace) -> str:
    """The value of --device; under torchrun `auto` is the process's own GPU."""
    name: str = options.device
    local = place().local
    return f"cuda:{local}" if name == "auto" and local is not None and torch.cuda.is_available() else name


def check_one_process(command: str, advice: str = "`scalediff generate` shares pictures out") -> None:
    """Check that torchrun has not started several processes of a command that does not share its work out.

    Raises:
        UsageError: It has: all of them would draw the same pictures into the same files. The message ends in the advice.
    """
    world = place().world
    if world > 1:
        raise UsageError(f"scalediff {command} runs in one process; under torchrun, {advice}, got WORLD_SIZE={world}")


def own_jobs(options: Namespace, jobs: Sequence[Job]) -> list[Job]:
    """The pictures that this process draws: its share, or all that the processes draw together; with --skip-existing, the missing ones."""
    here = place()
    mine = list(jobs if options.split_picture else jobs[here.rank :: here.world])
    check_split(options)
    missing = [job for job in mine if not job.out.exists()] if options.skip_existing else mine
    if len(missing) < len(jobs):
        print_status(f"rank {here.rank} of {here.world}: {len(missing)} of {len(jobs)} pictures, {len(mine) - len(missing)} are there")
    return missing


def check_split(options: Namespace) -> None:
    """Check that --split-picture, if it is given, comes without --workdir; raises a UsageError."""
    if options.split_picture and options.workdir is not None:
        raise UsageError("--workdir is not supported with --split-picture: processes that end at different stages could not go on together")


@contextmanager
def drawing_together(options: Namespace, pipe: Any) -> Iterator[bool]:
    """Split the pipeline's pictures over all processes, with --split-picture; yields whether this process saves the pictures."""
    here = place()
    if not options.split_picture:
        yield True
        return
    if here.world == 1:
        raise UsageError("--split-picture needs several processes: start them with torchrun --nproc-per-node N -m scalediff ...")
    if pipe._execution_device.type == "cuda":
        torch.cuda.set_device(pipe._execution_device)
    started = not distributed.is_initialized()
    if started:
        distributed.init_process_group()
    try:
        with patch_model(pipe, mesh=distributed.group.WORLD):
            yield here.rank == 0
    finally:
        if started:
            distributed.destroy_process_group()
