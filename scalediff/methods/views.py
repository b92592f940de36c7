"""Views of a latent: where they lie, how a denoiser's arguments are cut down to them, and their average.

Legend: B batch, C channels, Y x X latent grid; a corner is where a view begins, `(y, x)` in latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.latents import pack, unpack
from scalediff.families.grid import Grid


def starts(length: int, *, window: int, stride: int) -> list[int]:
    """Where the views along an axis begin: every `stride`, the last one moved back to end at the border.

    MultiDiffusion, arXiv:2302.08113, whose panoramas have (length - window) / stride + 1 of them.
    """
    count = max(0, -((window - length) // stride)) + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def corners(size: Grid, *, window: Grid, stride: Grid) -> list[Grid]:
    """The corners of all views, row by row."""
    rows, columns = (starts(size[axis], window=window[axis], stride=stride[axis]) for axis in (0, 1))
    return [(y, x) for y in rows for x in columns]


def check_options(stride: int | None, view_batch: int) -> None:
    """What every method with views has among its options.

    Raises:
        ValueError: a value is not positive.
    """
    if stride is not None and stride < 1:
        raise ValueError(f"stride must be at least 1 latent, got {stride=}")
    if view_batch < 1:
        raise ValueError(f"view_batch must be at least 1, got {view_batch=}")


def stride_of(window: Grid, stride: int | None, *, patch: int) -> Grid:
    """Latents from view to view, per axis: half a window where none is named.

    Raises:
        ValueError: the views would not meet, or would begin within a token.
    """
    if stride is None:
        return tuple(max(patch, side // 2 // patch * patch) for side in window)  # type: ignore[return-value]
    if stride > min(window) or stride % patch:
        raise ValueError(f"stride must be at most the window's {min(window)} latents and a multiple of a token's {patch}, got {stride=}")
    return stride, stride


def average(parts: Iterable[Tensor], where: Sequence[Grid], size: Grid) -> Tensor:
    """`[B, C, Y, X]` from views `[B, C, y, x]` with these corners: at every place the plain mean of the views that cover it.

    Summed in fp32, in fp64 where the views are. MultiDiffusion, arXiv:2302.08113: the least-squares solution for uniform weights.
    """
    total = count = torch.empty(0)
    dtype = torch.float32
    for (y, x), part in zip(where, parts, strict=True):
        if not total.numel():
            dtype = part.dtype
            total = part.new_zeros(*part.shape[:2], *size, dtype=torch.promote_types(dtype, torch.float32))
            count = total.new_zeros(size)
        total[..., y : y + part.shape[-2], x : x + part.shape[-1]] += part
        count[y : y + part.shape[-2], x : x + part.shape[-1]] += 1
    return (total / count).to(dtype)


@dataclass(frozen=True)
class Inputs:
    """How the arguments of a denoiser are cut down to views.

    Attributes:
        latents: The argument with the latents.
        batched: Arguments with a row for every sample, or containers of such: repeated for every view.
        shared: Arguments that are the same for every view.
        ids: A table of positions `[Y X / 4, axes]`: every view has those of the first, which are those of a native picture.
        packed: Latents are tokens `[B, Y X / 4, 4 C]`.
    """

    latents: str
    batched: tuple[str, ...]
    shared: tuple[str, ...] = ()
    ids: str = ""
    packed: bool = False


INPUTS: Mapping[str, Inputs] = {
    "UNet2DConditionModel": Inputs(
        "sample",
        ("timestep", "encoder_hidden_states", "encoder_attention_mask", "attention_mask", "class_labels", "timestep_cond",
         "added_cond_kwargs"),
        ("cross_attention_kwargs", "return_dict"),
    ),
    "FluxTransformer2DModel": Inputs(
        "hidden_states",
        ("timestep", "encoder_hidden_states", "pooled_projections", "guidance", "joint_attention_kwargs"),
        ("txt_ids", "controlnet_blocks_repeat", "return_dict"),
        ids="img_ids",
        packed=True,
    ),
    "SD3Transformer2DModel": Inputs(
        "hidden_states",
        ("timestep", "encoder_hidden_states", "pooled_projections", "joint_attention_kwargs"),
        ("skip_layers", "return_dict"),
    ),
    "LuminaNextDiT2DModel": Inputs(
        "hidden_states",
        ("timestep", "encoder_hidden_states", "encoder_mask"),
        ("image_rotary_emb", "cross_attention_kwargs", "return_dict"),
    ),
    "Lumina2Transformer2DModel": Inputs(
        "hidden_states", ("timestep", "encoder_hidden_states", "encoder_attention_mask"), ("attention_kwargs", "return_dict")
    ),
}  # fmt: skip

_OF_PLACES = {"ip_adapter_masks", "gligen"}  # what attention is told about places of the picture, beside the latents


class Denoise:
    """The denoiser in one of the pipeline's calls of it, on views of the latents that it was given.

    Args:
        forward: The denoiser's own call.
        named: The arguments of the pipeline's call, by name.
        inputs: How they are cut.
        size: The latent grid of the picture, `(Y, X)`.
        patch: Latents of a token along an axis.
        view_batch: Views in one forward pass, each with all of the pipeline's batch.

    Attributes:
        latents: `[B, C, Y, X]`, as the denoiser was given them.
        timestep: As the denoiser was given it.

    Raises:
        NotImplementedError: an argument is tied to the picture's grid in a way that is not known here.
    """

    def __init__(
        self, forward: Callable[..., Any], named: Mapping[str, Any], inputs: Inputs, *, size: Grid, patch: int, view_batch: int
    ) -> None:
        known = {inputs.latents, inputs.ids, *inputs.batched, *inputs.shared}
        tied = {name for name, value in named.items() if value is not None and name not in known}
        tied |= {name for value in named.values() if isinstance(value, dict) for name in _OF_PLACES & set(value)}
        if tied:
            raise NotImplementedError(
                f"views of a picture cannot be cut from everything the denoiser is given, got {', '.join(sorted(tied))}"
            )
        self._forward, self._named, self._inputs, self._size, self._patch = forward, dict(named), inputs, size, patch
        self._view_batch = view_batch
        self._form: Any = None
        given: Tensor = named[inputs.latents]
        self.latents = unpack(given, size) if inputs.packed else given
        self.timestep: Any = named["timestep"]

    def __call__(self, views: Sequence[Tensor], *, crops: Sequence[Grid] | None = None) -> Iterator[Tensor]:
        """The outputs `[B, C, y, x]` for views of that size, in order.

        `crops` are the coordinates in pixels that SDXL is told its views were cropped at; the pipeline's own where None.
        """
        for first in range(0, len(views), self._view_batch):
            some = views[first : first + self._view_batch]
            self._form = self._forward(**self._arguments(some, crops[first : first + self._view_batch] if crops else None))
            output = unpack(self._form[0], _grid(some[0])) if self._inputs.packed else self._form[0]
            yield from output.chunk(len(some))

    def answer(self, output: Tensor) -> Any:
        """`[B, C, Y, X]` as the denoiser returns it."""
        packed = pack(output) if self._inputs.packed else output
        return (packed,) if isinstance(self._form, tuple) else type(self._form)(sample=packed)

    def _arguments(self, views: Sequence[Tensor], crops: Sequence[Grid] | None) -> dict[str, Any]:
        """Those of one forward pass, views in the outer order of its batch."""
        inputs, batch, grid = self._inputs, len(views[0]), _grid(views[0])
        found = dict(self._named)
        latents = torch.cat(list(views))
        found[inputs.latents] = pack(latents) if inputs.packed else latents
        for name in inputs.batched:
            if name in found:
                found[name] = _repeated(found[name], len(views), batch)
        if inputs.ids:
            ids = found[inputs.ids]
            rows, columns = self._size[0] // self._patch, self._size[1] // self._patch
            table = ids.view(rows, columns, -1)[: grid[0] // self._patch, : grid[1] // self._patch]
            found[inputs.ids] = table.reshape(-1, ids.shape[-1])
        how = found.get("cross_attention_kwargs") or {}
        if how.get("base_sequence_length") is not None:  # Lumina-Next sharpens attention beyond these tokens: a view has no more
            found["cross_attention_kwargs"] = {**how, "base_sequence_length": grid[0] * grid[1] // self._patch**2}
        added = found.get("added_cond_kwargs") or {}
        if crops is not None and "time_ids" in added:
            found["added_cond_kwargs"] = {**added, "time_ids": _cropped(added["time_ids"], crops, batch)}
        return found


def _grid(view: Tensor) -> Grid:
    return view.shape[-2], view.shape[-1]


def _repeated(value: Any, times: int, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1)) if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _repeated(part, times, batch) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_repeated(part, times, batch) for part in value)
    return value


def _cropped(time_ids: Tensor, crops: Sequence[Grid], batch: int) -> Tensor:
    """SDXL's `[views B, 6]`: original height and width, crop top and left, target height and width."""
    time_ids = time_ids.clone()
    time_ids[:, 2:4] = time_ids.new_tensor(crops).repeat_interleave(batch, dim=0)
    return time_ids
