"""Views of a latent: their positions, the denoiser's arguments for a view, and the average of views.

Legend: B batch, C channels, Y x X latent grid; a corner is the first latent `(y, x)` of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalediff.arguments import check_integer, check_positive, optional
from scalediff.cascade.latents import pack, unpack
from scalediff.families.grid import Grid


def starts(length: int, *, window: int, stride: int) -> list[int]:
    """First latent of every view along an axis: every `stride` latents, with the last view moved back to end at the border.

    MultiDiffusion, arXiv:2302.08113, whose panoramas have (length - window) / stride + 1 of them.
    """
    count = max(0, -((window - length) // stride)) + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def corners(size: Grid, *, window: Grid, stride: Grid) -> list[Grid]:
    """The corners of all views, row by row."""
    rows, columns = (starts(size[axis], window=window[axis], stride=stride[axis]) for axis in (0, 1))
    return [(y, x) for y in rows for x in columns]


def check_options(stride: int | None, view_batch: int) -> None:
    """Check the options that all methods with views have.

    Raises:
        ValueError: A value is not positive.
        TypeError: A value is not an integer.
    """
    optional(check_integer)("stride", stride)
    if stride is not None and stride < 1:
        raise ValueError(f"stride must be at least 1 latent, got {stride=}")
    check_positive("view_batch", view_batch)


def stride_of(window: Grid, stride: int | None, *, patch: int) -> Grid:
    """Latents between adjacent views per axis; half a window if `stride` is None.

    Raises:
        ValueError: Views would leave gaps, or start inside a token.
    """
    if stride is None:
        return tuple(max(patch, side // 2 // patch * patch) for side in window)  # type: ignore[return-value]
    if stride > min(window) or stride % patch:
        raise ValueError(f"stride must be at most the window's {min(window)} latents and a multiple of a token's {patch}, got {stride=}")
    return stride, stride


def average(parts: Iterable[Tensor], where: Sequence[Grid], size: Grid) -> Tensor:
    """Average views `[B, C, y, x]` with these corners to `[B, C, Y, X]`: each latent is the mean of the views that cover it.

    Sums are in fp32, or in fp64 for fp64 views. MultiDiffusion, arXiv:2302.08113: the least-squares solution for uniform weights.
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
    """How the arguments of a denoiser are cut into views.

    Attributes:
        latents: Name of the argument with the latents.
        batched: Names of arguments with one row per sample, or containers of them; they are repeated for every view.
        shared: Names of arguments that are the same for every view.
        ids: Name of the argument with position ids `[Y X / 4, axes]`. Every view has the ids of the first one, as a native picture has.
        packed: Whether latents are packed tokens `[B, Y X / 4, 4 C]`.
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


class Text(NamedTuple):
    """The text of a view: tokens `[B, T, width]`, and for SDXL their pooled embedding `[B, width]`; guidance doubles B."""

    tokens: Tensor
    pooled: Tensor | None = None


# From the denoiser's arguments of a pass and the slice of the views in it to further arguments.
Control = Callable[[Mapping[str, Any], slice], dict[str, Any]]

_SPATIAL_ARGUMENTS = {"ip_adapter_masks", "gligen"}  # attention arguments that refer to positions in the picture


class Denoise:
    """One denoiser call of the pipeline, which can be run on views of its latents.

    Args:
        forward: The original denoiser.
        named: Arguments of the denoiser call, by name.
        inputs: How these arguments are cut into views.
        size: Latent grid `(Y, X)` of the picture.
        patch: Latents per token along an axis.
        view_batch: Number of views in one forward pass, each with the whole batch of the pipeline.

    Attributes:
        latents: The latents of the call, `[B, C, Y, X]`.
        timestep: The timestep of the call.

    Raises:
        NotImplementedError: An argument depends on the picture's grid in a way that is not supported.
    """

    def __init__(
        self, forward: Callable[..., Any], named: Mapping[str, Any], inputs: Inputs, *, size: Grid, patch: int, view_batch: int
    ) -> None:
        known = {inputs.latents, inputs.ids, *inputs.batched, *inputs.shared}
        unsupported = {name for name, value in named.items() if value is not None and name not in known}
        unsupported |= {name for value in named.values() if isinstance(value, dict) for name in _SPATIAL_ARGUMENTS & set(value)}
        if unsupported:
            raise NotImplementedError(
                f"views are not supported with some of the denoiser's arguments, got {', '.join(sorted(unsupported))}"
            )
        self._forward, self._named, self._inputs, self._size, self._patch = forward, dict(named), inputs, size, patch
        self._view_batch = view_batch
        self._last_output: Any = None
        given: Tensor = named[inputs.latents]
        self.latents = unpack(given, size) if inputs.packed else given
        self.timestep: Any = named["timestep"]

    def __call__(
        self,
        views: Sequence[Tensor],
        *,
        crops: Sequence[Grid] | None = None,
        texts: Sequence[Text] | None = None,
        control: Control | None = None,
    ) -> Iterator[Tensor]:
        """Run the denoiser on views `[B, C, y, x]` and yield its outputs of the same shape, in order.

        `crops` are the crop coordinates in pixels for SDXL's size conditioning, and `texts` the text of each view for a U-Net; those of the
        pipeline's call when None. `control` adds arguments to each pass.
        """
        for first in range(0, len(views), self._view_batch):
            here = slice(first, first + self._view_batch)
            some = views[here]
            arguments = self._arguments(some, crops[here] if crops else None, texts[here] if texts else None)
            self._last_output = self._forward(**arguments, **(control(arguments, here) if control else {}))
            output = unpack(self._last_output[0], _grid(some[0])) if self._inputs.packed else self._last_output[0]
            yield from output.chunk(len(some))

    def as_output(self, output: Tensor) -> Any:
        """Put `[B, C, Y, X]` into the form of the denoiser's return value."""
        packed = pack(output) if self._inputs.packed else output
        return (packed,) if isinstance(self._last_output, tuple) else type(self._last_output)(sample=packed)

    def _arguments(self, views: Sequence[Tensor], crops: Sequence[Grid] | None, texts: Sequence[Text] | None) -> dict[str, Any]:
        """The arguments of one forward pass; the views are concatenated along the batch."""
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
        attention = found.get("cross_attention_kwargs") or {}
        if attention.get("base_sequence_length") is not None:  # Lumina-Next rescales attention above this number of tokens
            found["cross_attention_kwargs"] = {**attention, "base_sequence_length": grid[0] * grid[1] // self._patch**2}
        if texts is not None:
            found["encoder_hidden_states"] = torch.cat([text.tokens for text in texts])
            if texts[0].pooled is not None:
                pooled = torch.cat([text.pooled for text in texts if text.pooled is not None])
                found["added_cond_kwargs"] = {**found["added_cond_kwargs"], "text_embeds": pooled}
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
    """SDXL's time ids `[views B, 6]` with other crops: original height and width, crop top and left, target height and width."""
    time_ids = time_ids.clone()
    time_ids[:, 2:4] = time_ids.new_tensor(crops).repeat_interleave(batch, dim=0)
    return time_ids
