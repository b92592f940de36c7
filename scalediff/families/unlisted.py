"""The family of one model, from what the user says about its token grid and text.

The grid is never guessed from the number of tokens: 4096 tokens may be 64 x 64 or 32 x 128. What the user says comes before what a known
family says; a known family fills in the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor, nn

from scalediff.families.base import Arguments, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, Side, UnknownLayout, checked_grid, level_grid
from scalediff.families.rotation import TextRotation

GridSource = Grid | Callable[[Arguments], Grid]
TextSource = tuple[Side, int | str]
LayoutSource = Callable[[Arguments], Layout]


@dataclass(frozen=True)
class Described:
    """What the user says about the tokens of a model: arguments of `patch_model`, None where nothing is said.

    Attributes:
        grid: Token grid `(Y, X)` of every forward pass, or a function that returns it from the named arguments.
        patch_size: Pixels or latents per token, to compute the grid from the first `[B, C, H, W]` argument.
        levels: Number of levels of the grid; each has half the rows and columns of the one before, rounded up.
        text: Side of the text tokens in the same softmax, and their number or the name of the argument `[B, T, C]` that holds them.
        layout: Function from the named arguments to the layout of the pass, instead of all of the above.
        rotation: Rotary positions by which text is rotated for each window.
    """

    grid: GridSource | None = None
    patch_size: int | None = None
    levels: int | None = None
    text: TextSource | None = None
    layout: LayoutSource | None = None
    rotation: TextRotation | None = None

    def __bool__(self) -> bool:
        return self != Described()

    def check(self, parameters: tuple[str, ...]) -> None:
        """Check the arguments against each other, and against the names of the arguments of `forward`.

        Raises:
            ValueError: `layout` is given together with another description of the tokens, or `text` or `grid` is malformed.
        """
        text, grid = self.text, self.grid
        others = [name for name in ("grid", "patch_size", "levels", "text") if getattr(self, name) is not None]
        if self.layout is not None and others:
            raise ValueError(f"layout= describes all tokens of a pass: leave out {', '.join(f'{name}=' for name in others)}")
        if text is not None and (len(text) != 2 or text[0] not in get_args(Side) or not isinstance(text[1], int | str)):
            raise ValueError(f'text must be ("prefix" or "suffix", a number of tokens or the name of an argument [B, T, C]), got {text!r}')
        if text is not None and isinstance(text[1], str) and text[1] not in parameters:
            raise ValueError(f"text must name an argument of the forward pass, one of {', '.join(parameters)}, got {text[1]!r}")
        if isinstance(grid, tuple) and (len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid)):
            raise ValueError(f"grid must be two positive integers (Y, X) in tokens, got {grid!r}")


def describe_family(model: nn.Module, parameters: tuple[str, ...], described: Described, known: Family | None, hint: str = "") -> Family:
    """Make the family of one model.

    Args:
        model: Any module whose attention reaches `F.scaled_dot_product_attention`.
        parameters: Names of the arguments of `forward`.
        described: What the user says about it.
        known: The family that the model belongs to, for what the user leaves out; None if there is none.
        hint: What to add to the error for a model without a grid.

    Raises:
        ValueError: As `Described.check`. Neither a grid nor a patch size is given or found, or rotary positions are given without text.
    """
    described.check(parameters)
    grid, text, rotation = described.grid, described.text, described.rotation
    if rotation is not None and text is None and described.layout is None and known is None:
        raise ValueError(f"text_rope=TextRotation(...) rotates text: pass text= too, got text=None and text_rope={rotation!r}")
    size = described.patch_size if described.patch_size is not None or known is not None else patch_size_of(model)
    if grid is None and size is None and described.layout is None and known is None:
        raise ValueError(
            f"{type(model).__name__} belongs to no known family: pass its token grid as grid=(Y, X) or as a function "
            f"grid=lambda arguments: (Y, X), or pass patch_size= if an argument is [B, C, H, W]; see docs/guide/models.md{hint}"
        )

    def tokens_of(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Grid:
        if grid is not None:
            return checked_grid(grid(arguments) if callable(grid) else grid)
        if known is not None and described.patch_size is None:
            return known.layout(denoiser, arguments, read).grid
        return _grid_from_argument(arguments, size or 1)

    def layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
        if described.layout is not None:
            return described.layout(arguments)
        tokens = tokens_of(denoiser, arguments, read)
        if known is not None and text is None and described.levels is None:  # the family's text and levels
            base = known.layout(denoiser, arguments, read)
            return replace(base, grid=tokens, sequences=tuple(replace(s, grid=level_grid(tokens, s.level)) for s in base.sequences))
        return _levels_layout(tokens, _levels(denoiser, described, known), text, arguments)

    source = "layout=" if described.layout is not None else "grid=" if grid is not None else f"first [B, C, H, W] argument // {size}"
    beside = "-" if text is None else f"joint, {text[0]} of {text[1]}"
    if known is not None:
        if grid is None and described.layout is None and described.patch_size is None:
            source = known.grid_source
        changes = {"grid_source": source, "text": known.text if text is None else beside, "layout": layout}
        of_known = known.rotation if rotation is None else lambda denoiser: rotation
        return replace(known, **changes, rotation=of_known)  # type: ignore[arg-type]
    return Family(
        denoiser=type(model).__name__,
        module=type(model).__module__,
        grid_source=source,
        text="layout=" if described.layout is not None else beside,
        native_grid=lambda denoiser: _native(denoiser, size),
        layout=layout,
        rotation=lambda denoiser: rotation,
        listed=False,
        wraps=rotation is None,  # what else has positions, the caller knows
    )


def _levels(denoiser: nn.Module, described: Described, known: Family | None) -> int:
    if described.levels is not None:
        return described.levels
    return 1 if known is None else 1 + max((site.level for site in known.sites(denoiser)), default=0)


def _levels_layout(tokens: Grid, levels: int, text: TextSource | None, arguments: Arguments) -> Layout:
    """The layout of image tokens alone at every level, and of image and text in one softmax; text may be among the keys only."""
    grids = [(level_grid(tokens, level), level) for level in range(levels)]
    alone = tuple(Sequence(grid, level) for grid, level in grids)
    # Text with as many tokens as a level would be taken for the image. At the finest level, the argument may be the image itself.
    lengths = {x.shape[1] for x in arguments.values() if isinstance(x, Tensor) and x.ndim == 3}
    others = tuple(sequence.area for sequence in alone[1:] if sequence.area in lengths)
    if text is None:
        return Layout(tokens, alone, others)
    side, of = text
    count = of if isinstance(of, int) else int(arguments[of].shape[-2])
    joint = (Sequence(grid, level, side, count, queries=queries) for grid, level in grids for queries in ("all", "image"))
    return Layout(tokens, (*joint, *alone), (count, *others))


def _grid_from_argument(arguments: Arguments, size: int) -> Grid:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim == 4:
            return value.shape[-2] // size, value.shape[-1] // size
    raise UnknownLayout("no argument is [B, C, H, W]: pass grid=")


def _parts(model: Any) -> list[Any]:
    parts = (getattr(model, name, None) for name in ("config", "patch_embed", "x_embedder"))
    return [model, *(part for part in parts if part is not None)]


def patch_size_of(model: nn.Module) -> int | None:
    """The attribute `patch_size` of the model or its parts, a common name in `timm` and research code; None if it is not one number."""
    for part in _parts(model):
        size = getattr(part, "patch_size", None)
        if isinstance(size, tuple | list) and len(size) == 2 and size[0] == size[1]:
            size = size[0]
        if isinstance(size, int):
            return size
    return None


def _native(model: nn.Module, size: int | None) -> Grid | None:
    """The native token grid: `grid_size`, as `timm` names it, or else `sample_size` divided by the patch size."""
    for part in _parts(model):
        grid = getattr(part, "grid_size", None)
        if isinstance(grid, tuple | list) and len(grid) == 2:
            return int(grid[0]), int(grid[1])
        sample = getattr(part, "sample_size", None)
        if isinstance(sample, int) and size:
            return sample // size, sample // size
    return None
