"""Estimate the memory of a run before it starts, by running the networks' code on the meta device and counting live tensors.

The estimate includes the weights, and the tensors that are live at the peak of a forward pass or of the autoencoder. Attention is assumed
to allocate only its output, as fused kernels do. `MARGIN` stands for the memory of the driver, libraries and allocator.
"""

from __future__ import annotations

import copy
import functools
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from scalediff.cascade.autoencoder_memory import FRAGMENTATION, band_bytes, cast, join_sizes, meta_copy, vae_bytes, wrap_meta_errors
from scalediff.cascade.borrowing import intercept_denoiser, restored_pipeline, sample_of, without_encoding
from scalediff.cascade.pipeline import call_stage, cascade_of
from scalediff.cascade.placement import bytes_of, check_placement, is_offloaded, weights_of
from scalediff.cost.flops import fit_denoiser, passes_of_a_step, set_attributes, stages
from scalediff.cost.models import MODELS, TEXT_ENCODERS, built
from scalediff.cost.tally import peak_bytes
from scalediff.families import family_of
from scalediff.patching.networks import denoiser_of, networks_of

MARGIN = 2**30  # bytes of a process with torch, or of a CUDA context and its libraries' workspaces; not measured yet


# Options that reduce memory, as arguments of `Estimate.peak`, in the order in which they cost time.
MEMORY_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "as it is": {},
    "with vae_tiling": {"tiled": True},
    "with vae_tiling and split_guidance": {"tiled": True, "split": True},
    "with both and enable_model_cpu_offload (--low-memory)": {"tiled": True, "split": True, "offloaded": True},
}


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run needs at its largest stage.

    Attributes:
        weights: Weights of every component.
        denoiser: Activations of a forward pass of the denoiser.
        halves: Number of passes that the forward pass can be split into: 2 if guidance doubles the batch, otherwise 1.
        vae, vae_tiled: Activations of encoding or decoding, in one piece and in parts.
    """

    weights: Mapping[str, int]
    denoiser: int
    halves: int
    vae: int
    vae_tiled: int

    def peak(self, *, tiled: bool = False, split: bool = False, offloaded: bool = False) -> int:
        """Peak memory of the device. `offloaded` means that only the component in use is on the device."""
        held = {"denoiser": self.denoiser // (self.halves if split else 1), "vae": self.vae_tiled if tiled else self.vae}
        if not offloaded:
            return int(sum(self.weights.values()) + FRAGMENTATION * max(held.values()) + MARGIN)
        return int(max(size + FRAGMENTATION * held.get(name, 0) for name, size in self.weights.items()) + MARGIN)

    def peaks(self) -> dict[str, int]:
        """Peak memory with each entry of `MEMORY_OPTIONS`."""
        return {name: self.peak(**options) for name, options in MEMORY_OPTIONS.items()}

    def advice(self, available: int | None, *, tiled: bool = False, split: bool = False, offloaded: bool = False) -> str:
        """Name the first option that makes the run fit into the available bytes; all options if none does, or if they are not known.

        `tiled`, `split` and `offloaded` say which options are in use already.
        """
        used = {"tiled": tiled, "split": split, "offloaded": offloaded}
        peak = self.peak(**used)
        further = {
            name: self.peak(**on) for name, on in MEMORY_OPTIONS.items() if all(on.get(option) for option, yes in used.items() if yes)
        }
        smaller = {name: size for name, size in further.items() if size < peak}
        for name, size in smaller.items():
            if available is not None and size <= available:
                return f"{name} it needs about {format_gib(size)}"
        needs = ", ".join([f"{format_gib(peak)} as configured", *(f"{format_gib(size)} {name}" for name, size in smaller.items())])
        return f"it needs about {needs}; otherwise use a smaller size, a smaller dtype, or pipe.enable_group_offload"


def format_gib(size: float) -> str:
    """Format a number of bytes."""
    return f"{size / 2**30:.1f} GiB"


def estimate(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> Estimate:
    """Estimate the memory of a run without computing a picture. The prompt is encoded once, to get the arguments of the denoiser.

    Args:
        pipe: The pipeline.
        arguments: Arguments of the pipeline's call.
        size: (height, width) of the largest stage in pixels.

    Raises:
        NotImplementedError: The code of a component does not run on the meta device.
    """
    check_placement(pipe)
    weights = weights_of(pipe)
    denoiser, vae = denoiser_of(pipe), pipe.vae
    weights["denoiser"] = weights.pop(next(name for name in ("unet", "transformer") if name in weights))
    args, kwargs, batch = first_denoiser_call(pipe, arguments, size)
    twin = meta_copy(denoiser)
    set_attributes(twin, cascade_of(pipe).attributes(pipe, *size))
    with wrap_meta_errors(denoiser):
        held = peak_bytes(functools.partial(twin, *args, **kwargs))
    halves = 2 if cascade_of(pipe).conditional and sample_of(args, kwargs).shape[0] == 2 * batch else 1
    in_parts = vae_bytes(vae, size, batch, tiled=True, joined=joined_sizes(pipe, size, batch))
    return Estimate(weights, held, halves, vae_bytes(vae, size, batch, tiled=False), in_parts)


def estimate_model(name: str, size: tuple[int, int], total: int | None = None) -> Estimate:
    """Estimate the memory of a model of `scalediff.cost.models.MODELS` for one picture in bf16, without loading weights.

    Args:
        name: Its name there.
        size: (height, width) in pixels.
        total: Bytes of the device, by which the autoencoder's bands are chosen; None if not known.

    Raises:
        ValueError: The model is not one of these, or does not support the size.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    denoiser, vae = (cast(part, torch.bfloat16) for part in built(model))
    passes = passes_of_a_step(model, stages(model, denoiser, size)[0])
    fit_denoiser(model, denoiser, size)
    family = family_of(denoiser)
    assert family is not None
    assert family.cascade is not None
    with torch.device("meta"):
        inputs = model.inputs(size[0] // model.factor, size[1] // model.factor)
    if model.doubled and passes > 1:
        second = family.cascade.batch_second
        inputs = {name: _doubled(value, axis=1 if name in second else 0) for name, value in inputs.items()}
    inputs = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)
    weights = bytes_of({"denoiser": denoiser, "vae": vae})
    weights |= {f"text_encoder_{i}": 2 * TEXT_ENCODERS[text] for i, text in enumerate(model.texts)}
    held = peak_bytes(functools.partial(denoiser, **inputs))
    halves = 2 if model.doubled and family.cascade.conditional and passes > 1 else 1
    joined = 1 if total is None else join_sizes(vae, size, 1, total - weights["vae"] - MARGIN)
    in_parts = vae_bytes(vae, size, 1, tiled=True, joined=joined)
    return Estimate(weights, held, halves, vae_bytes(vae, size, 1, tiled=False), in_parts)


def _doubled(value: Any, *, axis: int = 0) -> Any:
    """The argument of a denoiser for one picture, for the two passes of guidance in one batch, which `axis` is.

    A list has an element for every picture, unless its elements have an axis of the batch.
    """
    if isinstance(value, dict):
        return {name: _doubled(part) for name, part in value.items()}
    if isinstance(value, list):
        batched = all(isinstance(part, Tensor) and len(part) == 1 for part in value)
        return [_doubled(part) for part in value] if batched else value * 2
    return torch.cat([value] * 2, dim=axis) if isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == 1 else value


def joined_sizes(pipe: Any, size: tuple[int, int], batch: int, *, ranks: int = 1) -> int:
    """The argument `joined` of `streamed` with which pictures of (height, width) pixels fit beside the weights, or the last of them.

    `ranks` is the number of devices that share a picture's rows out. The result depends on the total memory, as that of `needs_tiling`.
    """
    total = total_bytes(pipe._execution_device)
    weights = bytes_of({"vae": pipe.vae}) if is_offloaded(pipe) else weights_of(pipe)
    return 1 if total is None else join_sizes(pipe.vae, (size[0] // ranks, size[1]), batch, total - sum(weights.values()) - MARGIN)


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a device, plus those that this process has there already, such as weights; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = _read_kilobytes("/proc/meminfo", "MemAvailable") if device.type == "cpu" else None
    return None if free is None else free + (_read_kilobytes("/proc/self/status", "RssAnon") or 0)


def total_bytes(device: torch.device) -> int | None:
    """Total bytes of a device; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _read_kilobytes("/proc/meminfo", "MemTotal") if device.type == "cpu" else None


def _read_kilobytes(file: str, field: str) -> int | None:
    """The bytes of a line `field: N kB` of a file of Linux; None on other systems."""
    if not Path(file).exists():
        return None
    found = (line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith(f"{field}:"))
    return next((int(number) * 1024 for number in found), None)


def needs_tiling(pipe: Any, size: tuple[int, int], batch: int, *, ranks: int = 1) -> bool:
    """Whether the autoencoder needs tiling, because it would not fit beside the weights for pictures of (height, width) pixels.

    `ranks` is the number of devices that share a picture's rows out. The result depends on the device's total memory, not on its free
    memory, so that a seed always gives the same picture. False if not known.
    """
    total = total_bytes(pipe._execution_device)
    if total is None or not hasattr(pipe.vae, "enable_tiling"):
        return False
    weights = bytes_of({"vae": pipe.vae}) if is_offloaded(pipe) else weights_of(pipe)
    try:
        held = vae_bytes(pipe.vae, size, batch, tiled=False) if ranks == 1 else band_bytes(pipe.vae, size, batch, ranks)
    except NotImplementedError:
        return False
    return sum(weights.values()) + FRAGMENTATION * held + MARGIN > total


def images_per_call(arguments: Mapping[str, Any]) -> int:
    """Number of pictures that a pipeline's call generates at once."""
    prompts = arguments.get("prompt")
    prompts = arguments.get("prompt_embeds") if prompts is None else prompts
    count = len(prompts) if isinstance(prompts, list | Tensor) else 1
    return count * int(arguments.get("num_images_per_prompt") or 1)


@contextmanager
def out_of_memory(
    pipe: Any, scheduler: Any, arguments: Mapping[str, Any], size: tuple[int, int], stage: str, *, tiled: bool, split: bool
) -> Iterator[None]:
    """Replace an out-of-memory error by one that names the stage, the available memory, and options that would help.

    Args:
        pipe: The pipeline.
        scheduler: The pipeline's original scheduler, for the estimate.
        arguments: Arguments of the pipeline's call.
        size: (height, width) of the stage in pixels.
        stage: Name of the stage.
        tiled, split: Options in use, as in `Estimate.peak`.

    Raises:
        torch.OutOfMemoryError: The device ran out of memory.
    """
    failed: RuntimeError | None = None
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise  # on CPUs and some other devices torch raises a plain RuntimeError
        failed = error
    if failed is None:
        return
    traceback.clear_frames(failed.__traceback__)  # the frames keep tensors alive
    torch.cuda.empty_cache()  # does nothing if CUDA was never used
    pipe.scheduler = scheduler
    device = pipe._execution_device
    available = available_bytes(device)
    try:
        advice = estimate(pipe, arguments, size).advice(available, tiled=tiled, split=split, offloaded=is_offloaded(pipe))
    except (NotImplementedError, RuntimeError) as why:
        advice = f"no estimate of its needs: {why}"
    has = f", which has {format_gib(available)} available" if available is not None else ""
    raise torch.OutOfMemoryError(f"{stage}, {size[0]} x {size[1]}, ran out of memory on {device}{has}; {advice}") from failed


class _DenoiserCalled(Exception):
    """Raised at the first call of the denoiser, with its arguments."""


def first_denoiser_call(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """The arguments of the pipeline's first denoiser call at a size, and the number of pictures in the call."""
    if len(networks_of(pipe)) > 1:
        raise NotImplementedError("the memory of a pipeline with a ControlNet cannot be estimated")

    def stop(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _DenoiserCalled(args, kwargs)

    own = {name: value for name, value in arguments.items() if name not in ("latents", "callback_on_step_end")}
    changes = {"generator": torch.Generator(), "output_type": "latent", "return_dict": False}
    try:
        with torch.no_grad(), restored_pipeline(pipe), intercept_denoiser(pipe, stop), without_encoding(pipe):
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
            pipe.set_progress_bar_config(disable=True)
            call_stage(pipe, size, {**own, **changes})
    except _DenoiserCalled as call:
        args, kwargs = call.args
        return args, kwargs, images_per_call(arguments)
    except Exception as error:  # the pipeline's code may raise anything
        raise NotImplementedError(f"the memory of {type(pipe).__name__} cannot be estimated: {error}") from error
    finally:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    raise NotImplementedError(f"{type(pipe).__name__} does not call its denoiser")
