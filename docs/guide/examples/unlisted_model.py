"""A model that scalediff does not know: say where its tokens are, check it, run it. `python docs/guide/examples/unlisted_model.py`"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff


class Transformer(nn.Module):
    """Latents `[B, 4, H, W]` in patches of 2 x 2, and four registers before them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.registers = nn.Conv2d(4, 32, 2, 2), nn.Parameter(torch.randn(1, 4, 32))
        self.blocks, self.out = nn.ModuleList(nn.Linear(32, 96) for _ in range(2)), nn.ConvTranspose2d(32, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        grid = x.shape[-2:]
        x = torch.cat([self.registers.expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
        for block in self.blocks:
            q, k, v = block(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x[:, 4:].mT.unflatten(-1, grid))


model = Transformer().eval()
handle = scalediff.patch_model(model, patch_size=2, text=("prefix", 4), window=(16, 16))
print(handle.check(torch.randn(1, 4, 32, 32)))
with torch.no_grad():
    model(torch.randn(1, 4, 64, 48))
print(handle.report)
