"""diffusers' context parallelism: which configurations a patched model supports, and how its tokens arrive at the attention.

With Ulysses attention every rank holds a part of the text and a part of the image. Before attention the ranks exchange them, so that each
has all tokens for a part of the heads, rank by rank: `[text 0, image 0, text 1, image 1, ...]`, the `shards` of a `Sequence`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.families import FAMILIES
from scalediff.families.base import Family
from scalediff.families.grid import Layout
from scalediff.patching.stack import in_forward


def _configuration(module: nn.Module) -> Any:
    """diffusers' `ContextParallelConfig` of a module; None if it has none."""
    return getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)


def check_context_parallel(module: nn.Module, family: Family, *, has_layout: bool) -> None:
    """Check that a module's context parallelism, if it is enabled, is supported.

    Args:
        module: The denoiser.
        family: Its family.
        has_layout: Whether the caller gives the layout of a pass, which may say in which order tokens arrive.

    Raises:
        NotImplementedError: It uses ring attention, or belongs to another family than those of which the order of tokens is known.
    """
    config = _configuration(module)
    if config is None:
        return
    if config.ring_degree > 1:
        raise NotImplementedError(
            f"patch_model does not support ring attention, in which no device has all keys of a window at once: use "
            f"ContextParallelConfig(ulysses_degree=...) alone, got ring_degree={config.ring_degree}"
        )
    if not family.context_parallel and not has_layout:
        known = ", ".join(other.denoiser for other in FAMILIES.values() if other.context_parallel)
        raise NotImplementedError(
            f"patch_model supports context parallelism of {known}; for another model pass layout=, with "
            f"Sequence(..., shards={config.ulysses_degree}), got {type(module).__name__}"
        )


def gathered_layout(module: nn.Module, family: Family, layout: Layout) -> Layout:
    """The layout of a pass as its tokens arrive at the attention: with shards, if the module uses Ulysses attention.

    Raises:
        NotImplementedError: As `check_context_parallel`.
        ValueError: The layout has shards, but another number of them.
    """
    config = _configuration(module)
    if config is None:
        return layout
    degree, shards = config.ulysses_degree, {sequence.shards for sequence in layout.sequences}
    has_shards = max(shards, default=1) > 1
    check_context_parallel(module, family, has_layout=has_shards)
    if not has_shards:
        layout = replace(layout, sequences=tuple(replace(sequence, shards=degree) for sequence in layout.sequences))
    elif shards != {degree}:
        raise ValueError(f"every sequence of the layout must have shards={degree}, the ulysses_degree of the model, got {sorted(shards)}")
    return layout


def needs_equal_parts(module: nn.Module, family: Family) -> bool:
    """Whether diffusers splits text and image of every pass, of any size, into equal parts."""
    config = _configuration(module)
    return config is not None and not config.ulysses_anything and family.context_parallel


def check_equal_parts(module: nn.Module, layout: Layout) -> None:
    """Check that text and image of a pass can be split into equal parts.

    Raises:
        ValueError: They cannot.
    """
    degree = _configuration(module).ulysses_degree
    for sequence in layout.sequences:
        if (sequence.area % degree or sequence.text % degree) and not in_forward(module):  # inside, these are the tokens of one rank
            raise ValueError(
                f"ulysses_degree={degree} splits image and text into equal parts, got {sequence.area} image and {sequence.text} text "
                f"tokens: choose another size or text length, or ContextParallelConfig(ulysses_anything=True)"
            )
