"""Rows of keys and values that ranks send each other, on their way while attention to a rank's own rows is computed.

Legend: B batch, G key heads, Y x X token grid, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed

from scalediff_kernels.distributed.geometry import Rows, Transfer
from scalediff_kernels.distributed.losses import naming_losses


class Exchange:
    """Start the messages of one exchange; `rows` gives keys and values once `wait` has returned.

    Args:
        k, v: The keys and values of this rank's rows, `[B, Y, X, G, D]`.
        own: Its rows.
        messages: All transfers of the exchange.
        group: The process group.
    """

    def __init__(self, k: Tensor, v: Tensor, *, own: Rows, messages: Sequence[Transfer], group: Any) -> None:
        self._own, self._group, self._rank = own, group, distributed.get_rank(group)
        self._parts = [(own, k, v)]  # in the order of rows
        self._pending: list[tuple[Transfer, Tensor]] = []
        operations = []
        for transfer in messages:
            rows = transfer.rows
            if transfer.source == self._rank:
                part = slice(rows.start - own.start, rows.stop - own.start)
                both = torch.stack([k[:, part], v[:, part]])
                operations.append(distributed.P2POp(distributed.isend, both, group=group, group_peer=transfer.target))
                self._pending.append((transfer, both))
            elif transfer.target == self._rank:
                both = k.new_empty(2, k.shape[0], rows.size, *k.shape[2:])
                operations.append(distributed.P2POp(distributed.irecv, both, group=group, group_peer=transfer.source))
                self._pending.append((transfer, both))
                self._parts.append((rows, both[0], both[1]))
        self._parts.sort(key=lambda part: part[0])
        with self._naming_losses(self._pending):
            self._works = distributed.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Wait for the messages; on a GPU, its current stream waits.

        Raises:
            LostRankError: A rank has ended or does not answer. The message names it.
        """
        one_by_one = len(self._works) == len(self._pending)  # some backends have one work for all
        for i, work in enumerate(self._works):
            with self._naming_losses(self._pending[i : i + 1] if one_by_one else self._pending):
                work.wait()
        self._works, self._pending = [], []

    def rows(self, wanted: Rows) -> tuple[Tensor, Tensor]:
        """Keys and values of rows that are this rank's own or have been received: a view where they are in one piece, otherwise a copy."""
        found = [
            [x[:, max(wanted.start - rows.start, 0) : wanted.stop - rows.start] for x in (k, v)]
            for rows, k, v in self._parts
            if rows.start < wanted.stop and wanted.start < rows.stop
        ]
        k, v = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return k, v

    def _naming_losses(self, pending: Sequence[tuple[Transfer, Tensor]]) -> AbstractContextManager[None]:
        peers = {t.target if t.source == self._rank else t.source for t, _ in pending}
        return naming_losses(self._group, "exchanging rows", peers=peers)
