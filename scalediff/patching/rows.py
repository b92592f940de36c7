"""A forward pass whose picture is split by rows over the ranks of a process group, and whose text is split by tokens.

Linear layers run on a rank's own tokens. An attention call gathers the text, which is short, and exchanges rows of keys and values that
windows reach into.

Legend: B batch, S tokens of a sequence on one rank, H heads, D head dim, Y x X token grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from scalediff.families.grid import Layout, Sequence, split_sizes
from scalediff_kernels.distributed.groups import all_gather, group_of


def check_rows(rows: int, ranks: int, *, levels: int = 1) -> None:
    """Check that ranks can have equal numbers of the rows of tokens, at each of some levels, which have half the rows of the one before.

    Raises:
        ValueError: They cannot.
    """
    multiple = ranks << (levels - 1)
    if rows % multiple and ranks > 1:
        several = f" at each of {levels} levels" if levels > 1 else ""
        raise ValueError(
            f"{ranks} ranks split a picture into equal bands of rows{several}, got {rows} rows of tokens: choose a height with a multiple "
            f"of {multiple} rows, or another number of ranks"
        )


class RowShare:
    """This rank's part of one kind of sequence.

    Args:
        sequence: The whole sequence.
        group: A process group, or a `DeviceMesh` of one dimension.

    Attributes:
        rows: Numbers of rows of all ranks.
        lengths: Numbers of query and key tokens of a call on this rank.
        with_all_text: The sequence of this rank's rows with the text of all ranks.

    Raises:
        ValueError: The ranks do not divide the rows.
    """

    def __init__(self, sequence: Sequence, group: Any) -> None:
        self.group, self.side = group_of(group), sequence.side
        self._rank, ranks = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        rows, columns = sequence.grid
        check_rows(rows, ranks)
        self.rows = (rows // ranks,) * ranks
        self.area = self.rows[0] * columns
        self._texts = split_sizes(sequence.text, ranks)
        text = self._texts[self._rank]
        self.lengths = self.area + (text if sequence.queries == "all" else 0), self.area + text
        self.with_all_text = replace(sequence, grid=(self.rows[0], columns), shards=1)

    def gather_text(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` of this rank with the text of all ranks in the place of its own."""
        if not any(self._texts):
            return x
        mine = self._texts[self._rank]
        text, image = (x[:, :mine], x[:, mine:]) if self.side == "prefix" else (x[:, self.area :], x[:, : self.area])
        # The longest share is sent by every rank: collectives of unequal lengths are not in every backend.
        padded = text.new_zeros(text.shape[0], max(self._texts), *text.shape[2:])
        padded[:, :mine] = text
        found = padded.new_empty(len(self._texts), *padded.shape)
        all_gather(found.flatten(0, 1), padded, self.group)
        texts = [part[:, :count] for part, count in zip(found, self._texts, strict=True)]
        return torch.cat([*texts, image] if self.side == "prefix" else [image, *texts], dim=1)

    def own_text(self, out: Tensor) -> Tensor:
        """The inverse of `gather_text`."""
        if not any(self._texts):
            return out
        start, total = sum(self._texts[: self._rank]), sum(self._texts)
        before = 0 if self.side == "prefix" else self.area
        text = out[:, before + start : before + start + self._texts[self._rank]]
        image = out[:, total:] if self.side == "prefix" else out[:, : self.area]
        return torch.cat([text, image] if self.side == "prefix" else [image, text], dim=1)


def pass_facts(layout: Layout, jitter: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What all ranks must agree on in a pass: the tokens, how the patch grid moves, and every tensor that the model is given.

    Tensors, also those in dictionaries and lists, are compared by shape, dtype and the sum of their bytes.
    """
    return {"the token layout": repr(layout), "the jitter": jitter, **tensor_facts(arguments)}


def tensor_facts(values: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Shape, dtype and the sum of the bytes of every tensor, by name."""
    facts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            total = int(value.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
            facts[f"{prefix}{name}"] = f"{tuple(value.shape)} of {value.dtype} with the checksum {total}"
        elif isinstance(value, dict):
            facts |= tensor_facts(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            facts |= tensor_facts(dict(enumerate(value)), f"{prefix}{name}.")
    return facts
