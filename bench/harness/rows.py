"""What every benchmark needs around its measurement: what it ran on, and results that appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
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

FACTS = ("torch", "diffusers", "machine", "threads", "commit")
VERSIONS = ("python", "triton", "cuda", "cudnn", "card")
TIMES = {"p50_ms": "ms", "composed_s": "s composed"}  # columns that are compared, the first that both sides have, and their units


def facts(device: str = "cpu", *, commit: str | None = None) -> dict[str, str]:
    """Versions, machine (of a GPU its name) and commit of this run; take it once, before measuring, for files may change meanwhile.

    `commit` is for copies of the tree that git knows nothing of.

    Raises:
        ValueError: git knows the tree, as another commit or with changes.
    """
    return {
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else machine(),
        "threads": str(torch.get_num_threads()),
        "commit": _told(commit, _commit()),
    }


def versions(device: str) -> dict[str, str]:
    """Of Python, Triton, and what torch runs on a device with; the latter empty on a CPU."""
    on_gpu = device == "cuda"
    return {
        "python": platform.python_version(),
        "triton": package_version("triton"),
        "cuda": str(torch.version.cuda or torch.version.hip or "") if on_gpu else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if on_gpu else "",
        "card": _card() if on_gpu else "",
    }


def _card() -> str:
    """Driver, power limit and highest clock of NVIDIA's cards, whose names do not tell them; empty where nobody does."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return " or ".join(dict.fromkeys(_card_in_words(line) for line in told.splitlines() if line.strip()))


def _card_in_words(line: str) -> str:
    driver, *limits = (part.strip() for part in line.split(","))
    numbers = [f"{float(limit):g} {unit}" for limit, unit in zip(limits, ("W", "MHz"), strict=False) if re.fullmatch(r"[\d.]+", limit)]
    return ", ".join([f"driver {driver}", *numbers])


def _commit() -> str:
    """Of the checkout, and whether what could be measured differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", "scalediff", "kernels", "bench/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def _told(commit: str | None, known: str) -> str:
    """A commit that the caller names, where git knows none; what git knows otherwise, and where the caller names none."""
    if not commit or known == "unknown":
        return commit or known
    if not re.fullmatch(f"{re.escape(known)}[0-9a-f]*", commit):
        raise ValueError(f"--commit is for a copy of the tree that git knows nothing of: git has {known!r} here, got {commit!r}")
    return known


def package_version(package: str) -> str:
    """Of an installed package; "absent" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_lost(device: str) -> bool:
    """Whether nothing more can run on the device in this process: an illegal access ends all of it, for whoever comes next, too."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def forget(device: str) -> None:
    """What nobody holds any more, on the host and on a device that still answers; what glibc keeps goes back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def first_line(problem: Exception) -> str:
    """What a row says of it."""
    return (str(problem).splitlines() or [""])[0][:200]


def broken(problem: Exception, device: str) -> dict[str, str]:
    """Of a row: a baseline that cannot run is a result, ours is reported by the exit status; what loses the device is not tried again."""
    status = "FAILED" if device_lost(device) else "error"
    return {"status": status, "note": f"{type(problem).__name__}: {first_line(problem)}"}


def read_records(path: Path) -> list[dict[str, str]]:
    """Rows as a CSV has them; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path, fields: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Rows of an earlier run, by the column `row`; none where there is no file.

    Raises:
        ValueError: the file has no such column, or a row twice; its columns are not these `fields`, where some are named.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        records = list(reader)
    if "row" not in (reader.fieldnames or ()):
        raise ValueError(f"{path.name} must have a column 'row', got {reader.fieldnames}")
    if fields and set(reader.fieldnames or ()) != set(fields):
        other = ", ".join(sorted(set(reader.fieldnames or ()) ^ set(fields)))
        raise ValueError(f"{path.name} is not of this benchmark and version of it: it must have its columns, they differ in {other}")
    rows = {record["row"]: record for record in records}
    if len(rows) < len(records):
        raise ValueError(f"{path.name} must name every row once, got {len(records) - len(rows)} names again")
    return rows


def is_commit(commit: str) -> bool:
    """Whether it names one tree: neither a tree with changes nor one that git knows nothing of."""
    return commit != "unknown" and not commit.endswith("with changes")


def standing(rows: Mapping[str, Mapping[str, str]], measured_with: Mapping[str, str]) -> set[str]:
    """Rows of an earlier run that need not be measured again: with the same facts, all of them, and of a commit that is one.

    A tree with changes is not told from another with other changes, so its rows do not stand.
    """
    if not is_commit(measured_with["commit"]):
        return set()
    return {name for name, row in rows.items() if all(row.get(key) == value for key, value in measured_with.items())}


def compared(rows: Mapping[str, Mapping[str, str]], others: Mapping[str, Mapping[str, str]], *, facts: Sequence[str]) -> list[str]:
    """Row by row, in sentences: how the two were measured where that differs, then every ratio.

    Args:
        rows, others: As `read_rows` has them.
        facts: Columns that say what was measured with what.

    Returns:
        Lines; ratios are the other time over this one, so more than 1 is faster here. A row without a time says why.
    """
    common = [name for name in rows if name in others]
    if not common:
        return [f"no row is in both files: {len(rows)} rows here, {len(others)} there"]
    lines = []
    for fact in facts:
        here, there = ({table[name].get(fact, "") for name in common} for table in (rows, others))
        if here != there or len(here) > 1:
            lines.append(f"not the same {fact}: here {_joined(here)}, there {_joined(there)}; the ratios below hold that too")
    lines += [f"{name}: {_ratio(rows[name], others[name])}" for name in common]
    only = [(len(rows) - len(common), "here"), (len(others) - len(common), "there")]
    return lines + [f"{count} rows are only {where}" for count, where in only if count]


def _ratio(mine: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Of one row, the first kind of time that both sides have, never one kind for another; or why there is none."""
    sides = ((mine, "here"), (other, "there"))
    for column, unit in TIMES.items():
        found = [(row[column], where) for row, where in sides if row.get(column)]
        if wrong := [f"{text!r} {where}" for text, where in found if not _is_time(text)]:
            return f"{column} must be a positive number, got {' and '.join(wrong)}"
        if len(found) == 2:
            (a, _), (b, _) = found
            return f"{a} {unit} here, {b} {unit} there, {float(b) / float(a):.3f}x"
    untimed = [(row, where) for row, where in sides if not any(row.get(column) for column in TIMES)]
    words = [f"no time {where}" + (f" ({why})" if (why := _why(row)) else "") for row, where in untimed]
    return "; ".join(words) or f"no time of one kind: {' or '.join(TIMES)} must be on both sides"


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _why(row: Mapping[str, str]) -> str:
    return ", ".join(filter(None, (row.get("status"), row.get("note"))))


def _joined(values: Iterable[str]) -> str:
    return " and ".join(sorted(value or "nothing said" for value in values))


def write_rows(path: Path, fields: Sequence[str], records: Iterable[Mapping[str, str]]) -> None:
    """A CSV, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """A text file, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def difference(path: Path, expected: str) -> str:
    """Where a file first departs from what it should hold, in a sentence; empty where it does not."""
    held = path.read_text().splitlines() if path.exists() else []
    for number, (old, new) in enumerate(zip_longest(held, expected.splitlines()), start=1):
        if old != new:
            return f"{path.name}, line {number}, is not what is counted now, got {old!r} for {new!r}"
    return ""
