"""Small pictures in folders, a small network in place of InceptionV3, and one in place of CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.drawing import Item
from bench.evaluate.networks import Inception
from scalediff.cascade.metadata import save_png
from scalediff.cascade.workdir import digest


def picture(seed: int, size: tuple[int, int] = (48, 48), *, blur: bool = False) -> Image.Image:
    """Coloured noise over smooth shapes; blurred pictures of one seed have the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size, mode="bilinear")
    fine = torch.rand(1, 3, *size, generator=generator) - 0.5
    image = (coarse + (0.02 if blur else 0.4) * fine).clamp(0, 1)[0]
    return Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())


def plain_folder(path: Path, seeds: Sequence[int], size: tuple[int, int] = (48, 48), *, blur: bool = False) -> Path:
    path.mkdir(parents=True)
    for seed in seeds:
        picture(seed, size, blur=blur).save(path / f"{seed:03d}.png")
    return path


def generated_folder(path: Path, prompts: Sequence[str], size: tuple[int, int] = (48, 48), *, seed: int = 0, blur: bool = False) -> Path:
    """As `generate` leaves it."""
    path.mkdir(parents=True)
    for i, prompt in enumerate(prompts):
        save_png(picture(i, size, blur=blur), path / Item(i, prompt, seed + i).file, metadata={"prompt": prompt, "seconds": 1.0 + i})
    run = {"pictures": len(prompts), "model": "demo", "patch_border": 16, "prompts": digest(list(prompts))}
    (path / "run.json").write_text(json.dumps(run))
    return path


class SmallConvolutions(torch.nn.Module):
    """A fixed random network with InceptionV3's interface: 5 features and 4 logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.last = (torch.randn(shape, generator=generator) for shape in ((8, 3, 3, 3), (5, 8, 3, 3), (4, 5)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        assert pictures.dtype == torch.uint8
        hidden = F.conv2d(F.conv2d(pictures / 255, self.first, stride=2).relu(), self.second, stride=2)
        features = hidden.mean((2, 3))
        return features, features @ self.last.T


def small_inception() -> Inception:
    return Inception(SmallConvolutions(), torch.device("cpu"), features=5, side=32, name="a small network")


class RedMeansRed:
    """A text network that knows one word: the cosine is the share of red where the prompt says so, and below zero elsewhere."""

    name = "red"

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        red = pictures[:, 0].double().mean((1, 2)) / 255
        return torch.where(torch.tensor(["red" in prompt for prompt in prompts]), red, -red)
