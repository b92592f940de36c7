"""The model families that scalediff supports, as data: a new family is a new entry in one of these files."""

from __future__ import annotations

from torch import nn

from scalediff.families.base import Family
from scalediff.families.flux import FLUX
from scalediff.families.hidream import HIDREAM
from scalediff.families.qwen import QWEN
from scalediff.families.refused import REFUSED
from scalediff.families.transformers import TRANSFORMERS
from scalediff.families.unet import UNETS
from scalediff.families.z_image import Z_IMAGE

FAMILIES: dict[str, Family] = {
    family.denoiser: family for family in (*UNETS, *FLUX, *TRANSFORMERS, *QWEN, *HIDREAM, *Z_IMAGE, *REFUSED)
}  # fmt: skip


def family_of(denoiser: nn.Module) -> Family | None:
    """The family of a denoiser, found by class name so that no model library is imported; None if it is not a known one."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return None
