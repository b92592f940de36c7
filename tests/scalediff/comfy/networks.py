"""Small networks with the names, attributes and calling conventions of ComfyUI's, and random weights.

Each says which conventions it keeps: how its forward passes arguments to the wrappers, where text stands, and its position ids. Where a
convention is not said, it is that of ComfyUI 0.3.64.

Legend: B batch, C channels, Y x X token grid, T text tokens, S tokens, H heads, D head dim.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.scalediff.comfy.stand_in import WrappersMP, optimized_attention, timestep_features, wrapped

WIDTH, HEADS, TEXT = 24, 2, 5  # channels, heads, channels of text


def positions(grid: tuple[int, int], axes: int = 3) -> Tensor:
    """Position ids `[Y X, axes]` of image tokens, the last two axes rows and columns, from zero."""
    ids = torch.zeros(*grid, axes)
    ids[..., -2] += torch.arange(grid[0])[:, None]
    ids[..., -1] += torch.arange(grid[1])
    return ids.flatten(0, 1)


class EmbedND(nn.Module):
    """Contract (comfy/ldm/flux/layers.py): `theta` and `axes_dim`; pairs of channels are rotated, axis after axis."""

    def __init__(self, theta: float, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.theta, self.axes_dim = theta, axes_dim

    def angles(self, ids: Tensor) -> Tensor:
        """`[S, D / 2]` in fp64, of ids `[S, axes]`."""
        parts = []
        for ids_of_axis, dim in zip(ids.double().unbind(-1), self.axes_dim, strict=True):
            parts.append(ids_of_axis[:, None] * self.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        return torch.cat(parts, dim=-1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Rotate `[B, H, S, D]`."""
        angles = self.angles(ids)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    """Queries, keys and values of one stream, as `[B, H, S, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1) * 3, v


class Streams(nn.Module):
    """The frame of the transformers: latents to tokens, blocks over image and text, and back."""

    channels, patch_size, text_first = 4, 2, True

    def __init__(self) -> None:
        super().__init__()
        size = self.size
        self.img_in, self.txt_in = nn.Linear(self.channels * size**2, WIDTH), nn.Linear(TEXT, WIDTH)
        self.out, self.time_in = nn.Linear(WIDTH, self.channels * size**2), nn.Linear(WIDTH, WIDTH)

    @property
    def size(self) -> int:
        return self.patch_size if isinstance(self.patch_size, int) else self.patch_size[-1]

    def to_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Contract (comfy/ldm/common_dit.py): latents are padded to whole tokens."""
        x = x.squeeze(2) if x.ndim == 5 else x
        x = F.pad(x, (0, -x.shape[-1] % self.size, 0, -x.shape[-2] % self.size), mode="circular")
        grid = x.shape[-2] // self.size, x.shape[-1] // self.size
        return self.img_in(F.unfold(x, self.size, stride=self.size).mT), grid

    def to_latents(self, tokens: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
        size = grid[0] * self.size, grid[1] * self.size
        x = F.fold(self.out(tokens).mT, size, self.size, stride=self.size)[..., : like.shape[-2], : like.shape[-1]]
        return x.reshape(like.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        return optimized_attention(q, k, v, HEADS, skip_reshape=True, mask=mask, transformer_options=options)

    def image_ids(self, grid: tuple[int, int]) -> Tensor:
        return positions(grid)

    def text_ids(self, grid: tuple[int, int], text: int) -> Tensor:
        return torch.zeros(text, 3)

    def rotate(self, x: Tensor, grid: tuple[int, int], text: int) -> Tensor:
        ids = [self.text_ids(grid, text), self.image_ids(grid)]
        return self.pe_embedder(x, torch.cat(ids if self.text_first else ids[::-1]))

    def join(self, img: Tensor, txt: Tensor, dim: int) -> Tensor:
        return torch.cat([txt, img] if self.text_first else [img, txt], dim=dim)

    def split(self, x: Tensor, image: int) -> tuple[Tensor, Tensor]:
        text = x.shape[1] - image
        return (x[:, text:], x[:, :text]) if self.text_first else (x[:, :image], x[:, image:])


class DoubleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_attn, self.txt_attn = SelfAttention(), SelfAttention()

    def forward(self, net: Streams, img: Tensor, txt: Tensor, grid: tuple[int, int], mask: Any, options: Any) -> tuple[Tensor, Tensor]:
        parts = zip(self.img_attn.heads(img), self.txt_attn.heads(txt), strict=True)
        q, k, v = (net.join(a, b, 2) for a, b in parts)
        q, k = (net.rotate(x, grid, txt.shape[1]) for x in (q, k))
        of_img, of_txt = net.split(net.attend(q, k, v, mask, options), img.shape[1])
        return img + self.img_attn.proj(of_img), txt + self.txt_attn.proj(of_txt)


class Flux(Streams):
    """Contract (comfy/ldm/flux/model.py): `params`; arguments by position up to `transformer_options`; text first, at position zero."""

    axes, theta = (4, 4, 4), 10000

    def __init__(self, double: int = 2, single: int = 2) -> None:
        super().__init__()
        self.params = SimpleNamespace(axes_dim=self.axes, theta=self.theta, guidance_embed=True)
        self.pe_embedder = EmbedND(self.theta, self.axes)
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(double))
        self.single_blocks = nn.ModuleList(SelfAttention() for _ in range(single))

    def forward(
        self, x: Any, timestep: Any, context: Any, y: Any = None, guidance: Any = None, ref_latents: Any = None, control: Any = None,
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006  # as ComfyUI's
    ) -> Tensor:  # fmt: skip
        executor = wrapped(self._forward, self, WrappersMP.DIFFUSION_MODEL, transformer_options)
        out: Tensor = executor.execute(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)
        return out

    def _forward(
        self, x: Any, timestep: Any, context: Any, y: Any = None, guidance: Any = None, ref_latents: Any = None, control: Any = None,
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        img, grid = self.to_tokens(x)
        for ref in ref_latents or []:  # tokens of a second picture follow the first
            img = torch.cat([img, self.to_tokens(ref)[0]], dim=1)
        return self.to_latents(self.blocks(img, grid, timestep, context, control, transformer_options, **kwargs), grid, x)

    def blocks(self, img: Any, grid: Any, timestep: Any, context: Any, control: Any, options: Any, **kwargs: Any) -> Tensor:
        mask, image = kwargs.get("attention_mask"), grid[0] * grid[1]
        img = img + self.time_in(timestep_features(timestep.to(img), WIDTH))[:, None]
        txt = self.txt_in(context)
        for block in self.double_blocks:
            if img.shape[1] == image:
                img, txt = block(self, img, txt, grid, mask, options)
            else:  # with a second picture: no positions, for what is tested does not depend on them
                q, k, v = block.img_attn.heads(self.join(img, txt, 1))
                img, txt = self.split(block.img_attn.proj(self.attend(q, k, v, mask, options)), img.shape[1])
            img = img + control["input"][0] if control is not None else img
        if img.shape[1] != image:
            return img[:, :image]
        x = self.join(img, txt, 1)
        for block in self.single_blocks:
            q, k, v = block.heads(x)
            q, k = (self.rotate(part, grid, txt.shape[1]) for part in (q, k))
            x = x + block.proj(self.attend(q, k, v, mask, options))
        return self.split(x, image)[0]


class Chroma(Flux):
    """Contract (comfy/ldm/chroma/model.py): as Flux, with blocks that another node may skip."""

    def __init__(self) -> None:
        super().__init__()
        del self.params.guidance_embed
        self.skip_mmdit, self.skip_dit = list[int](), list[int]()


class HunyuanVideo(Flux):
    """Contract (comfy/ldm/hunyuan_video/model.py): HunyuanImage has patches of two axes, image first, a second text and a refiner."""

    axes, theta, patch_size, text_first = (6, 6), 256, (1, 1), False

    def __init__(self) -> None:
        super().__init__(single=0)
        self.refiner = SelfAttention()

    def image_ids(self, grid: tuple[int, int]) -> Tensor:
        return positions(grid, 2)

    def text_ids(self, grid: tuple[int, int], text: int) -> Tensor:
        return torch.zeros(text, 2)

    def forward(
        self, x: Any, timestep: Any, context: Any, y: Any = None, txt_byt5: Any = None, guidance: Any = None, attention_mask: Any = None,
        guiding_frame_index: Any = None, ref_latent: Any = None, control: Any = None, transformer_options: Any = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        executor = wrapped(self._forward, self, WrappersMP.DIFFUSION_MODEL, transformer_options)
        arguments = (
            x,
            timestep,
            context,
            y,
            txt_byt5,
            guidance,
            attention_mask,
            guiding_frame_index,
            ref_latent,
            control,
            transformer_options,
        )
        out: Tensor = executor.execute(*arguments, **kwargs)
        return out

    def _forward(
        self, x: Any, timestep: Any, context: Any, y: Any = None, txt_byt5: Any = None, guidance: Any = None, attention_mask: Any = None,
        guiding_frame_index: Any = None, ref_latent: Any = None, control: Any = None, transformer_options: Any = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        img, grid = self.to_tokens(x)
        projected = self.txt_in(context)
        refined = projected + self.refiner.proj(self.attend(*self.refiner.heads(projected), None, transformer_options))
        text = refined if txt_byt5 is None else torch.cat([refined, self.txt_in(txt_byt5)], dim=1)
        mask = None
        if attention_mask is not None:  # hides keys of text, as a score bias [1, 1, S]
            mask = x.new_zeros(1, 1, img.shape[1] + text.shape[1])
            mask[..., img.shape[1] : img.shape[1] + context.shape[1]] = (attention_mask - 1) * torch.finfo(x.dtype).max
        img = img + self.time_in(timestep_features(timestep.to(img), WIDTH))[:, None]
        for block in self.double_blocks:
            img, text = block(self, img, text, grid, mask, transformer_options)
        return self.to_latents(img, grid, x)
