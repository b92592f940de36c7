"""Three models that nobody listed, small, in the manner of research code: nothing of diffusers, attention where its authors put it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS = 32, 2


def sines(grid: tuple[int, int], width: int = WIDTH) -> Tensor:
    """Position embedding `[Y * X, width]`."""
    frequency = 1.0 / 100.0 ** (torch.arange(width // 4) / (width // 4))
    y, x = (torch.arange(n)[:, None] * frequency for n in grid)
    y, x = (torch.cat([a.sin(), a.cos()], dim=-1) for a in (y, x))
    return torch.cat([y[:, None].expand(-1, len(x), -1), x[None].expand(len(y), -1, -1)], dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Knows its patch and the grid it was trained on, as vision transformers do."""

    def __init__(self, grid_size: tuple[int, int] = (4, 4), patch: int = 2, channels: int = 3) -> None:
        super().__init__()
        self.patch_size, self.grid_size = (patch, patch), grid_size
        self.proj = nn.Conv2d(channels, WIDTH, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of a vision transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).flatten(2))


class VisionTransformer(nn.Module):
    """Class token first, then the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.cls_token = PatchEmbed(), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "attn": Attention()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.patch_embed(x) + sines(grid).to(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return x


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A free function, as in the FLUX repository: `[B, H, S, D]` to `[B, S, H * D]`."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class SingleStreamDiT(nn.Module):
    """Image and then text in one stream, with no module of its own for attention."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.x_in, self.text_in, self.out = nn.Linear(16, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 16)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, latents: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        grid = height // 2, width // 2
        x = latents.reshape(batch, channels, grid[0], 2, grid[1], 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, math.prod(grid), -1)
        x = torch.cat([self.x_in(x) + sines(grid).to(x), self.text_in(caption)], dim=1) * t[:, None, None]
        for layer in self.layers:
            x = x + attention(*heads(layer(x)))
        return self.out(x[:, : math.prod(grid)])


class SelfAttention(nn.Module):
    """A container for weights, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_attn, self.txt_attn = SelfAttention(), SelfAttention()

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(heads(self.txt_attn.qkv(txt)), heads(self.img_attn.qkv(img)), strict=True)
        out = attention(*(torch.cat(pair, dim=2) for pair in parts))
        return img + self.img_attn.proj(out[:, txt.shape[1] :]), txt + self.txt_attn.proj(out[:, : txt.shape[1]])


class DoubleStreamDiT(nn.Module):
    """Text and then image in one softmax, each in a stream of its own; the picture's size is in ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(16, WIDTH), nn.Linear(8, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(2))

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor) -> Tensor:
        img, txt = self.img_in(img) + img_ids.sum(-1, keepdim=True).sin(), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt)
        return torch.cat([txt, img], dim=1)
