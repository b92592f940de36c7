"""The embedded model's upsampler, and its training: `python -m scalediff.demo.upsampler --export runs/upsampler.safetensors`.

A small network that doubles a decoded picture. What is lost between two sizes is partly determined (edges) and partly random (texture), so
the network also sees noise, and learns the distribution of the larger picture by the energy score (arXiv:2307.00835): two samples should
each be near the true render, and as far from each other as two true renders are. A mean error would leave out the texture.

Legend: B batch, y x x picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.demo import DEMO_PATH, load_demo
from scalediff.demo.architecture import NATIVE
from scalediff.demo.scenes import render

WEIGHTS = DEMO_PATH / "upsampler" / "model.safetensors"
CROP = 32  # pixels per side of the pictures that training doubles
NOISE = 0.5  # standard deviation in use, where training has 1: less grain in skies; least SWD of 0, 0.5, 1 on other scenes
WINDOWS = (1, 4)  # pixels per side of the windows whose joint distribution is compared


class SceneUpsampler(nn.Module):
    """A residual network on top of bicubic interpolation: pictures `[B, 3, y, x]` in [0, 1] to `[B, 3, 2y, 2x]`."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 + 4, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, 3 * 4, 3, padding=1)

    def forward(self, picture: Tensor, noise: Tensor | None = None) -> Tensor:
        """The doubled picture; with noise `[B, 4, y, x]`, by default `noise_of` the picture."""
        noise = noise_of(picture) if noise is None else noise
        x = self.first(torch.cat([2 * picture - 1, noise.to(picture)], dim=1))
        for block in self.blocks:
            x = x + block(F.silu(x))
        larger = F.interpolate(picture, scale_factor=2, mode="bicubic") + F.pixel_shuffle(self.last(F.silu(x)), 2)
        return larger if self.training else larger.clamp(0, 1)


def noise_of(picture: Tensor) -> Tensor:
    """The noise `[B, 4, y, x]` in use for pictures `[B, 3, y, x]`: of standard deviation `NOISE`, always the same for a size."""
    drawn = torch.randn(1, 4, *picture.shape[-2:], generator=torch.Generator().manual_seed(0))
    return NOISE * drawn.expand(len(picture), -1, -1, -1)


def energy_score(one: Tensor, two: Tensor, true: Tensor) -> Tensor:
    """The energy score of two samples `[B, 3, y, x]`, summed over windows: least for samples of the true conditional distribution."""
    return torch.stack([(_apart(one, true, k) + _apart(two, true, k) - _apart(one, two, k)) / 2 for k in WINDOWS]).sum()


def _apart(a: Tensor, b: Tensor, window: int) -> Tensor:
    """Mean distance of the windows of two pictures."""
    return F.avg_pool2d((a - b).square().mean(1, keepdim=True), window, stride=1).add(1e-8).sqrt().mean()


@torch.no_grad()
def pairs(pipe: Any, size: int, n: int) -> tuple[Tensor, Tensor]:
    """Scenes 0 to n - 1 at a size, as the autoencoder decodes them, and their true renders at twice the size; in uint8."""
    parts = [2 * part - 1 for part in render(0, n, size).split(16)]
    decoded = torch.cat([pipe.vae.decode(pipe.vae.encode(part).latent_dist.mode()).sample for part in parts])
    return _to_bytes(decoded / 2 + 0.5), _to_bytes(render(0, n, 2 * size))


def train(pipe: Any, *, steps: int, scenes: int, batch: int) -> SceneUpsampler:
    """Train on crops of pairs of one and two times the native size, with AdamW and cosine decay; the averaged weights are returned."""
    data = [pairs(pipe, NATIVE, scenes), pairs(pipe, 2 * NATIVE, scenes // 2)]
    torch.manual_seed(0)
    network = SceneUpsampler()
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    total, since = 0.0, time.perf_counter()
    for step in range(steps):
        small, true = _crops(data, batch, torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            one, two = network(small.repeat(2, 1, 1, 1), torch.randn(2 * batch, 4, CROP, CROP)).chunk(2)
        loss = energy_score(one, two, true)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(network)
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{step + 1}/{steps} loss {total / 100:.5f} {time.perf_counter() - since:.0f} s", flush=True)
            total = 0.0
    network.load_state_dict(average.module.state_dict())
    return network


def _crops(data: list[tuple[Tensor, Tensor]], batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops `[B, 3, CROP, CROP]` of decoded pictures and the same parts of the true renders, half of each size."""
    found = []
    for small, true in data:
        for i in torch.randint(len(small), (batch // 2,), generator=rng).tolist():
            y, x = torch.randint(small.shape[-1] - CROP + 1, (2,), generator=rng).tolist()
            found.append((small[i, :, y : y + CROP, x : x + CROP], true[i, :, 2 * y : 2 * (y + CROP), 2 * x : 2 * (x + CROP)]))
    if int(torch.randint(2, (), generator=rng)):
        found = [(small.flip(-1), true.flip(-1)) for small, true in found]
    smalls, trues = zip(*found, strict=True)
    return torch.stack(smalls) / 255, torch.stack(trues) / 255


def _to_bytes(pictures: Tensor) -> Tensor:
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def main(arguments: Iterable[str] | None = None) -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", type=Path, required=True, help="file of the weights, in fp16")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--scenes", type=int, default=1200, help="number of training scenes")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    options = parser.parse_args(None if arguments is None else list(arguments))
    network = train(load_demo(), steps=options.steps, scenes=options.scenes, batch=options.batch)
    options.export.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in network.state_dict().items()}, options.export)


if __name__ == "__main__":
    main()
