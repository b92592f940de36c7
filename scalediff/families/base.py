"""The contract of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from scalediff.grid import AttentionSite, Grid
from scalediff.settings import Settings


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        denoiser: Class name of the denoiser.
        grid_source: For the report: where `latent_grid` reads the grid.
        size_multiple: Pixels that a pipeline of this family wants its sizes to be a multiple of, beside the VAE's factor.
        sites: The attention modules of a denoiser.
        native_grid: The latent grid that the denoiser was trained on.
        latent_grid: The latent grid of one forward pass, from its arguments.
        preset: The cascade's default settings for this denoiser.
    """

    denoiser: str
    grid_source: str
    size_multiple: int
    sites: Callable[[nn.Module], tuple[AttentionSite, ...]]
    native_grid: Callable[[nn.Module], Grid]
    latent_grid: Callable[[tuple[Any, ...], Mapping[str, Any]], Grid]
    preset: Callable[[nn.Module], Settings]
