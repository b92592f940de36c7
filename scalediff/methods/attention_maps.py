"""Where the tokens of a prompt are in the picture: the cross-attention of a U-Net's coarsest level, recorded during a run.

Legend: B batch, H heads, Y x X tokens of the level, T text tokens, D head dim.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.families.grid import Grid


@dataclass
class TokenMaps:
    """The sum of the recorded attention probabilities; `recorded_maps` fills it.

    Attributes:
        grid: Tokens `(Y, X)` of the level.
    """

    grid: Grid
    _sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    _count: int = 0
    _queries: dict[int, Tensor] = field(default_factory=dict)
    _removers: list[Callable[[], None]] = field(default_factory=list)

    def stop(self) -> None:
        """Record no more."""
        while self._removers:
            self._removers.pop()()

    def mean(self) -> Tensor:
        """The mean over steps, layers and heads, `[T, Y, X]`.

        Raises:
            NotImplementedError: Nothing was recorded, because the attention has fused projections or there is none at this level.
        """
        if not self._count:
            raise NotImplementedError("cross-attention maps need a U-Net with cross-attention at its coarsest level, with to_q and to_k")
        found: Tensor = (self._sum / self._count).T.unflatten(1, self.grid)
        return found

    def _record_query(self, attention: Any, query: Tensor) -> None:
        self._queries[id(attention)] = query

    def _record_key(self, attention: Any, key: Tensor) -> None:
        """Add the probabilities of the conditional half, which is the second one of the batch."""
        query = self._queries.pop(id(attention), None)
        if query is None or query.shape[1] != self.grid[0] * self.grid[1]:
            return
        q, k = (x[len(x) // 2 :].float().unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
        self._sum = self._sum.to(q.device) + (q @ k.transpose(2, 3) * attention.scale).softmax(-1).mean((0, 1))
        self._count += 1


@contextmanager
def recorded_maps(unet: nn.Module, grid: Grid) -> Iterator[TokenMaps]:
    """Record the cross-attention of all layers of the down and up blocks with this grid of tokens, for one picture with guidance.

    Recording ends with the context, or before it with `stop`.
    """
    maps = TokenMaps(grid)
    for name, module in unet.named_modules():
        if re.match(r"(?:down|up)_blocks\..*\.attn2$", name):
            attention: Any = module
            for projection, record in ((attention.to_q, maps._record_query), (attention.to_k, maps._record_key)):
                hook = functools.partial(_pass_output, record, attention)
                maps._removers.append(projection.register_forward_hook(hook).remove)
    try:
        yield maps
    finally:
        maps.stop()


def _pass_output(record: Callable[[Any, Tensor], None], attention: Any, module: nn.Module, args: Any, output: Tensor) -> None:
    record(attention, output)


def token_masks(maps: Tensor) -> Tensor:
    """Where the map of a token is above its mean, `[T, Y, X]` in 0 and 1, after an opening by Y // 16 steps of a 3 x 3 square."""
    mask = (maps > maps.mean((1, 2), keepdim=True)).float()[None]
    for _ in range(maps.shape[1] // 16):
        mask = -F.max_pool2d(-mask, 3, stride=1, padding=1)
    for _ in range(maps.shape[1] // 16):
        mask = F.max_pool2d(mask, 3, stride=1, padding=1)
    return mask[0]
