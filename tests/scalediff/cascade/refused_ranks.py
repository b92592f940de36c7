"""Runs that are refused on all ranks before anything is drawn, and what a rank needs."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import distributed

import scalediff
from scalediff.cascade import fitting
from scalediff.cascade.memory import first_denoiser_call
from scalediff.cascade.pipeline import preset
from scalediff.command.loading import UsageError
from scalediff.command.reporting import Job
from scalediff.command.runs import print_memory_estimate
from tests.scalediff.cascade.drawn_ranks import draw_demo
from tests.scalediff.cost.real_peaks import real_peak_of

ARGUMENTS = {"prompt": "a moon", "guidance_scale": 1.5}
LARGE = (256, 128)  # pixels


def uneven_stages() -> dict[str, str]:
    """What is said of stages whose rows two ranks cannot share out, of two sizes; and whether anything was drawn."""
    pipe, said = scalediff.load_demo(), dict[str, str]()
    pipe.unet.register_forward_pre_hook(lambda module, args: said.update(drawn="the U-Net was called"))
    runs: dict[str, dict[str, Any]] = {"last": {"height": 104}, "middle": {"width": 128, "sizes": [(64, 64), (104, 104), (128, 128)]}}
    for name, how in runs.items():
        try:
            draw_demo(pipe, mesh=distributed.group.WORLD, **how)
        except ValueError as error:
            said[name] = str(error)
    return said


def little_memory() -> dict[str, str]:
    """What is said where one rank has too little memory, also if the other is forced, or a device that could not hold the picture."""
    pipe, rank, said = scalediff.load_demo(), distributed.get_rank(), dict[str, str]()
    before = fitting.available_bytes, fitting.total_bytes
    command = Namespace(negative_prompt=None, vae_tiling=None, vae_attention="full", low_memory=False, split_guidance=False)
    command.split_picture, command.force = True, False
    try:
        fitting.available_bytes = lambda device: 2**20 if rank == 1 else 2**50
        for name, force in (("refused", False), ("forced on another", rank == 0)):
            try:
                draw_demo(pipe, mesh=distributed.group.WORLD, force=force)
            except ValueError as error:
                said[name] = str(error)
        try:
            print_memory_estimate(pipe, command, Job("a moon", 0, None), LARGE, preset(pipe))  # type: ignore[arg-type]
        except UsageError as error:
            said["command"] = str(error)
        fitting.available_bytes, fitting.total_bytes = (lambda device: 2**30), (lambda device: 2**10 if rank == 1 else 2**50)
        try:
            draw_demo(pipe, mesh=distributed.group.WORLD)
        except ValueError as error:
            said["impossible"] = str(error)
    finally:
        fitting.available_bytes, fitting.total_bytes = before
    return said


def memory_of_a_band() -> int:
    """Peak bytes of a pass of the embedded model's U-Net on this rank, with attention that allocates its output alone."""
    pipe = scalediff.load_demo()
    args, kwargs, _ = first_denoiser_call(pipe, ARGUMENTS, LARGE)
    with scalediff.patch_model(pipe, mesh=distributed.group.WORLD), torch.no_grad():
        return real_peak_of(lambda: pipe.unet(*args, **kwargs))


CASES = {case.__name__: case for case in (uneven_stages, little_memory, memory_of_a_band)}
