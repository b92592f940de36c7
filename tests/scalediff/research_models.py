"""Small models in the structure of published research code, with random weights: DiT, SiT, PixArt, a U-Net of three levels, FLUX as its
authors wrote it, Lumina-Next, HunyuanDiT and the hourglass transformer of k-diffusion.

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


def rotated(x: Tensor, ids: Tensor, axes: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Rotary positions: pairs of channels of `[B, H, S, D]` turn by positions `[S, axes]`."""
    angles = []
    for axis, channels in enumerate(axes):
        frequency = theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(ids[:, axis, None].double() * frequency)
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, dim=-1))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x)


def ids_of(grid: tuple[int, int], axes: int = 2) -> Tensor:
    """Positions of a picture `[Y * X, axes]`; an axis before those of rows and columns is zero."""
    y, x = (torch.arange(n) for n in grid)
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    return F.pad(places, (axes - 2, 0)).double()


class Flux(nn.Module):
    """Text and image in one softmax with rotary positions of three axes, in a double block and then a single block."""

    axes = (4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.time_in = nn.Linear(16, WIDTH), nn.Linear(8, WIDTH), nn.Linear(1, WIDTH)
        self.img_qkv, self.txt_qkv, self.qkv = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.final_layer = nn.Linear(WIDTH, 16)

    def _attention(self, qkv: Tensor, ids: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotated(q, ids, self.axes), rotated(k, ids, self.axes)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor) -> Tensor:
        ids, count = torch.cat([txt_ids, img_ids]), txt.shape[1]
        img, txt = self.img_in(img) + self.time_in(timesteps[:, None])[:, None], self.txt_in(txt)
        x = torch.cat([txt, img], dim=1)
        x = x + self._attention(torch.cat([self.txt_qkv(txt), self.img_qkv(img)], dim=1), ids)
        x = x + self._attention(self.qkv(x), ids)
        return self.final_layer(x[:, count:])


class LuminaNext(nn.Module):
    """Fewer key heads than query heads, a mask that is all True, and text by a second attention; sampled by `forward_with_cfg`."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.cap_embedder = PatchEmbed((4, 4), 2, 4), nn.Linear(8, WIDTH)
        self.t_embedder = nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH + 2 * WIDTH // HEADS) for _ in range(2))
        self.text_layers = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH // HEADS) for _ in range(2))
        self.final_layer = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, t: Tensor, cap_feats: Tensor) -> Tensor:
        grid, text = (x.shape[-2] // 2, x.shape[-1] // 2), self.cap_embedder(cap_feats)
        x = self.x_embedder(x) + self.t_embedder(t[:, None])[:, None]
        mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool).expand(-1, HEADS, x.shape[1], -1)
        for layer, text_layer in zip(self.layers, self.text_layers, strict=True):
            q, k, v = layer(x).split([WIDTH, WIDTH // HEADS, WIDTH // HEADS], dim=-1)
            q, k, v = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in (q, k, v))
            q, k = (rotated(y, ids_of(grid), (8, 8)) for y in (q, k))
            k, v = (y.repeat_interleave(HEADS, dim=1) for y in (k, v))
            of_text = (y.unflatten(-1, (1, -1)).transpose(1, 2).expand(-1, HEADS, -1, -1) for y in text_layer(text).chunk(2, dim=-1))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) + F.scaled_dot_product_attention(q, *of_text)
            x = x + out.transpose(1, 2).flatten(2)
        return self.final_layer(x).unflatten(1, grid).unflatten(-1, (2, 2, 4)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward_with_cfg(self, x: Tensor, t: Tensor, cap_feats: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        conditional, unconditional = self.forward(torch.cat([half, half]), t, cap_feats).chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([guided, guided])


class HunyuanDiT(nn.Module):
    """Rotary positions given as an argument, cross-attention to text, and a long skip connection."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.text, self.t_embedder = PatchEmbed((4, 4), 2, 4), nn.Linear(8, WIDTH), nn.Linear(1, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.cross = nn.ModuleList(CrossAttention() for _ in range(2))
        self.skip, self.final_layer = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        grid, text = (x.shape[-2] // 2, x.shape[-1] // 2), self.text(encoder_hidden_states)
        x = first = self.x_embedder(x) + self.t_embedder(t[:, None])[:, None]
        for number, (qkv, cross) in enumerate(zip(self.qkv, self.cross, strict=True)):
            if number == 1:
                x = self.skip(torch.cat([x, first], dim=-1))
            q, k, v = qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = (rotated(y, ids_of(grid), (8, 8)) for y in (q, k))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + cross(x, text)
        return self.final_layer(x).unflatten(1, grid).unflatten(-1, (2, 2, 4)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Hourglass(nn.Module):
    """k-diffusion's transformer: attention at two levels of the grid, tokens merged 2 x 2 between them, cosine similarity."""

    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_in, self.merge, self.split = nn.Linear(4, WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.levels, self.out = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3)), nn.Linear(WIDTH, 4)

    def _attend(self, number: int, x: Tensor) -> Tensor:
        grid = x.shape[1], x.shape[2]
        q, k, v = self.levels[number](x.flatten(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (rotated(F.normalize(y, dim=-1), ids_of(grid), (8, 8)) for y in (q, k))
        return x + F.scaled_dot_product_attention(q, k, v, scale=10.0).transpose(1, 2).flatten(2).unflatten(1, grid)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        x = self._attend(0, self.patch_in(x.permute(0, 2, 3, 1)) * sigma[:, None, None, None])
        merged = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        parts = self.split(self._attend(1, self.merge(merged))).unflatten(-1, (2, 2, WIDTH))
        x = self._attend(2, x + parts.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3))
        return self.out(x).permute(0, 3, 1, 2)
