"""What was patched, what was not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalediff.families.grid import Grid

Status = Literal["patched", "untouched"]


@dataclass(frozen=True)
class Row:
    """One attention module: `window` and `patch` in tokens (Y, X) where it is patched, `why` in words where it is not."""

    module: str
    role: str
    grid_source: str
    text: str
    window: Grid | None
    patch: Grid | None
    status: Status
    why: str = ""


@dataclass(frozen=True)
class Report:
    """The rows of one patched model; printing it gives the table.

    Attributes:
        model: Class name of the denoiser.
        rows: Its attention modules, and those of the ControlNets beside it.
        call: What becomes of the model's own call.
        known: The rows are all there are. Of an unlisted model they are the callers of attention seen in its first large pass.
    """

    model: str
    rows: tuple[Row, ...]
    call: str
    known: bool = True

    @property
    def patched(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "patched")

    def __str__(self) -> str:
        heads = ("module", "role", "grid from", "text", "window", "patch", "status")
        cells = [
            (r.module, r.role, r.grid_source, r.text, _size(r.window), _size(r.patch), r.status + (f": {r.why}" if r.why else ""))
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [heads, *cells]]
        if not self.known and not self.rows:
            return f"{self.model}: attention is intercepted from the first pass above the window's area on; {self.call}"
        count = f"{len(self.patched)} of {len(self.rows)}" if self.known else f"{len(self.patched)} seen"
        return "\n".join([f"{self.model}: {count} attention modules patched; {self.call}", *lines])


def _size(grid: Grid | None) -> str:
    return f"{grid[0]} x {grid[1]}" if grid else "-"
