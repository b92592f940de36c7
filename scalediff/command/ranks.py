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
from scalediff_kernels.distributed.groups import broadcast, check_agreement


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
    """The pictures that this process draws: its share, or all that the processes draw together; with --skip-existing, the missing ones.

    Of pictures that they draw together, rank 0, which saves them, says which are missing: the others may not see its folder.

    Raises:
        ValueError: Processes that draw together have different numbers of pictures.
        LostRankError: A process that draws together with this one has ended.
    """
    here = place()
    mine = list(jobs if options.split_picture else jobs[here.rank :: here.world])
    missing = [job for job in mine if not job.out.exists()] if options.skip_existing else mine
    if options.split_picture and options.skip_existing:
        everyone = distributed.group.WORLD
        check_agreement(everyone, {"the number of pictures": str(len(mine))})
        missing = [mine[i] for i in broadcast([mine.index(job) for job in missing], everyone)]
    if len(missing) < len(jobs):
        print_status(f"rank {here.rank} of {here.world}: {len(missing)} of {len(jobs)} pictures, {len(mine) - len(missing)} are there")
    return missing


def check_together(options: Namespace) -> None:
    """Check what --split-picture does not support.

    Raises:
        UsageError: The options have it, or there is one process alone.
    """
    if not options.split_picture:
        return
    if options.workdir is not None:
        raise UsageError("--workdir is not supported with --split-picture: processes that end at different stages could not go on together")
    if getattr(options, "compare", False) or getattr(options, "method", "scalediff") != "scalediff":  # `upscale` has neither
        raise UsageError("--split-picture is for ScaleDiff alone: leave out --compare and --method")
    if place().world == 1:
        raise UsageError("--split-picture needs several processes: start them with torchrun --nproc-per-node N -m scalediff ...")


@contextmanager
def process_group(options: Namespace) -> Iterator[None]:
    """The process group of all processes, with --split-picture, for messages between their own GPUs.

    It is ended only if nothing failed: where a process is lost, some backends wait for it.
    """
    started = options.split_picture and not distributed.is_initialized()
    if started:
        if (device := device_name(options)).startswith("cuda:"):
            torch.cuda.set_device(device)
        distributed.init_process_group()
    yield
    if started:
        distributed.destroy_process_group()


@contextmanager
def drawing_together(options: Namespace, pipe: Any) -> Iterator[bool]:
    """Split the pipeline's pictures over all processes, with --split-picture; yields whether this process saves the pictures."""
    if not options.split_picture:
        yield True
        return
    with patch_model(pipe, mesh=distributed.group.WORLD):
        yield place().rank == 0
