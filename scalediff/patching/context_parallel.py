"""diffusers' context parallelism: which configurations a patched model supports, and how its tokens arrive at the attention.

With Ulysses attention every rank holds a part of the text and a part of the image. Before attention the ranks exchange them, so that each
has all tokens for a part of the heads, rank by rank: `[text 0, image 0, text 1, image 1, ...]`, the `shards` of a `Sequence`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import distributed, nn

from scalediff.families import FAMILIES
from scalediff.families.base import Family
from scalediff.families.grid import Grid, Layout
from scalediff.patching.rows import check_rows
from scalediff.patching.stack import in_forward
from scalediff.patching.subclass import ATTRIBUTE
from scalediff_kernels.distributed.groups import group_of


def _configuration(module: nn.Module) -> Any:
    """diffusers' `ContextParallelConfig` of a module; None if it has none."""
    return getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)


def is_parallel(module: nn.Module) -> bool:
    """Whether context parallelism of diffusers is enabled, by the caller or by `RowSplit`."""
    return _configuration(module) is not None


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
            text = f" and {sequence.text} text" if sequence.text else ""
            raise ValueError(
                f"ulysses_degree={degree} splits image and text into equal parts, got {sequence.area} image{text} tokens: choose another "
                f"size or text length, or ContextParallelConfig(ulysses_anything=True)"
            )


_HOOKS = {"forward", "_diffusers_hook"}  # attributes of a module that diffusers' hooks set


class RowSplit:
    """A denoiser whose tokens diffusers splits over the ranks of a group, so that each has a band of rows of the picture.

    The split and the gathering of the output are those of diffusers' context parallelism. Up to the native area, attention is its Ulysses
    attention too.

    Args:
        module: The denoiser.
        family: Its family.
        mesh: A process group of all processes, or a `DeviceMesh` of one dimension over them.

    Raises:
        ValueError: The model is parallel already, or there is one rank alone.
        TypeError: `mesh` is neither a group nor a mesh.
        RuntimeError: There is no process group.
        NotImplementedError: The family is not one of those that can be split, the mesh does not have all processes, or there is no
            accelerator.
    """

    def __init__(self, module: Any, family: Family, mesh: Any) -> None:
        from diffusers import ContextParallelConfig

        self.group = check_row_split(module, family, mesh)
        self.groups = (self.group,)
        self._plan = module._cp_plan
        self._before = [(part, {key for key in _HOOKS if key in part.__dict__}) for part in module.modules()]
        self._processors = [part.processor for part in module.modules() if hasattr(getattr(part, "processor", None), "_parallel_config")]
        ranks = distributed.get_world_size(self.group)
        uneven = module.config.num_attention_heads % ranks != 0  # heads are padded, up to the native area alone
        module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=uneven))

    def check_grid(self, grid: Grid) -> None:
        """Check that pictures of this token grid can be split; errors as in `check_rows`."""
        check_rows(grid[0], distributed.get_world_size(self.group))

    def undo(self, module: Any) -> None:
        """Remove the split."""
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(module, self._plan)
        module._parallel_config = None
        for processor in self._processors:
            processor._parallel_config = None
        for part, kept in self._before:
            for key in _HOOKS - kept:
                part.__dict__.pop(key, None)


def check_not_parallel(module: Any) -> None:
    """Check that a denoiser is not parallel, or by an earlier `mesh=` alone.

    Raises:
        ValueError: It is.
    """
    if is_parallel(module) and not getattr(module.__dict__.get(ATTRIBUTE), "groups", ()):
        raise ValueError(f"this {type(module).__name__} is parallel already: pass mesh= or call enable_parallelism, not both")


def check_row_split(module: Any, family: Family, mesh: Any) -> Any:
    """The process group of a mesh, if a denoiser can be split over it; raises as `RowSplit`."""
    name = type(module).__name__
    if family.context_parallel and getattr(mesh, "ndim", 1) == 2:
        raise NotImplementedError(
            f"mesh= splits {name} by rows alone, in one dimension: its pipelines run the model for one prompt at a time, "
            f"which leaves no batch to halve, got {mesh}"
        )
    group = group_of(mesh)
    ranks, world = distributed.get_world_size(group), distributed.get_world_size()
    if not family.context_parallel:
        known = ", ".join(other.denoiser for other in FAMILIES.values() if other.context_parallel or other.bands)
        raise NotImplementedError(
            f"mesh= splits the rows of {known}: other models mix tokens outside of attention; a mesh of one dimension with the name "
            f"'guidance' halves the batch of any model, got {name}"
        )
    check_not_parallel(module)
    if ranks != world:
        raise NotImplementedError(f"mesh= must have all processes, got {ranks} of {world}")
    if ranks == 1:
        raise ValueError(f"mesh= must have at least 2 ranks to split {name}, got 1")
    if torch.accelerator.device_count() == 0:
        raise NotImplementedError("mesh= needs an accelerator, as diffusers' context parallelism does: got none")
    return group
