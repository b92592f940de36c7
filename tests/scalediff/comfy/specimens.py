"""Every supported network as a small model, the inputs of a pass, and windows written by hand as a mask over full attention.

Legend: B batch, C channels, Y x X token grid, T text tokens, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.families.grid import level_grid
from tests.conftest import seeded
from tests.scalediff.comfy.more_networks import (
    NextDiT,
    OpenAISignatureMMDITWrapper,
    QwenImageTransformer2DModel,
    UNetModel,
)  # fmt: skip
from tests.scalediff.comfy.networks import TEXT, WIDTH, Chroma, Flux, HunyuanVideo
from tests.scalediff.comfy.stand_in import CONST, EPS, BaseModel, LatentFormat, ModelPatcher, options_of
from tests.scalediff.families.test_families import allowed

WINDOW, GRID, TOKENS = (8, 8), (18, 11), 7  # tokens of the window, of the picture, of the text


@dataclass(frozen=True)
class Specimen:
    """A network and where its image tokens are.

    Attributes:
        build: Makes the network.
        patch: Latents per token.
        first: Function from a token grid to the first image token of every kind of self-attention call, by its number of tokens.
        calls: Number of these calls in a pass.
        blocks: Names of a U-Net's attention blocks, as `set_model_attn1_replace` takes them.
        per_level: Number of them at every level of a U-Net, from the finest.
        middle: Channels of a U-Net's middle block.
        extra: Further arguments of a pass.
        frames: Whether latents have an axis for frames.
        unet_config: ComfyUI's config of the network, as far as it is read.
        sampling: Kind of the noise.
        dtype: Dtype of weights and inputs.
    """

    build: Callable[[], nn.Module]
    patch: int
    first: Callable[[tuple[int, int]], dict[int, int]]
    calls: int
    blocks: tuple[tuple[str, int], ...] = ()
    per_level: tuple[int, ...] = ()
    middle: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    frames: bool = False
    unet_config: dict[str, Any] = field(default_factory=dict)
    sampling: Callable[[], Any] = CONST
    dtype: torch.dtype = torch.float64

    def model(self, *, dtype: torch.dtype | None = None, seed: int = 0) -> ModelPatcher:
        """The model with random weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = self.build().to(dtype or self.dtype)
        net.requires_grad_(False)
        return ModelPatcher(BaseModel(net, self.sampling(), LatentFormat(), self.unet_config))

    def inputs(self, grid: tuple[int, int], *, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Latents and context of a pass."""
        rng, dtype = seeded(1), self.dtype
        frames = (1,) if self.frames else ()
        x = torch.randn(batch, 4, *frames, grid[0] * self.patch, grid[1] * self.patch, generator=rng, dtype=dtype)
        return x, torch.randn(batch, TOKENS, TEXT, generator=rng, dtype=dtype)

    @property
    def tolerance(self) -> float:
        """Relative error of the whole network between two ways to compute its attention."""
        return 1e-9 if self.dtype == torch.float64 else 1e-4


def prefix(*, alone: bool = False, multiple: int = 1) -> Callable[[tuple[int, int]], dict[int, int]]:
    """Text, image and padding in one call; with `alone`, image and padding in another."""

    def first(grid: tuple[int, int]) -> dict[int, int]:
        text, image = (math.ceil(n / multiple) * multiple for n in (TOKENS, math.prod(grid)))
        return {text + image: text} | ({image: 0} if alone else {})

    return first


def levels(grid: tuple[int, int]) -> dict[int, int]:
    return {math.prod(level_grid(grid, level)): 0 for level in range(3)}


BYT5 = torch.randn(2, 3, TEXT, generator=seeded(2), dtype=torch.float64)
SPECIMENS = {
    "SDXL": Specimen(
        UNetModel, 1, levels, 5, tuple(("input", number) for number in range(5)), (2, 2, 1), WIDTH, unet_config={"context_dim": 2048},
        sampling=EPS,
    ),
    "FLUX": Specimen(Flux, 2, prefix(), 4),
    "Chroma": Specimen(Chroma, 2, prefix(), 4),
    "SD3": Specimen(OpenAISignatureMMDITWrapper, 2, prefix(alone=True), 3),
    "Lumina 2": Specimen(NextDiT, 2, prefix(alone=True), 3, extra={"num_tokens": TOKENS}),
    "Z-Image": Specimen(lambda: NextDiT(32), 2, prefix(alone=True, multiple=32), 3, extra={"num_tokens": TOKENS}),
    "Qwen-Image": Specimen(QwenImageTransformer2DModel, 2, prefix(), 2, frames=True),
    "HunyuanImage 2.1": Specimen(HunyuanVideo, 1, lambda grid: {math.prod(grid) + TOKENS + 3: 0}, 2, extra={"txt_byt5": BYT5}),
}  # fmt: skip


def forward(model: ModelPatcher, x: Tensor, context: Tensor, *, options: dict[str, Any] | None = None, **extra: Any) -> Tensor:
    """One pass of the network, called as ComfyUI calls it."""
    net, given = model.get_model_object("diffusion_model"), {**options_of(model), **(options or {})}
    out: Tensor = net(x, torch.full((len(x),), 0.5, dtype=x.dtype), context=context, transformer_options=given, **extra)
    return out


class ByHand:
    """An attention override that computes windows as full attention under a mask, for models that are not patched."""

    def __init__(self, grid: tuple[int, int], first: dict[int, int]) -> None:
        self.grid, self.first, self.calls = grid, first, 0
        self.levels = {math.prod(level_grid(grid, level)): level for level in range(3)}

    def __call__(
        self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *, skip_reshape: bool = False, **rest: Any
    ) -> Tensor:
        tokens = k.shape[-2]
        if q.shape[-2] != tokens or tokens not in self.first:
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **rest)
        self.calls += 1
        level = self.levels[tokens] if len(self.first) == 3 else 0
        grid, window = level_grid(self.grid, level), level_grid(WINDOW, level)
        inside = allowed(grid, window, (max(1, window[0] // 2), max(1, window[1] // 2)))
        visible = torch.ones(tokens, tokens, dtype=torch.bool)
        image = slice(self.first[tokens], self.first[tokens] + len(inside))
        visible[image, image] = inside
        bias = torch.zeros(tokens, tokens, dtype=q.dtype).masked_fill(~visible, -math.inf)
        bias = bias if mask is None else bias + mask
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        bias = bias if bias.ndim < 3 else bias[:, None]
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def by_hand(model: ModelPatcher, spec: Specimen, grid: tuple[int, int], **extra: Any) -> Tensor:
    """The output of an unpatched model with windows by hand."""
    oracle = ByHand(grid, spec.first(grid))
    out = forward(model, *spec.inputs(grid), options={"optimized_attention_override": oracle}, **{**spec.extra, **extra})
    assert oracle.calls == spec.calls
    return out
