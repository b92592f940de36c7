"""Small models in the structure of published research code, with random weights: DiT, SiT, PixArt and a U-Net of three levels.

Each has the methods by which its own sampling script calls it.

Legend: B batch, C channels, H x W latents, S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.scalediff.patching.research_models import HEADS, WIDTH, Attention, PatchEmbed, sines


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each scaled and shifted by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(condition)[:, None].chunk(4, dim=-1)
        x = x + self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + F.silu(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


class DiT(nn.Module):
    """Class-conditional; its script samples `forward_with_cfg`, which calls `self.forward`."""

    channels, learns_sigma = 4, True

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder = PatchEmbed((4, 4), 2, self.channels), nn.Embedding(11, WIDTH)
        self.t_embedder, self.blocks = nn.Linear(1, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.final_layer = nn.Linear(WIDTH, 4 * self.channels * (2 if self.learns_sigma else 1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        grid = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.x_embedder(x) + sines(grid).to(x)
        condition = self.t_embedder(t[:, None].to(x)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x).unflatten(1, grid).unflatten(-1, (2, 2, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, : self.channels], out[:, self.channels :]
        conditional, unconditional = eps.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class SiT(DiT):
    """The network of DiT, trained on velocities; its script calls `forward` itself."""

    learns_sigma = False


class PixArt(nn.Module):
    """Text by cross-attention; its script samples `forward_with_cfg`, and its solver `forward_with_dpmsolver`."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.caption = PatchEmbed((4, 4), 2, 4), nn.Linear(8, WIDTH)
        self.t_embedder, self.blocks = nn.Linear(1, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.cross = nn.ModuleList(CrossAttention() for _ in range(2))
        self.final_layer = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        grid, text = (x.shape[-2] // 2, x.shape[-1] // 2), self.caption(y)
        x = self.x_embedder(x) + sines(grid).to(x)
        condition = self.t_embedder(timestep[:, None].to(x))
        for block, cross in zip(self.blocks, self.cross, strict=True):
            x = block(x, condition)
            x = x + cross(x, text)
        return self.final_layer(x).unflatten(1, grid).unflatten(-1, (2, 2, 4)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward_with_dpmsolver(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return self.forward(x, timestep, y)

    def forward_with_cfg(self, x: Tensor, timestep: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        conditional, unconditional = self.forward(torch.cat([half, half]), timestep, y).chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([guided, guided])


class CrossAttention(nn.Module):
    """Image to text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(text).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class UNet(nn.Module):
    """Three levels with self-attention at each; a forward around an inner one, as in code with hooks of its own."""

    patch_size, sample_size = 1, 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1) for _ in range(2))
        self.attentions = nn.ModuleList(Attention() for _ in range(3))

    def _attend(self, level: int, x: Tensor) -> Tensor:
        return x + self.attentions[level](x.flatten(2).mT).mT.unflatten(-1, x.shape[-2:])

    def _forward(self, x: Tensor) -> Tensor:
        levels = [self._attend(0, self.first(x))]
        for level, down in enumerate(self.down, 1):
            levels.append(self._attend(level, down(levels[-1])))
        x = levels.pop()
        for skip in reversed(levels):
            x = skip + F.interpolate(x, size=skip.shape[-2:])
        return self.last(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)
