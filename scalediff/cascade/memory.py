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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from scalediff.cascade import streaming
from scalediff.cascade.borrowing import intercept_denoiser, restored_pipeline, sample_of, without_encoding
from scalediff.cascade.latents import encoded_mode, is_video_vae
from scalediff.cascade.pipeline import call_stage, cascade_of
from scalediff.cascade.placement import bytes_of, check_placement, is_offloaded, weights_of
from scalediff.cascade.streaming import stream_obstacle
from scalediff.cost.flops import passes_of_a_step, stages
from scalediff.cost.models import FACTOR, MODELS, TEXT_ENCODERS, built
from scalediff.cost.tally import peak_bytes
from scalediff.families import family_of
from scalediff.patching.networks import denoiser_of, networks_of
from scalediff.patching.subclass import original_class

MARGIN = 2**30  # bytes of a process with torch, or of a CUDA context and its libraries' workspaces; not measured yet
_TILES = 1.8  # area of all tiles in pictures: they overlap by a quarter of a side
_FRAGMENTATION = 1.1  # factor on the activations for gaps in the allocator's memory; not measured yet


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
            return int(sum(self.weights.values()) + _FRAGMENTATION * max(held.values()) + MARGIN)
        return int(max(size + _FRAGMENTATION * held.get(name, 0) for name, size in self.weights.items()) + MARGIN)

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
    args, kwargs, batch = _first_denoiser_call(pipe, arguments, size)
    with _wrap_meta_errors(denoiser):
        held = peak_bytes(functools.partial(_meta_copy(denoiser), *args, **kwargs))
    halves = 2 if cascade_of(pipe).conditional and sample_of(args, kwargs).shape[0] == 2 * batch else 1
    return Estimate(weights, held, halves, vae_bytes(vae, size, batch, tiled=False), vae_bytes(vae, size, batch, tiled=True))


def estimate_model(name: str, size: tuple[int, int]) -> Estimate:
    """Estimate the memory of a model of `scalediff.cost.models.MODELS` for one picture in bf16, without loading weights.

    Args:
        name: Its name there.
        size: (height, width) in pixels.

    Raises:
        ValueError: The model is not one of these, or does not support the size.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    denoiser, vae = (_cast(part, torch.bfloat16) for part in built(model))
    passes = passes_of_a_step(model, stages(model, denoiser, size)[0])
    with torch.device("meta"):
        inputs = model.inputs(size[0] // FACTOR, size[1] // FACTOR)
    if model.doubled and passes > 1:
        inputs = {name: _doubled(value) for name, value in inputs.items()}
    inputs = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)
    weights = bytes_of({"denoiser": denoiser, "vae": vae})
    weights |= {f"text_encoder_{i}": 2 * TEXT_ENCODERS[text] for i, text in enumerate(model.texts)}
    held = peak_bytes(functools.partial(denoiser, **inputs))
    family = family_of(denoiser)
    assert family is not None
    assert family.cascade is not None
    halves = 2 if model.doubled and family.cascade.conditional and passes > 1 else 1
    return Estimate(weights, held, halves, vae_bytes(vae, size, 1, tiled=False), vae_bytes(vae, size, 1, tiled=True))


def _doubled(value: Any) -> Any:
    """The argument of a denoiser for one picture, for the two passes of guidance in one batch."""
    if isinstance(value, dict):
        return {name: _doubled(part) for name, part in value.items()}
    if isinstance(value, list):
        return value * 2
    return torch.cat([value] * 2) if isinstance(value, Tensor) and value.ndim and len(value) == 1 else value


def vae_bytes(vae: Any, size: tuple[int, int], batch: int, *, tiled: bool) -> int:
    """Bytes of activations for encoding or decoding pictures of (height, width) pixels, whichever is larger.

    `tiled` means in parts: in bands where the autoencoder can be streamed and its tiling is off, otherwise in diffusers' tiles.

    Raises:
        NotImplementedError: The autoencoder's code does not run on the meta device.
    """
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    dtype = torch.float32 if upcast else vae.dtype
    tile = getattr(vae, "tile_sample_min_size", getattr(vae, "tile_sample_min_height", None))
    in_bands = tiled and not getattr(vae, "use_tiling", False) and not stream_obstacle(vae)
    if not tiled or in_bands or tile is None or max(size) <= tile:
        config = tuple(sorted((name, repr(value)) for name, value in vae.config.items()))
        key = original_class(type(vae)), config, size, batch, dtype, in_bands and streaming.ELEMENTS
        if key not in _VAE_BYTES:
            _VAE_BYTES[key] = _vae_bytes(vae, size, batch, dtype, in_bands=in_bands)
        return _VAE_BYTES[key]
    one = vae_bytes(vae, (min(tile, size[0]), min(tile, size[1])), batch, tiled=False)
    picture = 3 * batch * size[0] * size[1] * dtype.itemsize
    return int(max(one + _TILES * picture, (_TILES + 2) * picture))  # at the last tile, or at the end, with both the rows and the result


_VAE_BYTES: dict[Any, int] = {}  # cache


def _vae_bytes(vae: Any, size: tuple[int, int], batch: int, dtype: torch.dtype, *, in_bands: bool) -> int:
    with _wrap_meta_errors(vae), ExitStack() as undo:
        twin = _cast(_meta_copy(vae), dtype)
        if in_bands:
            undo.enter_context(streaming.streamed(twin))
        frame = (1,) if is_video_vae(vae) else ()
        picture = torch.empty(batch, 3, *frame, *size, device="meta", dtype=dtype)
        latents: list[Tensor] = []
        encoding = peak_bytes(lambda: latents.append(encoded_mode(twin, picture)))
        decoding = peak_bytes(lambda: twin.decode(latents[0]).sample)
    return max(encoding, decoding)


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


def needs_tiling(pipe: Any, size: tuple[int, int], batch: int) -> bool:
    """Whether the autoencoder needs tiling, because it would not fit beside the weights for pictures of (height, width) pixels.

    This depends on the device's total memory, not on its free memory, so that a seed always gives the same picture. False if not known.
    """
    total = total_bytes(pipe._execution_device)
    if total is None or not hasattr(pipe.vae, "enable_tiling"):
        return False
    weights = bytes_of({"vae": pipe.vae}) if is_offloaded(pipe) else weights_of(pipe)
    try:
        needed = _FRAGMENTATION * vae_bytes(pipe.vae, size, batch, tiled=False)
    except NotImplementedError:
        return False
    return sum(weights.values()) + needed + MARGIN > total


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


def _first_denoiser_call(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any], int]:
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


def _meta_copy(network: Any) -> Any:
    """The same network on the meta device, without weights."""
    with torch.device("meta"):
        twin = original_class(type(network)).from_config(network.config)  # type: ignore[attr-defined]
    return _cast(twin, network.dtype)


def _cast(twin: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(twin, dtype).eval()  # not diffusers' `to`, whose warnings do not matter on the meta device


@contextmanager
def _wrap_meta_errors(network: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network's code may raise anything on the meta device
        raise NotImplementedError(f"the memory of {type(network).__name__} cannot be estimated: {error}") from error
