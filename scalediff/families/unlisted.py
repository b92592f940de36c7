"""The family of a model that is not listed, from what the user says about its token grid and text.

The grid is never guessed from the number of tokens: 4096 tokens may be 64 x 64 or 32 x 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor, nn

from scalediff.families.base import Arguments, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, Side, UnknownLayout
from scalediff.families.rotation import TextRotation

GridSource = Grid | Callable[[Arguments], Grid]
TextSource = tuple[Side, int | str]


def unlisted(
    model: nn.Module,
    parameters: tuple[str, ...],
    *,
    grid: GridSource | None,
    patch_size: int | None,
    text: TextSource | None,
    rotation: TextRotation | None = None,
) -> Family:
    """Make the family of one model.

    Args:
        model: Any module whose attention reaches `F.scaled_dot_product_attention`.
        parameters: Names of the arguments of `forward`.
        grid: Token grid `(Y, X)` of every forward pass, or a function that returns it from the named arguments; None to compute it
            from the first `[B, C, H, W]` argument and the patch size.
        patch_size: Pixels or latents per token; the model's `patch_size` when None.
        text: Side of the text tokens in the same softmax, and their number or the name of the argument `[B, T, C]` that holds them.
        rotation: Rotary positions by which text is rotated for each window; text is not rotated when None.

    Raises:
        ValueError: `rotation` is given without `text`. Neither a grid nor a patch size is given or found, or `text` is malformed.
    """
    if text is not None and (len(text) != 2 or text[0] not in get_args(Side) or not isinstance(text[1], int | str)):
        raise ValueError(f'text must be ("prefix" or "suffix", a number of tokens or the name of an argument [B, T, C]), got {text!r}')
    if text is not None and isinstance(text[1], str) and text[1] not in parameters:
        raise ValueError(f"text must name an argument of the forward pass, one of {', '.join(parameters)}, got {text[1]!r}")
    if isinstance(grid, tuple) and (len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid)):
        raise ValueError(f"grid must be two positive integers (Y, X) in tokens, got {grid!r}")
    if rotation is not None and text is None:
        raise ValueError(f"text_rope=TextRotation(...) rotates text: pass text= too, got text=None and text_rope={rotation!r}")
    size = patch_size if patch_size is not None else _patch_size(model)
    if grid is None and size is None:
        raise ValueError(
            f"{type(model).__name__} belongs to no known family: pass its token grid as grid=(Y, X) or as a function "
            f"grid=lambda arguments: (Y, X), or pass patch_size= if an argument is [B, C, H, W]; see docs/guide/models.md"
        )

    def layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
        tokens = grid(arguments) if callable(grid) else grid or _grid_from_argument(arguments, size or 1)
        if text is None:
            return Layout(tokens, (Sequence(tokens),))
        side, of = text
        count = of if isinstance(of, int) else int(arguments[of].shape[-2])
        return Layout(tokens, (Sequence(tokens, side=side, text=count), Sequence(tokens)), (count,))

    source = "grid=" if grid is not None else f"first [B, C, H, W] argument // {size}"
    return Family(
        denoiser=type(model).__name__,
        grid_source=source,
        text="-" if text is None else f"joint, {text[0]} of {text[1]}",
        native_grid=lambda denoiser: _native(denoiser, size),
        layout=layout,
        rotation=lambda denoiser: rotation,
        listed=False,
    )


def _grid_from_argument(arguments: Arguments, size: int) -> Grid:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim == 4:
            return value.shape[-2] // size, value.shape[-1] // size
    raise UnknownLayout("no argument is [B, C, H, W]: pass grid=")


def _parts(model: Any) -> list[Any]:
    parts = (getattr(model, name, None) for name in ("config", "patch_embed", "x_embedder"))
    return [model, *(part for part in parts if part is not None)]


def _patch_size(model: nn.Module) -> int | None:
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
