"""docs/evidence/filters-measured.md from the rows of `bench.lowpass`: a section per device, a table per way of measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bench.harness import rows as harness
from bench.lowpass.cases import FEATURES, LATENTS

KEPT = "kept"  # memory that the process has freed, on a CPU
FACTS = ("machine", "threads", "commit", "torch", *harness.VERSIONS, "torchvision", "kornia", "memory")
GPU = "H200"  # of the goals in docs/internals/filters.md
_CASE = ("case", "dtype", "layout")
_ADR = "[adr/0009](../adr/0009-the-command-keeps-freed-memory.md)"
_MEMORY = f"The process keeps freed memory, as the command `scalediff` does on a CPU ({_ADR})."
_IN_TURN = "Calls took sets of inputs in turn, as many as hold four times the last cache, at most 16."
_BESIDE = "Rows of one operation, and the copy, were timed side by side."
LEGEND = """Milliseconds are p50 (p20 - p80) of single calls; MB are those that the operation must move; "of copy" is the time of
`dst.copy_(src)` for as many bytes in the same run over the time of the row; "x" is the time of eager torch, with one filter per operation,
over the time of the row. Rows of scalediff and torch.compile passed the [error budget](../internals/numerics.md) that "eager" sets at that
shape before they were timed; "line by line" is shown with its error, which may exceed it. FFT and Gaussian blurs are other filters for the
same purpose. Cutoff 1/8, epsilon prediction. Made by `python -m bench.lowpass` (the options used stand above each table) and
`python -m bench.lowpass --doc docs/evidence/filters-measured.md`."""

Record = Mapping[str, str]


def markdown(tables: Mapping[str, Sequence[Record]]) -> str:
    """The page, from the rows of every device."""
    lines = ["# Low-pass filters and guided steps: times", "", LEGEND]
    for records in tables.values():
        lines += ["", f"## {records[0]['machine']}"]
        groups: dict[tuple[str, ...], list[Record]] = {}
        for row in records:
            groups.setdefault(tuple(row[fact] for fact in FACTS), []).append(row)
        for group in groups.values():
            lines += ["", *_head(group), ""]
            lines.append("| case | operation | implementation | ms | MB | of copy | launches | x | error |")
            lines.append("|---|---|---|--:|--:|--:|--:|--:|--:|")
            eager = {(row["operation"], *(row[key] for key in _CASE)): row["p50_ms"] for row in group if row["implementation"] == "eager"}
            lines += [_line(r, eager.get((r["operation"], *(r[key] for key in _CASE)), "")) for r in group if r["status"] != "skipped"]
            skipped = Counter((row["implementation"], row["note"]) for row in group if row["status"] == "skipped")
            for (name, note), count in skipped.items():
                lines += ["", f"Skipped: {name}: {note} ({count} rows)."]
    timed = [row for records in tables.values() for row in records if GPU in row["machine"] and row["status"] == "ok"]
    seen = {tuple(row[key] for key in _CASE) for row in timed}
    if missing := [case.identity for case in LATENTS + FEATURES if tuple(case.identity.values()) not in seen]:
        lines += ["", "## Not measured yet", "", f"On an {GPU}, by `python -m bench.lowpass --device cuda`:", ""]
        lines += [f"- {_title(row)}" for row in missing]
    return "\n".join(lines) + "\n"


def _head(group: Sequence[Record]) -> list[str]:
    first = group[0]
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in group))
    names = ("torch", "triton", "python", "cuda", "cudnn", "torchvision", "kornia")
    versions = [f"{name} {first[name]}" for name in names if first[name] not in ("", "absent")] + [first["card"]]
    how = [*[_MEMORY] * (first["memory"] == KEPT), _IN_TURN, *[_BESIDE] * (not first["cuda"])]
    return [f"{commands}: {', '.join(filter(None, versions))},", " ".join([f"{first['threads']} threads, commit {first['commit']}.", *how])]


def _line(row: Record, eager: str) -> str:
    cells = [f"{row['status']}: {row['note']}".replace("|", "\\|"), *[""] * 5]
    if row["status"] == "ok":
        time = float(row["p50_ms"])
        cells = [f"{row['p50_ms']} ({row['p20_ms']} - {row['p80_ms']})", row["megabytes"], f"{100 * float(row['copy_ms']) / time:.0f}%"]
        cells += [row["launches"] or "-", f"{float(eager) / time:.2f}" if eager else "-", row["error"] or "-"]
    return f"| {' | '.join([_title(row), row['operation'], row['implementation'], *cells])} |"


def _title(row: Record) -> str:
    return f"{row['case']}, {row['dtype']}" + (", channels last" if row["layout"] == "channels last" else "")
