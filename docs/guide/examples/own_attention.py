"""The operation alone, in an attention class of your own. `python docs/guide/examples/own_attention.py`"""

import torch
from torch import Tensor, nn

from scalediff_kernels import joint_neighborhood_patch_attention


class JointAttention(nn.Module):
    """Text and image tokens in one softmax: image queries see text and one window, text queries see everything."""

    def __init__(self, channels: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.window, self.patch = heads, window, (window[0] // 2, window[1] // 2)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Image `[B, Y, X, C]` and text `[B, T, C]`."""
        of_image = self.qkv(image).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each [B, Y, X, H, D]
        of_text = self.qkv(text).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each [B, T, H, D]
        image_out, text_out = joint_neighborhood_patch_attention(
            *of_image, *of_text, window=self.window, patch=self.patch, text_queries="global"
        )  # fmt: skip
        return self.out(image_out.flatten(-2)), self.out(text_out.flatten(-2))


attention = JointAttention(channels=64, heads=4, window=(16, 16))
image, text = attention(torch.randn(1, 32, 24, 64), torch.randn(1, 7, 64))
print(image.shape, text.shape)
