"""How a denoiser is split over the ranks of a mesh: its batch, the rows of its pictures in bands, or its tokens by diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed, nn

from scalediff.families.base import Family
from scalediff.patching.bands import Bands
from scalediff.patching.context_parallel import RowSplit, check_not_parallel, check_row_split
from scalediff.patching.halves import Halves, splits_batch_alone
from scalediff_kernels.distributed.groups import groups_of

DenoiserSplit = Halves | Bands | RowSplit


@dataclass(frozen=True)
class Shares:
    """Into how many parts the ranks of a mesh split a pass above the native area.

    Attributes:
        rows: Number of bands of rows in the denoiser.
        samples: Number of parts of its batch.
        pictures: Number of bands of rows in the autoencoder, if its layers allow it.
        multiple: Number of which the rows of the denoiser's tokens must be a multiple.
    """

    rows: int = 1
    samples: int = 1
    pictures: int = 1
    multiple: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.rows * self.samples


WHOLE = Shares()


def shares_of(mesh: Any, module: nn.Module, family: Family) -> Shares:
    """The shares of a denoiser that is split over a mesh.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: It cannot be, as in `split_over`.
    """
    check_split(mesh, module, family)
    sizes = [distributed.get_world_size(group) for group in groups_of(mesh)]
    if splits_batch_alone(mesh):
        return Shares(samples=sizes[0], pictures=sizes[0])
    rows, halvings = sizes[-1], levels_of(module) - 1 if family.bands else 0
    return Shares(rows, math.prod(sizes[:-1]), rows, rows << halvings if rows > 1 else 1)


def levels_of(unet: Any) -> int:
    """Number of levels of a U-Net."""
    return len(unet.config.block_out_channels)


def split_over(mesh: Any, module: nn.Module, family: Family, parameters: Sequence[str]) -> DenoiserSplit:
    """Split a denoiser over a mesh; errors as in `Halves`, `Bands` and `RowSplit`."""
    if splits_batch_alone(mesh):
        check_not_parallel(module)
        return Halves(mesh, parameters, () if family.cascade is None else family.cascade.batch_second)
    if family.bands:
        return Bands(mesh, parameters, levels_of(module))
    return RowSplit(module, family, mesh)


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
