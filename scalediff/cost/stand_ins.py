"""Methods of networks that do not run on the meta device alone, and what replaces them there: results of the same shapes by the same work.

In a mixture of experts no values say which expert gets which token, so every expert gets as many. The FLOPs are those of any other choice,
because an expert computes each of its tokens alike, and each token has the same number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def runnable_on_meta(network: M) -> M:
    """The same network, with methods replaced that do not run on the meta device. It must not be used on another one."""
    for module in network.modules():
        if type(module).__name__ in _STAND_INS:
            name, function = _STAND_INS[type(module).__name__]
            setattr(module, name, MethodType(function, module))
    return network


def _hidream_experts(layer: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The routed part of a layer of HiDream-I1: tokens `[S, C]`, and in a row the expert and the weight of each of their copies."""
    order = experts.argsort()
    total = torch.zeros_like(x)
    for expert, copies in zip(layer.experts, order.tensor_split(len(layer.experts)), strict=True):
        tokens = copies // layer.num_activated_experts
        out = expert(x[tokens]).mul_(weights[copies])
        total.scatter_reduce_(0, tokens[:, None].repeat(1, x.shape[-1]), out, reduce="sum")
    return total


def _hidream_latents(denoiser: Any, x: Tensor, sizes: Tensor, is_training: bool) -> Tensor:
    """As many numbers as the latents of HiDream-I1, whose height and width the meta device does not know."""
    return x.clone()


def _nucleus_experts(layer: Any, x: Tensor, counts: Tensor) -> Tensor:
    """The experts of NucleusMoE-Image: tokens `[S, C]` in the order of the experts, each of which chooses the same number of them."""
    parts = []
    for tokens, gate_up, down in zip(x.tensor_split(layer.num_experts), layer.gate_up_proj, layer.down_proj, strict=True):
        gate, up = (tokens @ gate_up).chunk(2, dim=-1)
        parts.append((nn.functional.silu(gate) * up) @ down)
    return torch.cat(parts)


def _ernie_positions(layer: Any, ids: Tensor) -> Tensor:
    """The rotary table `[B, S, 1, D]` of ERNIE-Image, whose code names the device to torch.autocast, which does not know this one."""
    return torch.empty(*ids.shape[:-1], 1, sum(layer.axes_dim), dtype=torch.float32, device=ids.device)


def _chroma_block(block: Any, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """A block of Chroma, which multiplies the mask of every pair of tokens: a product that nothing reads, not computed on the CPU."""
    mask = None if attention_mask is None else attention_mask.to("meta")
    return type(block).forward(block, *args, attention_mask=mask, **kwargs)


# By class name: the method, and what replaces it.
_STAND_INS: Mapping[str, tuple[str, Any]] = {
    "MOEFeedForwardSwiGLU": ("moe_infer", _hidream_experts),
    "HiDreamImageTransformer2DModel": ("unpatchify", _hidream_latents),
    "SwiGLUExperts": ("forward", _nucleus_experts),
    "ErnieImageEmbedND3": ("forward", _ernie_positions),
    "ChromaTransformerBlock": ("forward", _chroma_block),
    "ChromaSingleTransformerBlock": ("forward", _chroma_block),
}
