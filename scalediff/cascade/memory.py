"""How much memory a run needs, found before it begins: the network's own code on the meta device, its tensors counted as they live and die.

Counted are weights, and the tensors that a forward pass or the autoencoder holds at its worst moment. Attention is taken to hold its
output alone, as fused kernels do. What a device's driver, libraries and allocator take is not: `MARGIN` stands for it.
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
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from scalediff.cascade.borrowing import intercept_denoiser, kept, sample_of
from scalediff.cascade.pipeline import call_pipeline, cascade_of
from scalediff.cost.flops import FACTOR, MODELS, built, passes_of_a_step, stages
from scalediff.cost.tally import peak_bytes
from scalediff.patching.networks import denoiser_of, networks_of
from scalediff.patching.subclass import original_class

MARGIN = 2**30  # bytes: a process with torch, or a CUDA context and the workspaces of its libraries; not measured yet
_TILES = 1.8  # pictures that tiles are together: they overlap by a quarter of a side
_FRAGMENTS = 1.1  # of the activations: what an allocator leaves between them; not measured yet


# What can be done to need less, by its words: arguments of `Estimate.peak`.
WAYS: Mapping[str, Mapping[str, bool]] = {
    "as it is": {},
    "with vae_tiling": {"tiled": True},
    "with vae_tiling and split_guidance": {"tiled": True, "split": True},
    "with both and enable_model_cpu_offload (--low-memory)": {"tiled": True, "split": True, "offloaded": True},
}


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run needs at its largest stage.

    Attributes:
        weights: Of every component.
        denoiser: Of a forward pass, beside weights.
        halves: How many passes of half the memory that is, if guidance is split: 2, or 1 where there is nothing to split.
        vae, vae_tiled: Of encoding or decoding, beside weights: in one piece, and in tiles.
    """

    weights: Mapping[str, int]
    denoiser: int
    halves: int
    vae: int
    vae_tiled: int

    def peak(self, *, tiled: bool = False, split: bool = False, offloaded: bool = False) -> int:
        """Of the device: with the autoencoder tiling, guidance split, and only the component at work resident, or not."""
        held = {"denoiser": self.denoiser // (self.halves if split else 1), "vae": self.vae_tiled if tiled else self.vae}
        if not offloaded:
            return int(sum(self.weights.values()) + _FRAGMENTS * max(held.values()) + MARGIN)
        return int(max(size + _FRAGMENTS * held.get(name, 0) for name, size in self.weights.items()) + MARGIN)

    def ways(self) -> dict[str, int]:
        """What can be done to need less, and the peak with it, in the order in which it costs time."""
        return {words: self.peak(**done) for words, done in WAYS.items()}

    def advice(self, room: int | None, *, tiled: bool = False, split: bool = False, offloaded: bool = False) -> str:
        """What would fit into so many bytes beyond what is done already, in words; all of it, where it is not known how many there are."""
        now = {"tiled": tiled, "split": split, "offloaded": offloaded}
        peak = self.peak(**now)
        more = {words: self.peak(**done) for words, done in WAYS.items() if all(done.get(name) for name, on in now.items() if on)}
        less = {words: size for words, size in more.items() if size < peak}
        for words, size in less.items():
            if room is not None and size <= room:
                return f"{words} it takes about {format_gib(size)}"
        takes = ", ".join([f"{format_gib(peak)} as it is", *(f"{format_gib(size)} {words}" for words, size in less.items())])
        return f"by estimate it takes {takes}; else a smaller size, a smaller dtype, or pipe.enable_group_offload"


def format_gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def estimate(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> Estimate:
    """What a run with these arguments of the pipeline's call needs at a size (height, width) in pixels; nothing is drawn.

    The prompt is encoded once, to see what the denoiser is called with.

    Raises:
        NotImplementedError: a component whose code does not run on the meta device.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    weights = _weights(parts)
    denoiser, vae = denoiser_of(pipe), pipe.vae
    weights["denoiser"] = weights.pop(next(name for name in ("unet", "transformer") if name in weights))
    args, kwargs, batch = _first_denoiser_call(pipe, arguments, size)
    with _wrap_meta_errors(denoiser):
        held = peak_bytes(functools.partial(_meta_copy(denoiser), *args, **kwargs))
    halves = 2 if cascade_of(pipe).conditional and sample_of(args, kwargs).shape[0] == 2 * batch else 1
    return Estimate(weights, held, halves, vae_bytes(vae, size, batch, tiled=False), vae_bytes(vae, size, batch, tiled=True))


def planned(name: str, size: tuple[int, int]) -> Estimate:
    """What a model of `scalediff.cost.flops.MODELS` needs in bf16 for one picture of a size, without its weights being there.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    denoiser, vae = (_cast(part, torch.bfloat16) for part in built(model))
    with torch.device("meta"):
        texts = [_cast(part, torch.bfloat16) for part in model.texts()]
    passes = passes_of_a_step(model, stages(model, denoiser, size)[0])
    inputs = model.inputs(size[0] // FACTOR, size[1] // FACTOR)
    batch = tree_map_only(Tensor, lambda x: torch.cat([x] * passes) if passes > 1 and x.ndim else x, inputs)
    batch = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, batch)
    parts = {"denoiser": denoiser, "vae": vae, **{f"text_encoder_{i}": part for i, part in enumerate(texts)}}
    held = peak_bytes(functools.partial(denoiser, **batch))
    return Estimate(_weights(parts), held, passes, vae_bytes(vae, size, 1, tiled=False), vae_bytes(vae, size, 1, tiled=True))


def _weights(parts: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: sum(x.numel() * x.element_size() for x in (*part.parameters(), *part.buffers())) for name, part in parts.items()}


def vae_bytes(vae: Any, size: tuple[int, int], batch: int, *, tiled: bool) -> int:
    """What encoding or decoding pictures of a size holds, beside the weights, the larger of the two.

    Raises:
        NotImplementedError: an autoencoder whose code does not run on the meta device.
    """
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    dtype = torch.float32 if upcast else vae.dtype
    tile = getattr(vae, "tile_sample_min_size", getattr(vae, "tile_sample_min_height", None))
    if not tiled or tile is None or max(size) <= tile:
        config = tuple(sorted((name, repr(value)) for name, value in vae.config.items()))
        key = original_class(type(vae)), config, size, batch, dtype
        if key not in _KNOWN:
            _KNOWN[key] = _vae_bytes(vae, size, batch, dtype)
        return _KNOWN[key]
    one = vae_bytes(vae, (min(tile, size[0]), min(tile, size[1])), batch, tiled=False)
    picture = 3 * batch * size[0] * size[1] * dtype.itemsize
    return int(max(one + _TILES * picture, (_TILES + 2) * picture))  # at a tile, or at the end, when rows and result are there


_KNOWN: dict[Any, int] = {}  # bytes, by all that they depend on


def _vae_bytes(vae: Any, size: tuple[int, int], batch: int, dtype: torch.dtype) -> int:
    with _wrap_meta_errors(vae):
        twin = _cast(_meta_copy(vae), dtype)
        frame = (1,) if type(vae).__name__ == "AutoencoderKLQwenImage" else ()
        picture = torch.empty(batch, 3, *frame, *size, device="meta", dtype=dtype)
        latents: list[Tensor] = []
        encoding = peak_bytes(lambda: latents.append(twin.encode(picture).latent_dist.mode()))
        decoding = peak_bytes(lambda: twin.decode(latents[0]).sample)
    return max(encoding, decoding)


def room(device: torch.device) -> int | None:
    """Bytes that a device has for a run now, with what this process has put there already; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _read_meminfo("MemAvailable") if device.type == "cpu" else None


def capacity(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _read_meminfo("MemTotal") if device.type == "cpu" else None


def _read_meminfo(field: str) -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return int(next(line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith(field))) * 1024


def is_offloaded(pipe: Any) -> bool:
    """Whether components are on the device only while they work."""
    return any(hasattr(part, "_hf_hook") for part in pipe.components.values())


def needs_tiling(pipe: Any, size: tuple[int, int], batch: int) -> bool:
    """Whether the autoencoder would not fit beside the weights, for pictures of a size, as far as that can be told.

    It depends on the machine and not on what is free just now: one seed is one picture.
    """
    there = capacity(pipe._execution_device)
    if there is None or not hasattr(pipe.vae, "enable_tiling"):
        return False
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    weights = _weights({"vae": pipe.vae} if is_offloaded(pipe) else parts)
    try:
        needed = _FRAGMENTS * vae_bytes(pipe.vae, size, batch, tiled=False)
    except NotImplementedError:
        return False
    return sum(weights.values()) + needed + MARGIN > there


def images_per_call(arguments: Mapping[str, Any]) -> int:
    """How many pictures a pipeline's call draws at once."""
    prompts = arguments.get("prompt")
    prompts = arguments.get("prompt_embeds") if prompts is None else prompts
    count = len(prompts) if isinstance(prompts, list | Tensor) else 1
    return count * int(arguments.get("num_images_per_prompt") or 1)


@contextmanager
def out_of_memory(
    pipe: Any, scheduler: Any, arguments: Mapping[str, Any], size: tuple[int, int], stage: str, *, tiled: bool, split: bool
) -> Iterator[None]:
    """Explain that memory ran out: where, how much there is, and what more would fit than what was done; `scheduler` is the pipeline's own.

    Raises:
        torch.OutOfMemoryError: in place of torch's own.
    """
    failed: RuntimeError | None = None
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise  # on a CPU and on other devices torch has no error of its own for it
        failed = error
    if failed is None:
        return
    traceback.clear_frames(failed.__traceback__)  # they hold what the memory is full of
    torch.cuda.empty_cache()  # does nothing where CUDA was never used
    pipe.scheduler = scheduler
    device = pipe._execution_device
    there = room(device)
    try:
        advice = estimate(pipe, arguments, size).advice(there, tiled=tiled, split=split, offloaded=is_offloaded(pipe))
    except (NotImplementedError, RuntimeError) as why:
        advice = f"no estimate: {why}"
    has = f", which has {format_gib(there)}" if there is not None else ""
    raise torch.OutOfMemoryError(f"{stage}, {size[0]} x {size[1]}, ran out of memory on {device}{has}; {advice}") from failed


class _DenoiserCalled(Exception):
    """The denoiser was called: carries its arguments."""


def _first_denoiser_call(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What the pipeline calls its denoiser with at a size, and how many pictures that is for."""
    if len(networks_of(pipe)) > 1:
        raise NotImplementedError("the memory of a pipeline with a ControlNet cannot be told without running that")

    def seen(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _DenoiserCalled(args, kwargs)

    own = {name: value for name, value in arguments.items() if name not in ("latents", "callback_on_step_end")}
    changes = {"height": size[0], "width": size[1], "generator": torch.Generator(), "output_type": "latent", "return_dict": False}
    try:
        with torch.no_grad(), kept(pipe), intercept_denoiser(pipe, seen):
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
            pipe.set_progress_bar_config(disable=True)
            call_pipeline(pipe, {**own, **changes})
    except _DenoiserCalled as call:
        args, kwargs = call.args
        return args, kwargs, images_per_call(arguments)
    except Exception as error:  # whatever foreign code stumbles over
        raise NotImplementedError(f"the memory of {type(pipe).__name__} cannot be told: {error}") from error
    finally:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    raise NotImplementedError(f"{type(pipe).__name__} does not call its denoiser")


def _meta_copy(network: Any) -> Any:
    """The same network without weights."""
    with torch.device("meta"):
        twin = original_class(type(network)).from_config(network.config)  # type: ignore[attr-defined]
    return _cast(twin, network.dtype)


def _cast(twin: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(twin, dtype).eval()  # not diffusers' own, which warns of what does not matter without weights


@contextmanager
def _wrap_meta_errors(network: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever foreign code stumbles over on a device without values
        raise NotImplementedError(f"the memory of {type(network).__name__} cannot be told: {error}") from error
