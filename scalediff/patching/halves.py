"""A batch that is split in halves over two ranks, such as that of classifier-free guidance, during passes above the native area.

The samples of a batch do not see each other, so a forward needs no messages; in the end the output is gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from scalediff.families.grid import Grid
from scalediff_kernels.distributed.groups import all_gather, group_of

GUIDANCE = "guidance"  # the name of a dimension of a mesh


def splits_batch_alone(mesh: Any) -> bool:
    """Whether a mesh has guidance as its only dimension."""
    return isinstance(mesh, DeviceMesh) and mesh.mesh_dim_names == (GUIDANCE,)


class Halves:
    """The split of a network's batch.

    Args:
        mesh: A process group of two ranks, or a `DeviceMesh` of one dimension.
        parameters: Names of the arguments of its `forward`.
        batch_second: Names of those whose second axis is the batch.

    Attributes:
        group: None: rows are not split.
        groups: The group.

    Raises:
        TypeError, RuntimeError: As `group_of`.
        ValueError: As `group_of`; also if there is another number of ranks.
    """

    group = None

    def __init__(self, mesh: Any, parameters: Sequence[str], batch_second: Sequence[str] = ()) -> None:
        self._parameters, self._group, self._batch_second = tuple(parameters), group_of(mesh), tuple(batch_second)
        self.groups = (self._group,)
        ranks = distributed.get_world_size(self._group)
        if ranks != 2:
            raise ValueError(f"a mesh must have 2 ranks for guidance, got {ranks}")

    def undo(self, module: nn.Module) -> None:
        """Nothing remains after a pass."""

    def check_grid(self, grid: Grid) -> None:
        """Pictures of any token grid can be split: their rows are not."""

    def run(self, module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a method with this rank's half of every argument; the result is that of the whole batch.

        A pass with an odd batch, such as one without guidance, is computed whole by both ranks.

        Raises:
            NotImplementedError: The latents, which are the first argument, are not one tensor; the pass is one of perturbed-attention
                guidance; gradients are needed; or as `with_output`.
        """
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        own, batch = self.own(given), len(given[self._parameters[0]])
        if own is given:
            return method(**given)
        if any(type(x).__name__.startswith("PAG") for x in getattr(module, "attn_processors", {}).values()):
            raise NotImplementedError(
                "a mesh with guidance halves the batch, which perturbed-attention guidance needs whole: split rows alone"
            )
        return with_output(method(**own), lambda out: self._gather(out, batch))

    def own(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """This rank's half of all named arguments, or these themselves where the batch is odd; raises as `run`."""
        latents = given[self._parameters[0]]
        if not isinstance(latents, Tensor):
            kind = type(latents).__name__
            raise NotImplementedError(f"a mesh with guidance halves latents in one tensor, got {self._parameters[0]} in a {kind}")
        batch, rank = latents.shape[0], distributed.get_rank(self._group)
        if batch % 2:
            return given
        return {name: _half(value, batch, rank, axis=int(name in self._batch_second)) for name, value in given.items()}

    def _gather(self, out: Tensor, batch: int) -> Tensor:
        if out.requires_grad:
            raise NotImplementedError("a mesh with guidance does not support gradients: use torch.no_grad()")
        whole = out.new_empty(batch, *out.shape[1:])
        all_gather(whole, out.contiguous(), self._group)
        return whole


def with_output(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a network returns, with its output changed: a tensor, the first part of a tuple, or `sample`.

    Raises:
        NotImplementedError: It returns something else.
    """
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, tuple):
        return (change(result[0]), *result[1:])
    if not isinstance(getattr(result, "sample", None), Tensor):
        raise NotImplementedError(f"mesh= needs a network that returns a tensor, a tuple or a sample, got {type(result).__name__}")
    return dataclasses.replace(result, sample=change(result.sample))


def _half(value: Any, batch: int, half: int, *, axis: int = 0) -> Any:
    """Arguments with one half of every tensor whose axis of the batch has all of it."""
    if isinstance(value, Tensor):
        return value.chunk(2, dim=axis)[half] if value.ndim > axis and value.shape[axis] == batch else value
    if isinstance(value, dict):
        return {name: _half(x, batch, half) for name, x in value.items()}
    return type(value)(_half(x, batch, half, axis=axis) for x in value) if isinstance(value, list | tuple) else value
