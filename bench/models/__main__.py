"""Which models `patch_model` knows, tried on the installed diffusers: `python -m bench.models --write` makes docs/guide/models.md anew.

`--check` fails where the page says otherwise than the installed diffusers does: a new model, a model that went, or one whose
attention modules are no longer reached.
"""

from __future__ import annotations

import argparse
import difflib
import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

import scalediff
from bench.harness import rows as harness
from bench.models.zoo import WINDOW, ZOO, Specimen
from scalediff.families import FAMILIES, family_of
from scalediff.families.base import Family

PAGE = harness.ROOT / "docs" / "guide" / "models.md"
# Denoisers of pictures and videos: classes of diffusers in these places, by the shape of their names.
_PLACES = ("diffusers.models.unets.", "diffusers.models.transformers.", "diffusers.models.controlnets.")
_DENOISER = re.compile(r"(Transformer2DModel|Transformer3DModel|DiT2D\w*Model|UNet\w*Model|ControlNet\w*Model|UNet)$")
_GRIDS = ((9, 6), (8, 8))


def known() -> str:
    """One row for every specimen, each of them patched and run."""
    heads = ("model", "class", "modules patched", "grid from", "text", "text turned", "window", "tried in")
    rows = [row(name, spec) for name, spec in ZOO.items()]
    return table(heads, rows)


def row(name: str, spec: Specimen) -> tuple[str, ...]:
    """Patch a small model, run it above its native size, and compare the modules reached with those reported."""
    model = spec.build()
    family = family_of(model)
    assert family is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with scalediff.patch_model(model, window=WINDOW) as handle:
            run(spec, model)
            reached = set(model.__dict__["_scalediff"].seen)
    patched = {entry.module for entry in handle.report.patched}
    if reached != patched:
        raise RuntimeError(f"{name}: reported and reached modules differ: {sorted(reached ^ patched)}")
    rotates = family.rotation(model) is not None
    tests = f"`test_families[{name}]`" + (", `test_joint`" if rotates else "")
    return (
        name, f"`{spec.kind}`", f"{len(patched)} of {len(handle.report.rows)}", f"`{family.grid_source}`", family.text,
        "yes" if rotates else "-", native(family, model), tests,
    )  # fmt: skip


def run(spec: Specimen, model: nn.Module) -> None:
    """At an oblong size; at a square one where the model takes no other."""
    try:
        spec.run(model, _GRIDS[0])
    except RuntimeError:
        spec.run(model, _GRIDS[1])


def native(family: Family, model: nn.Module) -> str:
    """Where the window comes from: the specimens' own configurations are small."""
    grid = family.native_grid(model)
    if grid is None:
        return "that of its U-Net" if family.denoiser.startswith("ControlNet") else "`window=` required"
    return "`sample_size`" if grid == WINDOW else f"{grid[0]} x {grid[1]}"


def refused() -> str:
    """One item for every reason."""
    classes: dict[str, list[str]] = {}
    for name, family in sorted(FAMILIES.items()):
        if family.refusal:
            classes.setdefault(family.refusal, []).append(f"`{name}`")
    return "\n".join(f"- {why}: {', '.join(names)}" for why, names in sorted(classes.items()))


def others() -> list[str]:
    """Denoisers of the installed diffusers that nobody has listed."""
    import diffusers

    found = []
    for name in dir(diffusers):
        if _DENOISER.search(name) and not name.startswith("Flax"):
            cls: Any = getattr(diffusers, name)
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith(_PLACES) and name not in FAMILIES:
                found.append(name)
    return sorted(found)


def gone() -> list[str]:
    """Listed classes that the installed diffusers does not have."""
    import diffusers

    return sorted(name for name in FAMILIES if not hasattr(diffusers, name))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def page() -> str:
    """docs/guide/models.md: prose from here, tables from the installed diffusers."""
    missing = gone()
    if missing:
        raise RuntimeError(f"the installed diffusers {harness.package_version('diffusers')} has no longer: {', '.join(missing)}")
    names = ", ".join(f"`{name}`" for name in others())
    parts = _PROSE.split("@")
    return parts[0] + known() + parts[1] + refused() + parts[2] + names + parts[3]


_PROSE = """# Models

`scalediff.patch_model(model)` changes attention above a model's native area, on any of the models below and on any `nn.Module` whose
attention reaches `F.scaled_dot_product_attention`. `print(handle.report)` shows the same per attention module.

## Known

Every row is a small random model of the real diffusers class, patched and run; the modules that the report calls patched are those
that were reached. `test_families` compares the whole model, in fp64, with full attention under a dense mask; `test_joint` holds
the text rule to the authors' (FLUX.1) and, by each model's own rotary tables, text to its distance from the window.

@

- *grid from*: the argument of the denoiser's forward pass that says how tokens lie.
- *text*: in the same softmax as the image (joint), and on which side of it; or in calls of its own (cross-attention), which stay
  as they are. Prompts padded to one length count as long as their masks say.
- *text turned*: rotary models whose text is turned for every window (`text_rope=True`): it keeps the distance to the window
  that it has to a native picture. CogView4, GLM-Image and ERNIE-Image rotate halves of channels, not pairs: their text is
  not turned. The others have no rotary positions for text.
- *window*: the default, in tokens; 64 x 64 is 1024 x 1024 pixels (HunyuanImage 2.1: 2048 x 2048). `window=(Y, X)` is another one.

Prompts may be padded. A mask that hides keys from all queries alike is kept, wherever the padding stands; Chroma, CogView4 and
GLM-Image add the mask of 0 and 1 to the scores as numbers, so that padding is attended to after all, and so it is here. Both are done
by eight more channels in queries and keys, which the kernel pays for where heads have a power of two of them (its cost is not
measured yet). Any other mask runs full attention, and so do reference tokens beside the picture (FLUX Kontext, Qwen-Image-Edit,
FLUX.2 and GLM-Image with a cache of them) and the adapters' own keys; each reason is said once.

Lumina-Next's pipeline stretches positions and sharpens attention above the trained size. Windows are of that size: the cascade switches
both off where it uses them. In a loop of one's own, `default_image_size` of the pipeline does so.

## Text queries

Under `text_queries="window"` (the authors' rule) each text token attends to text and window, for every window, and the results are
averaged. Under `"global"` it attends once, to text and the whole image.

## Models nobody listed

```python
scalediff.patch_model(vit, text=("prefix", 1))                          # patch size and trained grid are the module's own; a class token
scalediff.patch_model(dit, patch_size=2, text=("suffix", "caption"), window=(64, 64))      # [B, C, H, W] in; T is caption.shape[-2]
scalediff.patch_model(dit, grid=lambda arguments: my_grid(arguments["img_ids"]), text=("prefix", "txt"), window=(64, 64))
```

An autoencoder's own attention, nearly half of its decoder's work at 4096 x 4096 (4 S^2 C = 141 TFLOPs for S = 512^2 tokens of C = 512
channels, of the 299.5 in the column vae of `scalediff plan`), is that of such a module:

```python
scalediff.patch_model(pipe.vae.decoder, patch_size=1, window=(128, 128))                   # latents in, 128 x 128 of them at 1024 pixels
scalediff.patch_model(pipe.vae.encoder, patch_size=8, window=(128, 128))                   # pixels in, 8 a token
```

Nothing is guessed from a number of tokens. A call is taken when its length is that of the grid, or of grid and text; which modules
made such calls is in the report after the first pass above the window's area. If there was none, that pass raises an error
(`strict=True`) that names what was seen; a single call of an unexpected length warns once, by its module's name, and runs full
attention.

## Refused

@

## Not listed

In the installed diffusers, and to be patched as any other module, by `grid=` or `patch_size=`, `text=` and `window=`:
@.

## Together with

Each has a test (`tests/scalediff/patching/test_compiled.py`, `test_adapters.py`, `test_composition.py`): `torch.compile` of the whole model
and of repeated blocks, before or after patching; `set_attention_backend` and `attention_backend`; LoRA; IP-Adapter; ControlNet, whose
own attention is patched with the pipeline; offloading; layerwise casting; FirstBlockCache (with `jitter="none"` or `"alternate"`);
threads; autocast. Under `torch.compile` every offset of `jitter="random"` is a graph of its own.

A compiled function around the model is not possible with `fullgraph=True`: compile the model, or its blocks; every picture size is a
graph of its own. diffusers' context parallelism and gradient checkpointing are refused. Copies and pickles of a patched model are
not patched; `torch.export` does not see the patch. Call the model, not its `forward`: that opens no pass.

Microseconds that the patch costs beside the attention it computes are in `bench/results/hook-*.csv`, made by `python -m bench.hook`: per
attention call, and per forward pass, where up to the native size nothing but the layout of the tokens is looked up.

`scalediff.register_backend()` adds the name `"scalediff"` to diffusers' attention backends, for stacks that choose a backend by name.
The name does nothing by itself: where tokens lie on the picture comes from `patch_model`, and without it a call raises an error.

Made by `python -m bench.models --write`; `python -m bench.models --check` compares this page with the installed diffusers.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write docs/guide/models.md from the installed diffusers, or compare it.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", action="store_true", help="write docs/guide/models.md")
    way.add_argument("--check", action="store_true", help="fail where docs/guide/models.md differs")
    chosen = parser.parse_args(arguments)
    text = page()
    if chosen.write:
        harness.write_text(PAGE, text)
        return
    before = PAGE.read_text() if PAGE.exists() else ""
    if text != before:
        difference = difflib.unified_diff(
            before.splitlines(), text.splitlines(), str(PAGE.relative_to(harness.ROOT)), "installed diffusers", lineterm=""
        )
        raise SystemExit("\n".join([*difference, f"{PAGE.name} is not what `python -m bench.models --write` makes of this diffusers"]))


if __name__ == "__main__":
    main()
