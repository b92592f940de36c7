"""The model families that scalediff supports, as data: a new family is a new entry in one of these files, or is registered."""

from __future__ import annotations

from torch import nn

from scalediff.arguments import check_callable, wrong_type
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
_registered: dict[tuple[str, str], Family] = {}  # by class name and module


def register_family(family: Family) -> None:
    """Make `patch_model` recognise the denoisers of another model library.

    A denoiser belongs to the family if its class, or a base of it, has the name `family.denoiser` and is defined in the module
    `family.module` or below it. Registered families come before the built-in ones, which are diffusers' classes; registering a family
    for the same class and module again replaces it.

    Args:
        family: The description of the family; `docs/guide/extend.md` has a complete example.

    Raises:
        TypeError: `family` is not a `Family`, or `layout`, `native_grid`, `level` or `rotation` is not a function.
        ValueError: The family does not name a class and a module.
    """
    if not isinstance(family, Family):
        raise wrong_type("family", "a Family", family)
    if not family.denoiser or not family.module:
        raise ValueError(f"a family must name a class and its module, got denoiser={family.denoiser!r}, module={family.module!r}")
    for name in ("layout", "native_grid", "level", "rotation"):
        check_callable(name, getattr(family, name))
    _registered[family.denoiser, family.module] = family


def unregister_family(family: Family) -> None:
    """Forget a family that `register_family` made known, for tests and notebooks. Models that are patched stay patched.

    Args:
        family: The family, or another of the same `denoiser` and `module`.

    Raises:
        TypeError: `family` is not a `Family`.
        ValueError: No family is registered for its class and module.
    """
    if not isinstance(family, Family):
        raise wrong_type("family", "a Family", family)
    if (family.denoiser, family.module) not in _registered:
        known = ", ".join(f"{module}.{name}" for name, module in _registered) or "none"
        raise ValueError(f"family must be registered, got {family.module}.{family.denoiser}; registered are {known}")
    del _registered[family.denoiser, family.module]


def family_of(denoiser: nn.Module) -> Family | None:
    """The family of a denoiser, found by name and module of its class so that no model library is imported; None if there is none."""
    for cls in type(denoiser).__mro__:
        registered = [family for (name, _), family in _registered.items() if name == cls.__name__]
        registered.sort(key=lambda family: len(family.module), reverse=True)  # the innermost module first
        for family in (*registered, FAMILIES.get(cls.__name__)):
            if family is not None and f"{cls.__module__}.".startswith(f"{family.module}."):
                return family
    return None


def namesake_of(denoiser: nn.Module) -> Family | None:
    """A family with the name of a denoiser's class, which is defined in another module; None if there is none."""
    name = type(denoiser).__name__
    candidates = (*(family for (of, _), family in _registered.items() if of == name), FAMILIES.get(name))
    return next(iter(candidates), None) if family_of(denoiser) is None else None
