"""A rank that has ended: the error by which the others name it.

Backends report a lost connection, and seldom to which rank. Gloo knows this for every rank, and says so at the next message to it. The
first rank that notices also leaves a note in the store by which the processes met: others, who lose the connection to that rank when it
ends, can then name the cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

_NOTE = "scalediff/lost"  # the key in the store
_TAG = 0x5CA1ED  # of messages that nobody receives


class LostRankError(RuntimeError):
    """A rank has ended or does not answer: the message names it, and the cause is the error of the backend."""


# Runtime errors that are no lost connection of a backend; a GPU reports the error of a kernel at a later call, such as a collective.
_OTHERS = (LostRankError, NotImplementedError, torch.OutOfMemoryError, torch.AcceleratorError)


@contextmanager
def naming_losses(group: Any, doing: str, *, peers: Iterable[int] = ()) -> Iterator[None]:
    """Run messages or a collective of a group; a failure is a `LostRankError` that names the lost rank.

    Args:
        group: The process group.
        doing: What this rank does meanwhile, for the message.
        peers: Ranks of the group that the messages come from or go to, one of which is named if the backend does not know which is lost.

    Raises:
        LostRankError: The connection to a rank has failed. Its cause is the error of the backend.
    """
    try:
        yield
    except _OTHERS:
        raise
    except RuntimeError as error:
        raise _lost(group, doing, unreachable(group), peers) from error


def check_losses(group: Any, doing: str, error: RuntimeError) -> None:
    """Raise a `LostRankError` in the place of an error in other code, if ranks of the group have ended by now."""
    lost = [] if isinstance(error, _OTHERS) else unreachable(group)
    if lost:
        raise _lost(group, doing, lost, ()) from error


def unreachable(group: Any) -> list[int]:
    """The ranks of a group to which the connection is lost, as far as its backend knows: empty without gloo."""
    if "cpu:gloo" not in distributed.get_backend_config(group):
        return []
    lost, own = [], distributed.get_rank(group)
    for rank in range(distributed.get_world_size(group)):
        if rank != own:
            try:
                distributed.isend(torch.zeros(1), group=group, group_dst=rank, tag=_TAG)
            except RuntimeError:
                lost.append(rank)
    return lost


def _lost(group: Any, doing: str, lost: Iterable[int], peers: Iterable[int]) -> LostRankError:
    """The error that names lost ranks, or where none is known the peers, by their numbers among all processes."""
    known, possible = ([distributed.get_global_rank(group, rank) for rank in sorted(ranks)] for ranks in (lost, peers))
    names = " and rank ".join(map(str, known)) or " or rank ".join(map(str, possible))
    first = names
    try:
        store = distributed.distributed_c10d._get_default_store()
        first = store.compare_set(_NOTE, "", names).decode()
    except (AttributeError, RuntimeError):  # the store is private to torch, and may have been kept by the rank that is lost
        pass
    cause = "" if first == names else f"; rank {first} was lost first"
    whom = f"the connection to rank {names}" if names else "a connection, to a rank that its backend does not name,"
    return LostRankError(f"rank {distributed.get_rank()} lost {whom} while {doing}{cause}")
