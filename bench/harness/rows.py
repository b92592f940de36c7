"""Rows of results: what they are measured with, the CSVs that hold them, and the comparison of two CSVs."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import io
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
FACTS = ("torch", "diffusers", "machine", "threads", "commit")
VERSIONS = ("python", "triton", "cuda", "cudnn", "card")
TIMES = {"p50_ms": "ms", "composed_s": "s composed"}  # columns to compare, in order of preference, and their units

Row = dict[str, str]
Table = Mapping[str, Mapping[str, str]]  # rows by name


def facts(device: str = "cpu", *, commit: str | None = None) -> Row:
    """The columns FACTS of this run. Call it before measuring: files may change meanwhile.

    `commit` is for a copy of the tree without git's data; a ValueError where git has another one, or changes.
    """
    return {
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else machine(),
        "threads": str(torch.get_num_threads()),
        "commit": resolve_commit(commit, _commit()),
    }


def versions(device: str) -> Row:
    """The columns VERSIONS; those of CUDA are empty on a CPU."""
    found = {"python": platform.python_version(), "triton": package_version("triton")}
    if device != "cuda":
        return dict.fromkeys(VERSIONS, "") | found
    cuda, cudnn = torch.version.cuda or torch.version.hip or "", torch.backends.cudnn.version() or ""
    return found | {"cuda": str(cuda), "cudnn": str(cudnn), "card": _card()}


def _card() -> str:
    """Driver, power limit and highest clock of NVIDIA's cards; empty without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return " or ".join(dict.fromkeys(f"driver {line}" for line in printed.splitlines() if line.strip()))


def _commit() -> str:
    """The checkout's commit, marked where files that can be measured were changed; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", "scalediff", "kernels", "bench/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def resolve_commit(given: str | None, known: str) -> str:
    """The commit that git knows, or the one that the caller gives where git knows none."""
    if not given or known == "unknown":
        return given or known
    if not re.fullmatch(f"{re.escape(known)}[0-9a-f]*", given):
        raise ValueError(f"--commit is for a copy of the tree without git's data: git has {known!r} here, got {given!r}")
    return known


def is_commit(commit: str) -> bool:
    """Whether it identifies one tree: it is known, and nothing was changed after it."""
    return commit != "unknown" and not commit.endswith("with changes")


def package_version(package: str) -> str:
    """The version of an installed package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_lost(device: str) -> bool:
    """Whether this process can use the GPU no more, as after an illegal access."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.empty(1, device=device)
    except RuntimeError as error:
        return not isinstance(error, torch.OutOfMemoryError)
    return False


def forget(device: str) -> None:
    """Free memory that nothing references, and return it to the system and the device."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def first_line(problem: Exception) -> str:
    """The first line of its message, cut to 200 characters."""
    return (str(problem).splitlines() or [""])[0][:200]


def broken(problem: Exception, device: str) -> Row:
    """Status and note of a row that raised: "error", or "FAILED", which is not tried again, where the device was lost."""
    status = "FAILED" if device_lost(device) else "error"
    return {"status": status, "note": f"{type(problem).__name__}: {first_line(problem)}"}


def read_records(path: Path) -> list[Row]:
    """The rows of a CSV in order; none where there is no file."""
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []


def read_rows(path: Path, fields: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of a CSV by their column `row`; none where there is no file.

    With `fields`, columns that an earlier version of the benchmark did not have are empty. Raises ValueError where a row is there twice or
    has too many cells, or the columns are not of this benchmark.
    """
    text = path.read_text() if path.exists() else ""
    reader = csv.DictReader(io.StringIO(text))
    columns, records = set(reader.fieldnames or ()) if text else {"row", *fields}, list(reader)
    if "row" not in columns:
        raise ValueError(f"{path.name} must have a column 'row', got {list(reader.fieldnames or ())}")
    if longer := [record["row"] for record in records if None in record]:
        raise ValueError(f"{path.name} must have one cell for each column in every row, got more in {', '.join(longer)}")
    if fields and (other := (columns - set(fields)) | ({"status"} & set(fields) - columns)):
        raise ValueError(f"{path.name} is not of this benchmark: it differs in the columns {', '.join(sorted(other))}")
    rows = {record["row"]: dict.fromkeys(fields, "") | record for record in records}
    if len(rows) < len(records):
        raise ValueError(f"{path.name} must name every row once, got {len(records) - len(rows)} names again")
    return rows


def write_rows(path: Path, fields: Sequence[str], records: Iterable[Mapping[str, str]]) -> None:
    """Write a CSV, replaced in one step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def difference(path: Path, expected: str) -> str:
    """A sentence about the first line in which a file differs from the expected text; empty where none does."""
    lines = path.read_text().splitlines() if path.exists() else []
    for number, (old, new) in enumerate(zip_longest(lines, expected.splitlines()), start=1):
        if old != new:
            return f"{path.name}, line {number}, is not what is counted now, got {old!r} for {new!r}"
    return ""


def finished_rows(rows: Table, measured_with: Mapping[str, str]) -> set[str]:
    """Names of rows that have these facts and are of one commit: another run need not measure them again."""
    if not is_commit(measured_with["commit"]):
        return set()
    return {name for name, row in rows.items() if all(row.get(key) == value for key, value in measured_with.items())}


def compared(rows: Table, others: Table, *, facts: Sequence[str]) -> list[str]:
    """Sentences about the facts that differ, then the ratio of every common row: more than 1 is faster here."""
    common = [name for name in rows if name in others]
    if not common:
        return [f"no row is in both files: {len(rows)} rows here, {len(others)} there"]
    lines = []
    for fact in facts:
        here, there = (sorted({table[name].get(fact) or "unknown" for name in common}) for table in (rows, others))
        if here != there or len(here) > 1:
            values = f"here {' and '.join(here)}, there {' and '.join(there)}"
            lines.append(f"not the same {fact}: {values}; the ratios below include that difference")
    lines += [f"{name}: {_ratio(rows[name], others[name])}" for name in common]
    only = [(len(rows) - len(common), "here"), (len(others) - len(common), "there")]
    return lines + [f"{count} rows are only {where}" for count, where in only if count]


def _ratio(mine: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Both times and their ratio, by the first column of TIMES that both rows have; or why there is none."""
    sides = ((mine, "here"), (other, "there"))
    for column, unit in TIMES.items():
        times = [(row[column], where) for row, where in sides if row.get(column)]
        if wrong := [f"{time!r} {where}" for time, where in times if not _is_time(time)]:
            return f"{column} must be a positive number, got {' and '.join(wrong)}"
        if len(times) == 2:
            a, b = times[0][0], times[1][0]
            return f"{a} {unit} here, {b} {unit} there, {float(b) / float(a):.3f}x"
    untimed = [(row, where) for row, where in sides if not any(row.get(column) for column in TIMES)]
    reasons = [(where, ", ".join(filter(None, (row.get("status"), row.get("note"))))) for row, where in untimed]
    sentences = [f"no time {where}" + (f" ({why})" if why else "") for where, why in reasons]
    return "; ".join(sentences) or f"the rows have times of different kinds: {' or '.join(TIMES)} must be in both"


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
