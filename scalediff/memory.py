"""How much memory a run needs, found before it begins: the network's own code on the meta device, its tensors counted as they live and die.

Counted are weights, and the tensors that a forward pass or the autoencoder holds at its worst moment. Attention is taken to hold its
output alone, as fused kernels do. What a device's driver, libraries and allocator take is not: `MARGIN` stands for it.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from scalediff.flops import FACTOR, MODELS, built, passes_of_a_step, stages
from scalediff.hooks import denoiser_of
from scalediff.pipelines import cascade_of, kept, own_call, sample_of
from scalediff.subclass import own_class

MARGIN = 2**30  # bytes: a process with torch, or a CUDA context and the workspaces of its libraries; not measured yet
_TILES = 1.8  # pictures that tiles are together: they overlap by a quarter of a side
_FRAGMENTS = 1.1  # of the activations: what an allocator leaves between them; not measured yet


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
        return {
            "as it is": self.peak(),
            "with vae_tiling": self.peak(tiled=True),
            "with vae_tiling and split_guidance": self.peak(tiled=True, split=True),
            "with both and enable_model_cpu_offload (--low-memory)": self.peak(tiled=True, split=True, offloaded=True),
        }

    def advice(self, room: int | None) -> str:
        """What would fit into so many bytes, in words; all that can be done, where it is not known how many there are."""
        ways = {way: peak for way, peak in self.ways().items() if peak < self.peak()}
        for way, peak in ways.items():
            if room is not None and peak <= room:
                return f"{way} it takes about {gib(peak)}"
        takes = ", ".join(f"{gib(peak)} {way}" for way, peak in self.ways().items())
        return f"by estimate it takes {takes}; else a smaller size, a smaller dtype, or pipe.enable_group_offload"


def gib(size: float) -> str:
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
    args, kwargs, batch = _first_call(pipe, arguments, size)
    with _explained(denoiser):
        held = peak_of(functools.partial(_twin(denoiser), *args, **kwargs))
    halves = 2 if cascade_of(pipe).conditional and sample_of(args, kwargs).shape[0] == 2 * batch else 1
    return Estimate(weights, held, halves, vae_bytes(vae, size, batch, tiled=False), vae_bytes(vae, size, batch, tiled=True))


def planned(name: str, size: tuple[int, int]) -> Estimate:
    """What a model of `scalediff.flops.MODELS` needs in bf16 for one picture of a size, without its weights being there.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    denoiser, vae = (_in_dtype(part, torch.bfloat16) for part in built(model))
    with torch.device("meta"):
        texts = [_in_dtype(part, torch.bfloat16) for part in model.texts()]
    passes = passes_of_a_step(model, stages(model, denoiser, size)[0])
    inputs = model.inputs(size[0] // FACTOR, size[1] // FACTOR)
    batch = tree_map_only(Tensor, lambda x: torch.cat([x] * passes) if passes > 1 and x.ndim else x, inputs)
    batch = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, batch)
    parts = {"denoiser": denoiser, "vae": vae, **{f"text_encoder_{i}": part for i, part in enumerate(texts)}}
    held = peak_of(functools.partial(denoiser, **batch))
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
        key = own_class(type(vae)), config, size, batch, dtype
        if key not in _KNOWN:
            _KNOWN[key] = _vae_bytes(vae, size, batch, dtype)
        return _KNOWN[key]
    one = vae_bytes(vae, (min(tile, size[0]), min(tile, size[1])), batch, tiled=False)
    picture = 3 * batch * size[0] * size[1] * dtype.itemsize
    return int(max(one + _TILES * picture, (_TILES + 2) * picture))  # at a tile, or at the end, when rows and result are there


_KNOWN: dict[Any, int] = {}  # bytes, by all that they depend on


def _vae_bytes(vae: Any, size: tuple[int, int], batch: int, dtype: torch.dtype) -> int:
    with _explained(vae):
        twin = _in_dtype(_twin(vae), dtype)
        frame = (1,) if type(vae).__name__ == "AutoencoderKLQwenImage" else ()
        picture = torch.empty(batch, 3, *frame, *size, device="meta", dtype=dtype)
        latents: list[Tensor] = []
        encoding = peak_of(lambda: latents.append(twin.encode(picture).latent_dist.mode()))
        decoding = peak_of(lambda: twin.decode(latents[0]).sample)
    return max(encoding, decoding)


def room(device: torch.device) -> int | None:
    """Bytes that a device has for a run in all, with what this process has put there already; None where it cannot be told."""
    free = spare(device)
    return free + torch.cuda.memory_allocated(device) if free is not None and device.type == "cuda" else free


def spare(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device now; None where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    return int(next(line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))) * 1024


def wants_tiling(pipe: Any, size: tuple[int, int], batch: int) -> bool:
    """Whether the autoencoder would not fit what is free now, for pictures of a size, as far as that can be told."""
    free = spare(pipe._execution_device)
    if free is None or not hasattr(pipe.vae, "enable_tiling"):
        return False
    try:
        return _FRAGMENTS * vae_bytes(pipe.vae, size, batch, tiled=False) > free
    except NotImplementedError:
        return False


def pictures_in(arguments: Mapping[str, Any]) -> int:
    """How many pictures a pipeline's call draws at once."""
    prompts = arguments.get("prompt")
    prompts = arguments.get("prompt_embeds") if prompts is None else prompts
    count = len(prompts) if isinstance(prompts, list | Tensor) else 1
    return count * int(arguments.get("num_images_per_prompt") or 1)


@contextmanager
def out_of_memory(pipe: Any, scheduler: Any, arguments: Mapping[str, Any], size: tuple[int, int], stage: str) -> Iterator[None]:
    """Explain that memory ran out: where, how much there is, and what would fit; `scheduler` is the pipeline's own.

    Raises:
        torch.OutOfMemoryError: in place of torch's own.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise  # on a CPU and on other devices torch has no error of its own for it
        torch.cuda.empty_cache()  # does nothing where CUDA was never used
        pipe.scheduler = scheduler
        device = pipe._execution_device
        there = room(device)
        try:
            advice = estimate(pipe, arguments, size).advice(there)
        except (NotImplementedError, torch.OutOfMemoryError) as why:
            advice = f"no estimate: {why}"
        has = f", which has {gib(there)}" if there is not None else ""
        raise torch.OutOfMemoryError(f"{stage}, {size[0]} x {size[1]}, ran out of memory on {device}{has}; {advice}") from error


class _Seen(Exception):
    """The denoiser was called: carries its arguments."""


def _first_call(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What the pipeline calls its denoiser with at a size, and how many pictures that is for."""

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(args, kwargs)

    changes = {"height": size[0], "width": size[1], "generator": torch.Generator(), "num_inference_steps": 1}
    own = {name: value for name, value in arguments.items() if name not in ("latents", "callback_on_step_end")}
    hook = denoiser_of(pipe).register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with torch.no_grad(), kept(pipe):
            pipe.set_progress_bar_config(disable=True)
            own_call(pipe, {**own, **changes, "output_type": "latent", "return_dict": False})
    except _Seen as call:
        args, kwargs = call.args
        return args, kwargs, pictures_in(arguments)
    finally:
        hook.remove()
    raise NotImplementedError(f"{type(pipe).__name__} does not call its denoiser")


def _twin(network: Any) -> Any:
    """The same network without weights."""
    with torch.device("meta"):
        twin = own_class(type(network)).from_config(network.config)  # type: ignore[attr-defined]
    return _in_dtype(twin, network.dtype)


def _in_dtype(twin: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(twin, dtype).eval()  # not diffusers' own, which warns of what does not matter without weights


@contextmanager
def _explained(network: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever foreign code stumbles over on a device without values
        raise NotImplementedError(f"the memory of {type(network).__name__} cannot be told: {error}") from error


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that are alive at the worst moment of a computation on the meta device, beside those that it is given.

    Whole numbers, vectors and tables of positions are computed on the CPU, where the code looks at them.
    """
    tally = _Tally()
    with torch.no_grad(), _Fused(), tally:
        run()
    return tally.peak


class _Fused(TorchFunctionMode):
    """Attention that holds its output alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query, value = args[0] if args else kwargs["query"], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1], device="meta")
        return function(*args, **kwargs)


class _Tally(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, until they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in leaves:
            self._count(tensor.untyped_storage(), made=False)  # weights, of which the result may be a view
        if any(x.is_meta for x in leaves):
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs or {}))
            if kwargs.get("device") is not None:  # a table that the twin has without values, and would take to a device
                kwargs = {**kwargs, "device": torch.device("meta")}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), made=True)
        return out

    def _count(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
