"""Report of the attention modules of a patched model: which are patched, which are not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalediff.families.grid import Grid

Status = Literal["patched", "untouched"]


@dataclass(frozen=True)
class Row:
    """One attention module of the report.

    Attributes:
        module: Path of the module in the pipeline or model.
        role: What it attends to: `"self"`, `"joint"`, `"cross"` or `"text"`.
        grid_source: Where the token grid comes from.
        text: How text enters the attention; `"-"` if it does not.
        window: Key/value window in tokens `(Y, X)`; None if the module is not patched.
        patch: Query patch in tokens `(Y, X)`; None if the module is not patched.
        status: `"patched"` or `"untouched"`.
        why: Why the module is not patched, or why some of its calls ran full attention; empty if all are computed in windows.
        taken: Number of attention calls that the last pass above the native area computed in windows; None before such a pass, and if a
            compiled graph made the calls.
        left: Number of attention calls that it left to full attention; None as above.
    """

    module: str
    role: str
    grid_source: str
    text: str
    window: Grid | None
    patch: Grid | None
    status: Status
    why: str = ""
    taken: int | None = None
    left: int | None = None


@dataclass(frozen=True)
class Report:
    """The attention modules of a patched model; `print(report)` shows them as a table.

    Attributes:
        model: Class name of the denoiser.
        rows: Attention modules of the denoiser and of its ControlNets.
        call: What a call of the model or pipeline does now.
        known: Whether `rows` is complete. For an unlisted model, `rows` holds the modules that called attention in passes above the
            native area.
        last_pass: What the last pass above the native area did; empty before such a pass.
        notes: What to know about the patch beyond the rows.
    """

    model: str
    rows: tuple[Row, ...]
    call: str
    known: bool = True
    last_pass: str = ""
    notes: tuple[str, ...] = ()

    @property
    def patched(self) -> tuple[Row, ...]:
        """The rows of the patched modules."""
        return tuple(row for row in self.rows if row.status == "patched")

    def __str__(self) -> str:
        heads = ["module", "role", "grid from", "text", "window", "patch", "status"]
        cells = [
            [r.module, r.role, r.grid_source, r.text, _size(r.window), _size(r.patch), r.status + (f": {r.why}" if r.why else "")]
            for r in self.rows
        ]
        if any(row.taken is not None for row in self.rows):
            heads[-1:-1] = ["taken", "left"]
            for line, row in zip(cells, self.rows, strict=True):
                line[-1:-1] = ["-" if count is None else str(count) for count in (row.taken, row.left)]
        widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [heads, *cells]]
        after = [*([f"last pass: {self.last_pass}"] if self.last_pass else []), *self.notes]
        if not self.known and not self.rows:
            listed = "no module called attention" if self.last_pass else _LISTED_LATER
            return "\n".join([f"{self.model}: {listed}; {self.call}", *after])
        count = f"{len(self.patched)} of {len(self.rows)}" if self.known else f"{len(self.patched)} seen"
        return "\n".join([f"{self.model}: {count} attention modules patched; {self.call}", *lines, *after])


_LISTED_LATER = "attention modules are listed here after the first pass above the window's area"


def _size(grid: Grid | None) -> str:
    return f"{grid[0]} x {grid[1]}" if grid else "-"
