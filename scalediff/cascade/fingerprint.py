"""What determines the result of a run, for the check that a workdir belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from scalediff.cascade.borrowing import is_tiled
from scalediff.cascade.caches import cache_settings
from scalediff.cascade.generators import states_of
from scalediff.cascade.keeping import Given
from scalediff.cascade.results import RunOptions
from scalediff.cascade.upsampling import identify_upsampler
from scalediff.cascade.workdir import digest, fingerprint_weights
from scalediff.patching.networks import denoiser_of, handle_of
from scalediff.settings import Settings


def fingerprint_pipeline(pipe: Any) -> dict[str, Any]:
    """What determines a pipeline's results on one machine, whatever it is called with: weights, scheduler and versions."""
    return {
        "weights": fingerprint_weights([part for part in pipe.components.values() if isinstance(part, nn.Module)]),
        "versions": [torch.__version__, version("diffusers")],
        "scheduler": f"{type(pipe.scheduler).__name__} {digest(dict(pipe.scheduler.config))}",
    }


def fingerprint_run(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: list[tuple[int, int]],
    settings: Settings,
    run_options: RunOptions,
    given: Given | None,
) -> dict[str, Any]:
    """Everything that determines the result of a run bit for bit, on one machine; a workdir is resumed only if all of it matches."""
    generator = arguments["generator"]
    denoiser: Any = denoiser_of(pipe)
    caches = cache_settings(pipe)
    handle = handle_of(pipe)
    named = {"generator", "prompt", "negative_prompt", "num_inference_steps"}
    return {
        "prompt": arguments.get("prompt"),
        "negative_prompt": arguments.get("negative_prompt"),
        "sizes": [f"{height}x{width}" for height, width in sizes],
        "settings": asdict(settings),
        "seed": digest(states_of(generator)),
        "call": digest({name: value for name, value in arguments.items() if name not in named}),
        "picture": None if given is None else _digest_picture(given),
        "model": f"{type(denoiser).__name__} {digest(dict(denoiser.config))}",
        **fingerprint_pipeline(pipe),
        "patched": None if handle is None else [list(handle.window), handle.jitter, digest(asdict(handle.options))],
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "vae": [run_options.vae_tiling, run_options.vae_attention, is_tiled(pipe.vae)],
        "split_guidance": run_options.split_guidance,
        "upsampler": identify_upsampler(run_options.upsampler),
        "caches": digest(caches) if caches else None,
    }


def _digest_picture(given: Given) -> str:
    if given.mask is None and given.strength is None:
        return digest(given.picture)
    return digest([given.picture, given.mask, given.strength])
