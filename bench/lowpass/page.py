"""docs/evidence/filters-measured.md from the rows of `bench.lowpass`: a section per device, a table per way of measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.harness import rows as harness
from bench.lowpass.cases import FEATURES, LATENTS

KEPT, RETURNED = "kept", "returned"  # memory that the process has freed, on a CPU
FACTS = ("machine", "threads", "commit", "torch", *harness.VERSIONS, "torchvision", "kornia", "memory")
GPU = "H200"  # what the goals in docs/internals/filters.md are for
_ADR = "[adr/0009](../adr/0009-the-command-keeps-freed-memory.md)"
_MEMORY = {
    KEPT: f"The process keeps freed memory, as the command `scalediff` does on a CPU ({_ADR}).",
    RETURNED: f"The process gave freed memory back to the system, as the command `scalediff` does not ({_ADR}).",
}
_ONE_SET = "Every call had the same inputs, which caches may hold."
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
        for group in _groups(records):
            lines += ["", *_head(group), ""]
            lines.append("| case | operation | implementation | ms | MB | of copy | launches | x | error |")
            lines.append("|---|---|---|--:|--:|--:|--:|--:|--:|")
            lines += [_line(r, group) for r in group if r["status"] != "skipped"]
            lines += _skipped(group)
    return "\n".join([*lines, *_not_measured(tables)]) + "\n"


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    """Rows of one table: measured with the same, and either all on one set of inputs or none."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        how = _IN_TURN if r["seconds"] else _ONE_SET  # rows without this column are older than the sets
        found.setdefault((how, *(r[fact] for fact in FACTS)), []).append(r)
    return list(found.values())


def _head(group: Sequence[Record]) -> list[str]:
    first = group[0]
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(r["command"] for r in group))
    names = ("torch", "triton", "python", "cuda", "cudnn", "torchvision", "kornia")
    versions = [f"{name} {first[name]}" for name in names if first[name] not in ("", "absent")] + [first["card"]]
    memory = "" if first["cuda"] else _MEMORY[first["memory"] or RETURNED]
    sets = [_ONE_SET] if not first["seconds"] else [_IN_TURN] if first["cuda"] else [_IN_TURN, _BESIDE]
    sentences = (f"{first['threads']} threads, commit {first['commit']}.", memory, *sets)
    return [f"{commands}: {', '.join(filter(None, versions))},", " ".join(filter(None, sentences))]


def _line(r: Record, group: Sequence[Record]) -> str:
    if r["status"] == "ok":
        eager = next((e["p50_ms"] for e in group if _same(e, r) and e["implementation"] == "eager"), "")
        spread = f"{r['p50_ms']} ({r['p20_ms']} - {r['p80_ms']})"
        cells = [spread, r["megabytes"], f"{100 * float(r['copy_ms']) / float(r['p50_ms']):.0f}%", r["launches"] or "-",
                 f"{float(eager) / float(r['p50_ms']):.2f}" if eager else "-", r["error"] or "-"]  # fmt: skip
    else:
        cells = [f"{r['status']}: {r['note']}".replace("|", "\\|"), "", "", "", "", ""]
    return "| " + " | ".join([_title(r), r["operation"], r["implementation"], *cells]) + " |"


def _title(r: Record) -> str:
    return f"{r['case']}, {r['dtype']}" + (", channels last" if r["layout"] == "channels last" else "")


def _same(a: Record, b: Record) -> bool:
    return all(a[key] == b[key] for key in ("case", "dtype", "layout", "operation"))


def _skipped(group: Sequence[Record]) -> list[str]:
    """What the table leaves out, a line for each implementation and reason."""
    without = [(r["implementation"], r["note"]) for r in group if r["status"] == "skipped"]
    lines = [f"Skipped: {name}: {note} ({without.count((name, note))} rows)." for name, note in dict.fromkeys(without)]
    return [text for line in lines for text in ("", line)]


def _not_measured(tables: Mapping[str, Sequence[Record]]) -> list[str]:
    """The cases that no row of the GPU has a time for."""
    there = [
        {key: r[key] for key in ("case", "dtype", "layout")}
        for records in tables.values()
        for r in records
        if GPU in r["machine"] and r["status"] == "ok"
    ]
    missing = [case.identity for case in LATENTS + FEATURES if case.identity not in there]
    if not missing:
        return []
    words = f"On an {GPU}, by `python -m bench.lowpass --device cuda`:"
    return ["", "## Not measured yet", "", words, "", *(f"- {_title(r)}" for r in missing)]
