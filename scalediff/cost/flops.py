"""FLOPs of every stage of a run for full-size models, counted on the meta device without weights.

The count covers matrix products and convolutions of the denoiser and the autoencoder, at 2 FLOPs per multiply-add. Linear layers,
convolutions and the autoencoder are counted as torch runs them; attention of the denoiser by formula, 4 D for every query, key and head.
Text encoders, filters and elementwise operations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalediff.cost.models import MODELS, Model, built
from scalediff.cost.tally import Flops, FusedAttention, KnownResults
from scalediff.families import family_of
from scalediff.families.base import Family, Reader
from scalediff.families.grid import Grid, patch_of, window_of
from scalediff.settings import Attention, Settings, plan_sizes
from scalediff_kernels.neighborhood.api import TextQueries
from scalediff_kernels.neighborhood.geometry import attention_flops, text_attention_flops

LARGEST = 2**17  # pixels per side of a plan: the position ids of a larger picture take more than 1 GiB on the CPU


@dataclass(frozen=True)
class Work:
    """TFLOPs of one stage.

    Attributes:
        height, width: Size in pixels.
        steps: Number of denoising steps.
        passes: Number of forward passes of the denoiser, including guidance.
        attention, linear, convolution: TFLOPs of all passes.
        vae: TFLOPs of decoding this stage and encoding the reference of the next.
    """

    height: int
    width: int
    steps: int
    passes: int
    attention: float
    linear: float
    convolution: float
    vae: float

    @property
    def total(self) -> float:
        """TFLOPs of the stage."""
        return self.attention + self.linear + self.convolution + self.vae


class Forward(NamedTuple):
    """TFLOPs of one forward pass of a denoiser.

    Attributes:
        attention: Self-attention of the image, including text in the same softmax.
        cross: Cross-attention of the image to text, and attention of text alone.
        linear, convolution: Linear layers and convolutions.
    """

    attention: float
    cross: float
    linear: float
    convolution: float


def count(name: str, size: tuple[int, int], *, attention: Attention = "npa") -> tuple[Settings, list[Work]]:
    """Count the FLOPs of every stage of a run with the default preset.

    Args:
        name: A name of `scalediff.cost.models.MODELS`.
        size: Target (height, width) in pixels.
        attention: Attention of the stages after the base stage, which has full attention.

    Returns:
        The preset's settings, and the work of every stage.

    Raises:
        ValueError: The model is not one of these, or does not support the size.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    denoiser, vae = built(model)
    settings, sizes = stages(model, denoiser, size)
    rows = []
    for index, (height, width) in enumerate(sizes):
        steps = settings.steps if index == 0 else settings.stage_steps
        passes = steps * passes_of_a_step(model, settings)
        fit_denoiser(model, denoiser, (height, width))
        with torch.device("meta"):
            inputs = model.inputs(height // model.factor, width // model.factor)
        how: Attention = attention if index else "full"  # also where the base is a little larger than the native area
        one = forward_work(denoiser, inputs, attention=how, native=model.native)
        after = sizes[index + 1] if index + 1 < len(sizes) else None
        coded = autoencoder_work(vae, (height, width), after, factor=model.factor)
        attended, linear, convolution = (passes * part for part in (one.attention + one.cross, one.linear, one.convolution))
        rows.append(Work(height, width, steps, passes, attended, linear, convolution, coded))
    return settings, rows


def stages(model: Model, denoiser: nn.Module, size: tuple[int, int]) -> tuple[Settings, list[tuple[int, int]]]:
    """The settings of the default preset, and (height, width) in pixels of every stage up to a target.

    Raises:
        ValueError: As `plan_sizes`; or a side is larger than `LARGEST`; or the denoiser has no positions for the size.
    """
    if max(size) > LARGEST:
        raise ValueError(f"a plan is for pictures of at most {LARGEST} x {LARGEST} pixels, got {size[0]} x {size[1]}")
    family = _family(denoiser)
    assert family.cascade is not None
    native = _native_grid(model, denoiser)
    largest = family.cascade.largest_grid(denoiser)
    if largest is not None and (size[0] > largest[0] * model.tokens or size[1] > largest[1] * model.tokens):
        most = f"{largest[0] * model.tokens} x {largest[1] * model.tokens}"
        raise ValueError(f"{type(denoiser).__name__} has positions for at most {most} pixels, got {size[0]} x {size[1]}")
    sizes = plan_sizes(size, native=(native[0] * model.tokens, native[1] * model.tokens), multiple=_size_multiple(model, family))
    return family.cascade.presets(denoiser)["default"].settings, sizes


def native_rules(name: str) -> tuple[tuple[int, int], int]:
    """The native (height, width) of a model of `MODELS` in pixels, and the number of pixels that sides must be multiples of."""
    model = MODELS[name]
    denoiser = built(model)[0]
    native = _native_grid(model, denoiser)
    return (native[0] * model.tokens, native[1] * model.tokens), _size_multiple(model, _family(denoiser))


def _native_grid(model: Model, denoiser: nn.Module) -> Grid:
    native = model.native or _family(denoiser).native_grid(denoiser)
    assert native is not None
    return native


def fit_denoiser(model: Model, denoiser: nn.Module, size: tuple[int, int]) -> None:
    """Set the attributes of a denoiser that the cascade sets for a stage of (height, width) pixels."""
    cascade = _family(denoiser).cascade
    assert cascade is not None
    set_attributes(denoiser, cascade.attributes(SimpleNamespace(vae_scale_factor=model.factor, transformer=denoiser), *size))


def set_attributes(denoiser: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Set those attributes of a pipeline, by dotted names, that are its transformer's."""
    for name, value in attributes.items():
        part, _, attribute = name.rpartition(".")
        if part == "transformer":
            setattr(denoiser, attribute, value)


def _size_multiple(model: Model, family: Family) -> int:
    assert family.cascade is not None
    return max(model.tokens, family.cascade.size_multiple)


def passes_of_a_step(model: Model, settings: Settings) -> int:
    """Number of forward passes in a denoising step, including guidance."""
    return 2 if model.guided and settings.guidance_scale > 1 else 1


def forward_work(
    denoiser: nn.Module,
    inputs: dict[str, Any],
    *,
    attention: Attention = "npa",
    text_queries: TextQueries = "window",
    native: Grid | None = None,
) -> Forward:
    """Count the FLOPs of one forward pass.

    Args:
        denoiser: A denoiser of a known family on the meta device.
        inputs: Arguments of the forward pass.
        attention: `"npa"` or `"full"` attention above the native area.
        text_queries: Rule for text queries, as in `patch_model`.
        native: Native token grid `(Y, X)`; that of the family when None.

    Returns:
        The TFLOPs of the pass.

    Raises:
        NotImplementedError: The denoiser belongs to no known family.
        ValueError: Attention is `"npa"`, and neither `native` nor the denoiser tells the native size.
    """
    attended = attention_work(denoiser, inputs, attention=attention, text_queries=text_queries, native=native)
    return Forward(*attended, *layer_work(denoiser, inputs))


def attention_work(
    denoiser: nn.Module,
    inputs: dict[str, Any],
    *,
    attention: Attention = "npa",
    text_queries: TextQueries = "window",
    native: Grid | None = None,
) -> tuple[float, float]:
    """TFLOPs of self-attention (including text in the same softmax), and of cross-attention and attention of text alone.

    Arguments and errors as in `forward_work`; `native` is the native token grid, that of the family when None.

    Nothing is run: the layout comes from the family, and the FLOPs from the formulas in `scalediff_kernels.neighborhood.geometry`.
    """
    family = _family(denoiser)
    layout, native = family.layout(denoiser, inputs, Reader()), native or family.native_grid(denoiser)
    if attention == "npa" and native is None:
        raise ValueError(f"{type(denoiser).__name__} does not tell its native size: pass native=(Y, X) in tokens, got {native=}")
    windows = native if attention == "npa" and native and layout.grid[0] * layout.grid[1] > native[0] * native[1] else None
    attended = cross = 0
    for site in family.sites(denoiser):
        heads = _heads_of(denoiser.get_submodule(site.name))
        if site.role == "text":
            count, length = layout.others if "layerwise" in site.name else (1, layout.others[0])  # Krea 2: over the layers of a token
            cross += count * attention_flops(grid=(1, length), window=(0, 0), text=length, **heads)
            continue
        choose = max if site.role == "joint" else min  # without the text there may be padding
        one = choose((s for s in layout.sequences if s.level == site.level), key=lambda s: s.text)
        window, patch = (window_of(windows, site.level), patch_of(windows, site.level)) if windows else (one.grid, one.grid)
        if site.role == "cross":
            cross += attention_flops(grid=one.grid, window=(0, 0), text=sum(layout.others), **heads)
        else:
            attended += attention_flops(grid=one.grid, window=window, text=one.text, **heads)
        if site.role != "cross" and one.queries == "all":
            rule = text_queries if windows else "global"
            attended += text_attention_flops(grid=one.grid, window=window, patch=patch, text=one.text, rule=rule, **heads)
    return attended / 1e12, cross / 1e12


def _heads_of(attention: Any) -> dict[str, Any]:
    """Number and width of the query heads of an attention module of diffusers."""
    heads = attention.heads if hasattr(attention, "heads") else attention.num_heads
    return {"heads": heads, "head_dim": attention.inner_dim // heads if hasattr(attention, "inner_dim") else attention.head_dim}


def layer_work(denoiser: nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    """TFLOPs of linear layers and of convolutions in one forward pass, in which attention only allocates its output."""
    with FusedAttention():
        parts = _count_flops(lambda: denoiser(**_on_meta(inputs)))
    convolutions = sum((flops for op, flops in parts.items() if "conv" in op), 0.0)
    return sum(parts.values()) - _attention_flops(parts) - convolutions, convolutions


def autoencoder_work(vae: Any, size: tuple[int, int], after: tuple[int, int] | None = None, *, factor: int) -> float:
    """TFLOPs of decoding a picture of (height, width) pixels and, if `after` is given, of encoding a picture of that size.

    `factor` is the number of pixels per latent along an axis.
    """
    video = "z_dim" in vae.config  # which takes a picture as a single frame
    frames, channels = ((1,), vae.config.z_dim) if video else ((), vae.config.latent_channels)
    latents = torch.empty(1, channels, *frames, size[0] // factor, size[1] // factor, device="meta")
    total = sum(_count_flops(lambda: vae.decode(latents)).values())
    if after is not None:
        total += sum(_count_flops(lambda: vae.encode(torch.empty(1, 3, *frames, *after, device="meta"))).values())
    return total


def _family(denoiser: nn.Module) -> Family:
    family = family_of(denoiser)
    if family is None:
        raise NotImplementedError(f"the work of denoisers of no known family is not counted, got {type(denoiser).__name__}")
    return family


def _on_meta(value: Any) -> Any:
    """Tensors of numbers on the meta device; masks stay where they are, because their values may be read."""
    if isinstance(value, dict):
        return {name: _on_meta(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_meta(part) for part in value)
    numbers = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return value.to("meta") if numbers else value


def _count_flops(run: Callable[[], Any]) -> dict[str, float]:
    """TFLOPs by operator, from torch's formulas."""
    from torch.utils.flop_counter import flop_registry  # this import loads Triton, so it is not at the top

    with torch.no_grad(), KnownResults(), Flops(flop_registry) as counted:
        run()
    return {operator: flops / 1e12 for operator, flops in counted.by_operator.items()}


def _attention_flops(parts: dict[str, float]) -> float:
    """The TFLOPs of attention among those of `_count_flops`: fused attention and batched matrix products."""
    return sum(flops for op, flops in parts.items() if "bmm" in op or "attention" in op)
