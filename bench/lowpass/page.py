"""docs/evidence/filters-measured.md from the rows of `bench.lowpass`: a section per device, a table per way of measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness.facts import VERSIONS
from bench.harness.pages import table

FACTS = ("machine", "threads", "commit", "torch", *VERSIONS, "torchvision", "kornia", "memory")
LEGEND = """Milliseconds are p50 (p20 - p80) of single calls; MB are those that the operation must move; "of copy" is the time of
`dst.copy_(src)` for as many bytes in the same run over the time of the row; "x" is the time of eager torch, with one filter per operation,
over the time of the row. Rows of scalediff and torch.compile passed the [error budget](../internals/numerics.md) that "eager" sets at that
shape before they were timed; "line by line" is shown with its error, which may exceed it. FFT and Gaussian blurs are other filters for the
same purpose. Cutoff 1/8, epsilon prediction. Calls took sets of inputs in turn, as many as hold four times the last cache, at most 16. On a
CPU rows of one operation, and the copy, were timed side by side, by a process that keeps freed memory, as the command `scalediff` does
([adr/0009](../adr/0009-the-command-keeps-freed-memory.md)). Made by `python -m bench.lowpass` (the options used stand above each table) and
`python -m bench.lowpass --doc docs/evidence/filters-measured.md`."""


def markdown(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The page, from the rows of every device."""
    from pandas import DataFrame

    lines = ["# Low-pass filters and guided steps: times", "", LEGEND]
    for records in tables.values():
        lines += ["", f"## {records[0]['machine']}"]
        for _, group in DataFrame(records).groupby(list(FACTS), sort=False):
            first, commands = group.iloc[0], " and ".join(f"`{command}`" for command in group["command"].unique())
            names = ("torch", "triton", "python", "cuda", "cudnn", "torchvision", "kornia")
            versions = [f"{name} {first[name]}" for name in names if first[name] not in ("", "absent")] + [first["card"]]
            lines += ["", f"{commands}: {', '.join(filter(None, versions))},", f"{first['threads']} threads, commit {first['commit']}."]
            lines += ["", *_table(group)]
            skipped = group[group["status"] == "skipped"].groupby(["implementation", "note"], sort=False).size()
            for (name, note), count in skipped.items():
                lines += ["", f"Skipped: {name}: {note} ({count} rows)."]
    return "\n".join(lines) + "\n"


def _table(group: Any) -> list[str]:
    from pandas import to_numeric

    rows, ok, of = group[group["status"] != "skipped"], group["status"] == "ok", ["case", "dtype", "layout", "operation"]
    times = to_numeric(rows["p50_ms"].where(ok))
    eager = rows.assign(eager=times)[rows["implementation"] == "eager"][[*of, "eager"]]
    ratio = rows.merge(eager, how="left", on=of)["eager"].set_axis(rows.index) / times
    cells = rows[["operation", "implementation"]].assign(
        ms=(rows["p50_ms"] + " (" + rows["p20_ms"] + " - " + rows["p80_ms"] + ")").where(ok, rows["status"] + ": " + rows["note"]),
        MB=rows["megabytes"].where(ok, ""),
        **{"of copy": (100 * to_numeric(rows["copy_ms"]) / times).map("{:.0f}%".format).where(ok, "")},
        launches=rows["launches"].replace("", "-").where(ok, ""),
        x=ratio.map("{:.2f}".format).replace("nan", "-").where(ok, ""),
        error=rows["error"].replace("", "-").where(ok, ""),
    )
    layouts = rows["layout"].map({"channels last": ", channels last"}).fillna("")
    cells.insert(0, "case", rows["case"] + ", " + rows["dtype"] + layouts)
    return table(cells, text=("case", "operation", "implementation"))
