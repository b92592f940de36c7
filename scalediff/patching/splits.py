"""How a denoiser is split over the ranks of a mesh: its batch, the rows of its pictures in bands, or its tokens by diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from scalediff.families.base import Family
from scalediff.patching.bands import Bands
from scalediff.patching.context_parallel import RowSplit, check_not_parallel, check_row_split
from scalediff.patching.halves import Halves, splits_batch_alone

DenoiserSplit = Halves | Bands | RowSplit


def split_over(mesh: Any, module: nn.Module, family: Family, parameters: Sequence[str]) -> DenoiserSplit:
    """Split a denoiser over a mesh; errors as in `Halves`, `Bands` and `RowSplit`."""
    if splits_batch_alone(mesh):
        check_not_parallel(module)
        return Halves(mesh, parameters, () if family.cascade is None else family.cascade.batch_second)
    return Bands(mesh, parameters) if family.bands else RowSplit(module, family, mesh)


def check_split(mesh: Any, module: nn.Module, family: Family) -> None:
    """Check that a denoiser can be split over a mesh; errors as in `split_over`."""
    if splits_batch_alone(mesh) or family.bands:
        split_over(mesh, module, family, ())  # changes nothing before a pass
    else:
        check_row_split(module, family, mesh)


def check_control(mesh: Any, family: Family, control: nn.Module) -> None:
    """Check that the residuals of a ControlNet can be cut for a denoiser of this family.

    Raises:
        NotImplementedError: They cannot.
    """
    if not splits_batch_alone(mesh) and not family.bands:
        raise NotImplementedError(f"mesh= splits the rows of a transformer without ControlNets, got {type(control).__name__}")
