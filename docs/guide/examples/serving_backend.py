"""An attention backend in the shape that vLLM-Omni and SGLang-Diffusion ask for, on an `AttentionPlan`.

Both create one implementation for each attention layer, with the arguments of `__init__` below, and call `forward(query, key, value,
attn_metadata)` with `[B, S, H, D]` tensors and without a token grid. The plan of a pass travels with the metadata: in the dictionary
`attn_metadata.extra` of vLLM-Omni, in an attribute of a subclass of SGLang's `AttentionMetadata`.

`python docs/guide/examples/serving_backend.py`
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff import AttentionPlan, Layout, Sequence

PLAN = "scalediff_plan"


def plan_of(attn_metadata: Any) -> AttentionPlan | None:
    """The plan that travels with the metadata of a call; None if there is none."""
    extra = getattr(attn_metadata, "extra", None) or {}
    plan = extra.get(PLAN, getattr(attn_metadata, PLAN, None))
    return plan if isinstance(plan, AttentionPlan) else None


class ScaleDiffImpl:
    """Derive it from the host's `AttentionImpl` as well. vLLM-Omni calls `forward_cuda` on a GPU, SGLang calls `forward`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,  # part of both hosts' contract
    ) -> None:
        if causal:
            raise NotImplementedError(f"windows are not causal, got causal={causal} for {prefix}")
        self.scale, self.grouped = softmax_scale, num_kv_heads not in (None, num_heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        plan, mask = plan_of(attn_metadata), getattr(attn_metadata, "attn_mask", None)
        if plan is not None:
            out = plan(query, key, value, mask=mask, scale=self.scale, enable_gqa=self.grouped)
            if out is not None:
                return out
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=self.grouped)
        return out.transpose(1, 2)

    forward_cuda = forward


if __name__ == "__main__":
    grid, text = (32, 24), 7  # of the pass: read from the latents and the prompt where the host prepares it
    plan = AttentionPlan(Layout(grid, (Sequence(grid, text=text),)), window=(16, 16))
    layer = ScaleDiffImpl(num_heads=4, head_size=32, softmax_scale=32**-0.5)
    q, k, v = (torch.randn(1, text + grid[0] * grid[1], 4, 32) for _ in range(3))
    print(layer.forward(q, k, v, SimpleNamespace(extra={PLAN: plan}, attn_mask=None)).shape, plan.why or "in windows")
