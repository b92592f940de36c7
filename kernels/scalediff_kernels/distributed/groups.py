"""Process groups: from what the caller passes, and what all ranks of one must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, distributed

from scalediff_kernels.distributed.losses import naming_losses


def group_of(group: Any) -> Any:
    """The process group of a group or of a one-dimensional `DeviceMesh`, of which this process is a member.

    Raises:
        RuntimeError: There is no process group.
        ValueError: The mesh has several dimensions, or this process is not a member.
        TypeError: It is neither a group nor a mesh.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("there is no process group: start the processes with torchrun and call torch.distributed.init_process_group()")
    from torch.distributed.device_mesh import DeviceMesh

    found = group
    if isinstance(group, DeviceMesh):
        _check_member(group)
        if group.ndim != 1:
            raise ValueError(f"the mesh must have one dimension: pass one of its dimensions, as mesh[name], got {group.mesh_dim_names=}")
        found = group.get_group()
    if found is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of the group")
    if not isinstance(found, distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group or a DeviceMesh, got {group!r}")
    return found


def _check_member(mesh: Any) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {distributed.get_rank()} must be one of the mesh, got {mesh}")


def groups_of(mesh: Any) -> tuple[Any, ...]:
    """The process groups of all dimensions of a `DeviceMesh`, or the one of a group; errors as in `group_of`."""
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(mesh, DeviceMesh) and mesh.ndim > 1:
        _check_member(mesh)
        return tuple(mesh.get_all_groups())
    return (group_of(mesh),)


def all_gather(whole: Tensor, part: Tensor, group: Any) -> None:
    """Write the parts of all ranks into `whole`, one after the other along its first axis; errors as in `naming_losses`."""
    gather = (
        getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    )  # the second is the name before torch 2.13
    with naming_losses(group, "gathering the parts of all ranks"):
        gather(whole, part, group=group)


def broadcast(value: Any, group: Any) -> Any:
    """The value of rank 0, any object, on all ranks of a group; errors as in `naming_losses`."""
    found = [value]
    with naming_losses(group, "waiting for what rank 0 decides"):
        distributed.broadcast_object_list(found, group=group, group_src=0)
    return found[0]


def gather_by_rank(value: Any, groups: tuple[Any, ...], doing: str) -> dict[int, Any]:
    """The value of every rank of a mesh, any object, by its number among all processes.

    Args:
        value: This rank's.
        groups: The process groups of all dimensions of the mesh.
        doing: What this rank does meanwhile, for the message of an error.

    Raises:
        LostRankError: A rank has ended: the message names it.
    """
    found = {distributed.get_rank(): value}
    for group in groups:  # after each, a rank has the values of all ranks of one more dimension
        parts: list[Any] = [None] * distributed.get_world_size(group)
        with naming_losses(group, doing):
            distributed.all_gather_object(parts, found, group=group)
        found = {rank: theirs for part in parts for rank, theirs in part.items()}
    return dict(sorted(found.items()))


def check_agreement(group: Any, facts: Mapping[str, str]) -> None:
    """Check that all ranks of a group or mesh pass the same facts. All ranks must call it; every rank raises the same error.

    Args:
        group: A process group, or a tuple of those of all dimensions of a mesh.
        facts: Short texts by name, such as versions, shapes and digests.

    Raises:
        ValueError: A rank has others. The message names the first rank that differs from the first of all, and how.
        LostRankError: A rank has ended: the message names it.
    """
    found = gather_by_rank(dict(facts), group if isinstance(group, tuple) else (group,), "comparing what all ranks must agree on")
    start = min(found)
    first = found[start]
    for rank, other in found.items():
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            differences = "; ".join(f"{name} is {first.get(name)} on rank {start} and {other.get(name)} on rank {rank}" for name in names)
            raise ValueError(f"all ranks must have the same versions, model and inputs, got {differences}")
