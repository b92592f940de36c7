"""Which models `patch_model` knows, tried on the installed diffusers, and what is tested together with it.

`python -m bench.models --write` updates docs/guide/models.md and docs/guide/composition.md. `--check` fails where a page differs from the
installed diffusers (a new model, a removed one, or one whose attention modules are no longer reached) or from the tests.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Sequence

import diffusers
from torch import nn

import scalediff
from bench.harness.facts import ROOT, package_version
from bench.harness.pages import fill, page_parser, require_pandas, table, write_or_check
from bench.models import compositions
from bench.models.zoo import WINDOW, ZOO, Specimen
from scalediff.families import FAMILIES, family_of
from scalediff.families.base import Family
from scalediff.patching.networks import changes_picture, obstacle_to_changes

PAGE = ROOT / "docs" / "guide" / "models.md"
# Denoisers of pictures and videos: classes of diffusers in these places, by the shape of their names.
_PLACES = ("diffusers.models.unets.", "diffusers.models.transformers.", "diffusers.models.controlnets.")
_DENOISER = re.compile(r"^(?!Flax).*(Transformer2DModel|Transformer3DModel|DiT2D\w*Model|UNet\w*Model|ControlNet\w*Model|UNet)$")
_PIPELINES = re.compile(r"^diffusers\.pipelines\.(?!deprecated\.)")


def row(name: str, specimen: Specimen) -> dict[str, str]:
    """Patch a small model, run it above its native size, and compare the modules reached with those reported."""
    model = specimen.build()
    family = family_of(model)
    assert family is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with scalediff.patch_model(model, window=WINDOW) as handle:
            with contextlib.suppress(RuntimeError):  # a few models take square pictures only
                specimen.run(model, (9, 6))
            specimen.run(model, (8, 8))
            reached = set(model.__dict__["_scalediff"].seen)
    patched = {entry.module for entry in handle.report.patched}
    if reached != patched:
        raise RuntimeError(f"{name}: reported and reached modules differ: {sorted(reached ^ patched)}")
    rotates = family.rotation(model) is not None
    return {
        "model": name, "class": f"`{specimen.kind}`", "modules patched": f"{len(patched)} of {len(handle.report.rows)}",
        "grid from": f"`{family.grid_source}`", "text": family.text, "text rotated": "yes" if rotates else "-",
        "window": _native(family, model), "cascade": "yes" if family.cascade else f"no: {family.no_cascade}",
        "tested by": f"`test_families[{name}]`" + (", `test_joint`" if rotates else ""),
    }  # fmt: skip


def _native(family: Family, model: nn.Module) -> str:
    """Where the default window comes from: the specimens' own configurations are small."""
    grid = family.native_grid(model)
    if grid is None:
        return "that of its U-Net" if family.denoiser.startswith("ControlNet") else "`window=` required"
    return "`sample_size`" if grid == WINDOW else f"{grid[0]} x {grid[1]}"


def refused() -> list[str]:
    """One item for every reason."""
    reasons = sorted({family.refusal for family in FAMILIES.values()} - {""})
    names = {reason: [f"`{name}`" for name in sorted(FAMILIES) if FAMILIES[name].refusal == reason] for reason in reasons}
    return [f"- {reason}: {', '.join(names[reason])}" for reason in reasons]


def unlisted() -> list[str]:
    """Denoisers of the installed diffusers that scalediff does not list."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if _DENOISER.search(name) and name not in FAMILIES}
    classes = {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    return sorted(name for name, cls in classes.items() if cls.__module__.startswith(_PLACES))


def changing() -> list[str]:
    """The image-to-image and inpainting pipelines of the installed diffusers, by what the cascade does with them."""
    groups: dict[str, list[str]] = {"from a picture": [], "from a picture and a mask": []}
    for name in sorted(name for name in dir(diffusers) if name.endswith("Pipeline")):
        cls = getattr(diffusers, name)
        if not isinstance(cls, type) or not _PIPELINES.match(cls.__module__) or not changes_picture(cls):
            continue
        parts = inspect.signature(cls).parameters
        denoiser = next(parts[part].annotation for part in ("unet", "transformer") if part in parts)
        family = FAMILIES.get(getattr(denoiser, "__name__", ""))
        if family is None or "3D" in family.denoiser:  # none that is listed, or a video's
            continue
        why = obstacle_to_changes(cls) or family.refusal or family.no_cascade
        masked = "mask_image" in inspect.signature(cls.__call__).parameters
        group = f"not, because {why}" if why else "from a picture and a mask" if masked else "from a picture"
        groups.setdefault(group, []).append(f"`{name}`")
    return [f"- {group}: {', '.join(names)}" for group, names in groups.items()]


def page() -> str:
    """docs/guide/models.md; RuntimeError where diffusers lacks a listed class, or modules that should be patched are not reached."""
    from pandas import DataFrame

    if gone := sorted(name for name in FAMILIES if not hasattr(diffusers, name)):
        raise RuntimeError(f"the installed diffusers {package_version('diffusers')} no longer has {', '.join(gone)}")
    known = DataFrame([row(name, specimen) for name, specimen in ZOO.items()])
    others = [", ".join(f"`{name}`" for name in unlisted()) + "."]
    tables = {"known": table(known, text=known.columns), "changing": changing(), "refused": refused(), "unlisted": others}
    return fill(PAGE.read_text(), tables)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = page_parser("models", __doc__.split("\n")[0], "the tables of docs/guide/models.md and docs/guide/composition.md")
    options = parser.parse_args(arguments)
    require_pandas()
    pages = {PAGE: page(), compositions.PAGE: compositions.page()}
    write_or_check(pages, check=not options.write, command="python -m bench.models --write")


if __name__ == "__main__":
    main()
