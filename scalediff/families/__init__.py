"""What the hook and the cascade must know of a model family, as data: a new family is one file and one row here."""

from __future__ import annotations

from torch import nn

from scalediff.families.base import Family
from scalediff.families.unet import UNET

FAMILIES: tuple[Family, ...] = (UNET,)


def family_of(denoiser: nn.Module) -> Family:
    """The family that knows this denoiser, recognised by class name so that no model library is imported.

    Raises:
        ValueError: no family knows it.
    """
    names = {cls.__name__ for cls in type(denoiser).__mro__}
    for family in FAMILIES:
        if family.denoiser in names:
            return family
    known = ", ".join(family.denoiser for family in FAMILIES)
    raise ValueError(f"patch_model knows the denoisers {known} and pipelines around them, got {type(denoiser).__name__}")
