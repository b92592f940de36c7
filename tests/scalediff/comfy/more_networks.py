"""More networks as in `networks.py`: those of one stream, SD3's and the U-Net.

Legend: B batch, C channels, Y x X token grid, T text tokens, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.scalediff.comfy.networks import (
    HEADS,
    TEXT,
    WIDTH,
    Chroma,
    DoubleBlock,
    EmbedND,
    Flux,
    HunyuanVideo,
    SelfAttention,
    Streams,
    positions,
)  # fmt: skip
from tests.scalediff.comfy.stand_in import WrappersMP, optimized_attention, timestep_features, wrapped


class QwenImageTransformer2DModel(Streams):
    """Contract (comfy/ldm/qwen_image/model.py): latents with one frame; rows, columns and text counted from the picture's centre."""

    def __init__(self) -> None:
        super().__init__()
        self.pe_embedder = EmbedND(10000, (4, 4, 4))
        self.transformer_blocks = nn.ModuleList(DoubleBlock() for _ in range(2))

    def image_ids(self, grid: tuple[int, int]) -> Tensor:
        return positions(grid) - torch.tensor([0, grid[0] // 2, grid[1] // 2])

    def text_ids(self, grid: tuple[int, int], text: int) -> Tensor:
        return (max(grid) // 2 + torch.arange(text))[:, None].expand(-1, 3)

    def forward(
        self, x: Any, timestep: Any, context: Any, attention_mask: Any = None, ref_latents: Any = None, additional_t_cond: Any = None,
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        executor = wrapped(self._forward, self, WrappersMP.DIFFUSION_MODEL, transformer_options)
        out: Tensor = executor.execute(x, timestep, context, attention_mask, ref_latents, additional_t_cond, transformer_options, **kwargs)
        return out

    def _forward(
        self, x: Any, timesteps: Any, context: Any, attention_mask: Any = None, ref_latents: Any = None, additional_t_cond: Any = None,
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        (img, grid), txt = self.to_tokens(x), self.txt_in(context)
        for block in self.transformer_blocks:
            img, txt = block(self, img, txt, grid, None, transformer_options)
        return self.to_latents(img, grid, x)


class NextDiT(Streams):
    """Contract (comfy/ldm/lumina/model.py): text, image and, in Z-Image, tokens that pad both; each is refined alone first."""

    def __init__(self, pad_tokens_multiple: int | None = None) -> None:
        super().__init__()
        self.pad_tokens_multiple, self.axes_dims = pad_tokens_multiple, (4, 4, 4)
        self.rope_embedder = EmbedND(10000.0 if pad_tokens_multiple is None else 256.0, self.axes_dims)
        self.layers, self.noise_refiner, self.context_refiner = (nn.ModuleList(SelfAttention() for _ in range(n)) for n in (2, 1, 1))

    def text_ids(self, grid: tuple[int, int], text: int) -> Tensor:
        return F.pad(torch.arange(1.0, text + 1)[:, None], (0, 2))

    def image_ids(self, grid: tuple[int, int]) -> Tensor:
        return positions(grid)  # their first axis is the number of text tokens plus one, the same for every token

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[1] % (self.pad_tokens_multiple or 1)), value=0.5)

    def layer(self, block: SelfAttention, x: Tensor, ids: Tensor, options: Any) -> Tensor:
        q, k, v = block.heads(x)
        q, k = (self.rope_embedder(part, ids) for part in (q, k))
        return x + block.proj(self.attend(q, k, v, None, options))

    def forward(self, x: Any, timesteps: Any, context: Any, num_tokens: Any, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        executor = wrapped(self._forward, self, WrappersMP.DIFFUSION_MODEL, kwargs.get("transformer_options", {}))
        out: Tensor = executor.execute(x, timesteps, context, num_tokens, attention_mask, **kwargs)
        return out

    def _forward(
        self, x: Any, timesteps: Any, context: Any, num_tokens: Any, attention_mask: Any = None, ref_latents: Any = (),
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        (tokens, grid), text = self.to_tokens(x), self.padded(self.txt_in(context))
        image, img = tokens.shape[1], self.padded(tokens)
        text_ids = self.text_ids(grid, text.shape[1])
        img_ids = F.pad(self.image_ids(grid), (0, 0, 0, img.shape[1] - image))
        for block in self.context_refiner:
            text = self.layer(block, text, text_ids, transformer_options)
        for block in self.noise_refiner:
            img = self.layer(block, img, img_ids, transformer_options)
        joint = torch.cat([text, img], dim=1)
        for block in self.layers:
            joint = self.layer(block, joint, torch.cat([text_ids, img_ids]), transformer_options)
        return self.to_latents(joint[:, text.shape[1] : text.shape[1] + image], grid, x)


class JointBlock(nn.Module):
    def __init__(self, x_block_self_attn: bool) -> None:
        super().__init__()
        self.context_block, self.x_block = SelfAttention(), SelfAttention()
        self.x_block.x_block_self_attn = x_block_self_attn
        self.attn2 = SelfAttention()


class MMDiT(Streams):
    """Contract (comfy/ldm/modules/diffusionmodules/mmdit.py): SD3; text before the image; some blocks attend to the image alone, too."""

    register_length = 0

    def __init__(self) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList(JointBlock(alone) for alone in (True, False))

    def forward(
        self, x: Any, t: Any, y: Any = None, context: Any = None, control: Any = None, transformer_options: Any = {}  # noqa: B006
    ) -> Tensor:  # fmt: skip
        executor = wrapped(self._forward, self, WrappersMP.DIFFUSION_MODEL, transformer_options)
        out: Tensor = executor.execute(x, t, y, context, control, transformer_options)
        return out

    def _forward(
        self, x: Any, t: Any, y: Any = None, context: Any = None, control: Any = None, transformer_options: Any = {}  # noqa: B006
    ) -> Tensor:  # fmt: skip
        (img, grid), txt = self.to_tokens(x), self.txt_in(context)
        for block in self.joint_blocks:
            parts = [self.join(a, b, 2) for a, b in zip(block.x_block.heads(img), block.context_block.heads(txt), strict=True)]
            flat = [part.transpose(1, 2).flatten(2) for part in parts]
            out = optimized_attention(*flat, heads=HEADS, transformer_options=transformer_options)
            of_img, of_txt = self.split(out, img.shape[1])
            if block.x_block.x_block_self_attn:
                alone = [part.transpose(1, 2).flatten(2) for part in block.attn2.heads(img)]
                img = img + block.attn2.proj(optimized_attention(*alone, heads=HEADS, transformer_options=transformer_options))
            img, txt = img + block.x_block.proj(of_img), txt + block.context_block.proj(of_txt)
        return self.to_latents(img, grid, x)


class OpenAISignatureMMDITWrapper(MMDiT):
    """Contract: SD3's class, whose forward has the arguments of the U-Net's."""

    def forward(
        self, x: Any, timesteps: Any, context: Any = None, y: Any = None, control: Any = None, transformer_options: Any = {}, **kwargs: Any  # noqa: B006
    ) -> Tensor:  # fmt: skip
        return super().forward(x, timesteps, context=context, y=y, control=control, transformer_options=transformer_options)


class CrossAttention(nn.Module):
    """Contract (comfy/ldm/modules/attention.py): `[B, S, H D]`; another node may replace the attention of a block."""

    def __init__(self, context: int = WIDTH) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(context, WIDTH), nn.Linear(context, WIDTH)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor, options: Any, kind: str) -> Tensor:
        q, k, v = self.to_q(x) * 2, self.to_k(context), self.to_v(context)
        replacement = options.get("patches_replace", {}).get(kind, {}).get(options["block"])
        if replacement is not None:
            return self.to_out(replacement(q, k, v, {"n_heads": HEADS, **options}))
        return self.to_out(optimized_attention(q, k, v, HEADS, attn_precision=torch.float32, transformer_options=options))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(), CrossAttention(TEXT)

    def forward(self, x: Tensor, context: Tensor, options: Any) -> Tensor:
        size, x = x.shape[-2:], x.flatten(2).mT
        normed = F.layer_norm(x, x.shape[-1:])
        x = x + self.attn1(normed, normed, options, "attn1")
        x = x + self.attn2(F.layer_norm(x, x.shape[-1:]), context, options, "attn2")
        return x.mT.unflatten(-1, size)


class UNetModel(nn.Module):
    """Contract (comfy/ldm/modules/diffusionmodules/openaimodel.py): `channel_mult`; self-attention at every level, text beside it."""

    channels, channel_mult = 4, (1, 2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1) for _ in range(2))
        self.time_embed, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(5))

    def forward(
        self, x: Any, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None, transformer_options: Any = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        executor = wrapped(self._forward, self, WrappersMP.DIFFUSION_MODEL, transformer_options)
        out: Tensor = executor.execute(x, timesteps, context, y, control, transformer_options, **kwargs)
        return out

    def _forward(
        self, x: Any, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None, transformer_options: Any = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        def block(number: int, h: Tensor) -> Tensor:
            transformer_options["block"] = ("input", number)
            return self.blocks[number](h, context, transformer_options)

        h = self.first(x) + self.time_embed(timestep_features(timesteps.to(x), WIDTH))[..., None, None]
        levels = [block(0, h)]
        for number, down in enumerate(self.down, 1):
            levels.append(block(number, down(levels[-1])))
        h = levels.pop()
        h = h if control is None else h + control["middle"][0]
        for number, skip in enumerate(reversed(levels), 3):
            h = block(number, skip + F.interpolate(h, size=skip.shape[-2:]))
        return self.last(h)


MODULES = {
    UNetModel: "comfy.ldm.modules.diffusionmodules.openaimodel", Flux: "comfy.ldm.flux.model", Chroma: "comfy.ldm.chroma.model",
    MMDiT: "comfy.ldm.modules.diffusionmodules.mmdit", OpenAISignatureMMDITWrapper: "comfy.ldm.modules.diffusionmodules.mmdit",
    NextDiT: "comfy.ldm.lumina.model", QwenImageTransformer2DModel: "comfy.ldm.qwen_image.model",
    HunyuanVideo: "comfy.ldm.hunyuan_video.model",
}  # fmt: skip
for cls, module in MODULES.items():
    cls.__module__ = module  # networks are recognised by name and module
