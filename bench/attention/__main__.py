"""Neighborhood patch attention against everything else that attends to a large picture: `python -m bench.attention`.

Every row is gated at its very shape against attention in fp64 (`gate`), then timed on sets of inputs taken in turn, so that caches are
cold. A row that fails its gate says FAILED and has no time; one that cannot run says why. Rows go to the CSV as they are measured, and
a second run of the same commit, machine and versions goes on where the first one stopped. On a CPU all that one run times of a
shape are timed side by side, for other work on the machine comes and goes; and the process keeps the memory that a call frees for the next
one, whoever calls (`scalediff.command.allocator`).
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.attention import compiled as providers_compiled
from bench.attention.compiled import PROVIDERS
from bench.attention.gate import Truth, truth
from bench.attention.providers import Ours, Provider, Ready
from bench.attention.sdpa import Loop, one_window
from bench.attention.shapes import CPU_QUICK, CPU_SHAPES, QUICK, SHAPES, Inputs, Task, tasks
from bench.harness import command, side_by_side
from bench.harness import rows as harness
from bench.harness.command import Benchmark
from bench.harness.side_by_side import Entrant
from bench.harness.timing import Timing, kernels, peak_memory
from bench.roofline.ceilings import Ceilings, ceilings
from scalediff_kernels.testing import poisoned_memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_CACHE = 2**26  # bytes, assumed
SETS = 16  # at most

SAME = ("machine", "threads", "commit", "torch", *harness.VERSIONS, "natten")
FIELDS = (
    "row", "status", "shape", "problem", "dtype", "rule", "provider", "function", "backend", "kernel", "p20_ms", "p50_ms", "p80_ms",
    "tflops", "matrix_percent", "copy_percent", "useful_gflop", "executed_gflop", "megabytes", "peak_megabytes", "launches", "error",
    "eager_error", "kernels_ms", "first_ms", "setup_ms", "sets", "copy_gbs", "matrix_tflops", "window_tflops", "note", "seconds",
    "command", *SAME,
)  # fmt: skip


def facts(device: str, commit: str | None) -> dict[str, str]:
    """What a row is measured with."""
    found = harness.facts(device, commit=commit) | harness.versions(device) | {"natten": harness.package_version("natten")}
    return {key: found[key] for key in SAME}


def key(task: Task, provider: str) -> str:
    """The name of a row, unlike any other."""
    return "/".join(part for part in (task.name, _dtype(task), task.rule, provider) if part)


class Bench:
    """One task: its inputs and what they should give, made when they are first needed and shared by all providers."""

    def __init__(self, task: Task, ceiling: Callable[[torch.dtype], Ceilings], *, seconds: float) -> None:
        self.task, self.seconds, self._ceiling = task, seconds, ceiling
        self._sets: list[Inputs] = []
        self._truths: dict[str, Truth] = {}

    @property
    def sets(self) -> int:
        """Of inputs: as many as together are four times the last cache."""
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.task.device == "cuda" else CPU_CACHE
        return min(SETS, math.ceil(4 * cache / self.task.bytes("full")))

    def measured(self, providers: Sequence[Provider]) -> Iterator[dict[str, str]]:
        """A row of each: skipped, refused by what it called, FAILED at the gate, or timed."""
        for some in side_by_side.groups(providers, self.task.device):
            yield from self._timed(some, [self._entrant(provider) for provider in some])
            harness.forget(self.task.device)

    def _entrant(self, provider: Provider) -> Entrant:
        task = self.task
        row = {
            "shape": task.name, "problem": _problem(task), "dtype": _dtype(task), "rule": task.rule, "provider": provider.name,
            "function": provider.function, "useful_gflop": f"{task.flops(provider.function) / 1e9:.4g}",
            "megabytes": f"{task.bytes(provider.function) / 1e6:.4g}", "seconds": f"{self.seconds:g}",
        }  # fmt: skip
        if refusal := provider.refusal(task) or self._too_large(provider):
            return Entrant(row | {"status": "skipped", "note": refusal}, [])
        return side_by_side.gated(row, partial(self._gated, provider), task.device)

    def _gated(self, provider: Provider, row: dict[str, str]) -> Entrant:
        task = self.task
        self._sets = self._sets or [task.inputs(seed) for seed in range(self.sets)]
        ready = provider.prepare(task)
        laid = [ready.lay(inputs) for inputs in self._sets]
        row = row | {"sets": str(len(laid))}
        row |= {} if ready.setup_ms is None else {"setup_ms": f"{ready.setup_ms:.4g}"}
        begun = time.perf_counter()
        ready.run(laid[0])
        _wait(task)
        row |= {"first_ms": f"{1000 * (time.perf_counter() - begun):.4g}", "backend": ready.backend(laid[0])}
        error, eager = self._gate(provider, ready, laid[0])
        row |= {"error": f"{error:.3g}", "eager_error": f"{eager:.3g}"}
        return Entrant(row, [partial(ready.run, x) for x in laid])

    def _timed(self, providers: Sequence[Provider], entrants: Sequence[Entrant]) -> Iterator[dict[str, str]]:
        """On a CPU windows are timed beside torch's attention on one alone; on a GPU one window is too little to say anything."""
        device = self.task.device
        windows = any(one.calls and provider.function == "window" for provider, one in zip(providers, entrants, strict=True))
        alone = one_window(self.task) if device == "cpu" and windows else None
        beside = [Entrant({}, [alone.call])] if alone else []
        found = side_by_side.timed([*entrants, *beside], device, seconds=self.seconds)
        of_one = found.pop()[1] if beside else None
        window = {"window_tflops": f"{alone.flops / of_one.p50 / 1e9:.4g}"} if alone and of_one else {}
        for provider, entrant, (row, timing) in zip(providers, entrants, found, strict=True):
            if timing:
                row = row | (window if provider.function == "window" else {})
                row = side_by_side.finished(row, partial(self._numbers, provider, entrant, timing), device)
            yield row

    def _gate(self, provider: Provider, ready: Ready, laid: Any) -> tuple[float, float]:
        """Errors of the result and of eager torch; what eager torch code leaves unwritten is NaN."""
        if provider.function not in self._truths:
            self._truths[provider.function] = truth(self._sets[0], provider.function)
        with poisoned_memory() if isinstance(provider, Ours | Loop) else nullcontext():
            result = ready.run(laid)
        return self._truths[provider.function].check(ready.unlay(result))

    def _numbers(self, provider: Provider, entrant: Entrant, timing: Timing) -> dict[str, str]:
        task, ceiling = self.task, self._ceiling(self.task.dtype)
        rate = task.flops(provider.function) / timing.p50 / 1e9
        moved = task.bytes(provider.function) / timing.p50 / 1e6
        row = {
            "p20_ms": f"{timing.p20:.4g}", "p50_ms": f"{timing.p50:.4g}", "p80_ms": f"{timing.p80:.4g}", "tflops": f"{rate:.4g}",
            "matrix_percent": f"{100 * rate / ceiling.matrix_tflops:.3g}", "copy_percent": f"{100 * moved / ceiling.copy_gbs:.3g}",
            "copy_gbs": f"{ceiling.copy_gbs:.4g}", "matrix_tflops": f"{ceiling.matrix_tflops:.4g}",
        }  # fmt: skip
        if executed := provider.executed(task):
            row["executed_gflop"] = f"{executed / 1e9:.4g}"
        return row | _counted(entrant.calls[0], task.device)

    def _too_large(self, provider: Provider) -> str | None:
        """Estimated before anything runs: what is not there yet of the inputs, and what the provider takes beside them."""
        free = free_memory(self.task.device)
        s = self.task.shape
        inputs = 0 if self._sets else self.sets * self.task.bytes("full") * (s.heads + 2 * s.key_heads) // (2 * (s.heads + s.key_heads))
        needed = inputs + provider.memory(self.task)
        if free is None or needed <= 0.9 * free:
            return None
        return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def _counted(call: Callable[[], Any], device: str) -> dict[str, str]:
    """Memory and kernels of a call that was timed; what cannot be told is a note, for the time is good."""
    row, notes = dict[str, str](), []
    try:
        if (peak := peak_memory(call, device)) is not None:
            row["peak_megabytes"] = f"{peak / 1e6:.4g}"
    except Exception as problem:
        notes.append(f"peak memory not told: {type(problem).__name__}: {harness.first_line(problem)}")
    try:
        if found := kernels(call, device):
            row |= {"launches": str(len(found)), "kernel": max(found, key=lambda k: k[1])[0][:80], "kernels_ms": by_kernel(found)}
        elif found is not None:
            notes.append("kernels not told: the profiler saw none")
    except Exception as problem:
        notes.append(f"kernels not told: {type(problem).__name__}: {harness.first_line(problem)}")
    return row | {"note": "; ".join(notes)}


def by_kernel(found: Sequence[tuple[str, float]]) -> str:
    """Milliseconds of each kernel of one call by its name, the longest first, five at most."""
    times: dict[str, float] = {}
    for name, microseconds in found:
        times[name[:40]] = times.get(name[:40], 0.0) + microseconds / 1000
    longest = sorted(times.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {milliseconds:.4g}" for name, milliseconds in longest)


def free_memory(device: str) -> int | None:
    """Bytes; None where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    told = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", told.read_text(), re.MULTILINE) if told.exists() else None
    return 1024 * int(found[1]) if found else None


def measured_rows(
    picked: Sequence[Task], names: Sequence[str], standing: set[str], *, seconds: float
) -> Iterator[tuple[str, dict[str, str]]]:
    """Key and row of everything that does not stand yet; the ceilings are measured once per dtype."""
    found: dict[torch.dtype, Ceilings] = {}

    def ceiling(dtype: torch.dtype) -> Ceilings:
        if dtype not in found:
            found[dtype] = ceilings(picked[0].device, dtype, seconds=seconds)
        return found[dtype]

    for task in picked:
        wanted = [PROVIDERS[name] for name in names if key(task, name) not in standing]
        for row in Bench(task, ceiling, seconds=seconds).measured(wanted):
            name = key(task, row["provider"])
            yield name, row
            if harness.device_lost(task.device):
                raise SystemExit(f"the device was lost in {name}: the same command goes on after it")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    picked, names = _picked(parser, options)

    def measure(standing: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
        if options.device == "cpu":
            command.keep_freed_memory()
        return measured_rows(picked, names, standing, seconds=options.seconds)

    Benchmark("attention", FIELDS, SAME, line).run(
        parser, options, arguments,
        facts=lambda: facts(options.device, options.commit) | {"seconds": f"{options.seconds:g}"},
        wanted={key(task, name): isinstance(PROVIDERS[name], Ours) for task in picked for name in names},
        measure=measure,
    )  # fmt: skip


def line(row: Mapping[str, str]) -> str:
    """For people, on a terminal."""
    if row["status"] != "ok":
        return f"{row['row']}: {row['status']}, {row['note']}"
    parts = [
        f"{row['row']}: {row['p50_ms']} ms ({row['p20_ms']} - {row['p80_ms']})",
        f"{row['tflops']} TFLOP/s, {row['matrix_percent']}% of a matrix product, {row['copy_percent']}% of a copy",
        f"error {row['error']} (eager {row['eager_error']})",
        f"{row['peak_megabytes']} MB" if row["peak_megabytes"] else "",
        f"{row['launches']} launches" if row["launches"] else "",
        f"{row['setup_ms']} ms made ready" if row["setup_ms"] else "",
        row["backend"],
        f"ms by kernel: {row['kernels_ms']}" if row["kernels_ms"] else "",
        row["note"],
    ]
    return ", ".join(part for part in parts if part)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("attention", __doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", metavar="NAME", help=f"of {', '.join(SHAPES | CPU_SHAPES)}")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"of {', '.join(DTYPES)} (default: bf16 fp16; on a CPU fp32)")
    parser.add_argument("--quick", action="store_true", help="few shapes and providers, each shape in its model's dtype")
    command.add_seconds(parser, 0.5)
    return parser


def _picked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """Tasks and providers; refuses what is not known."""
    cpu = options.device == "cpu"
    known: dict[str, Sequence[str]] = {"shape": [*SHAPES, *CPU_SHAPES], "provider": list(PROVIDERS), "dtype": list(DTYPES)}
    for name, values in known.items():
        if unknown := [value for value in getattr(options, name) or () if value not in values]:
            parser.error(f"--{name} takes {', '.join(values)}, got {', '.join(unknown)}")
    command.check(parser, options)
    shapes = options.shape or list((CPU_QUICK if options.quick else CPU_SHAPES) if cpu else (QUICK if options.quick else SHAPES))
    names = options.provider or list(
        providers_compiled.CPU if cpu else (providers_compiled.QUICK if options.quick else PROVIDERS)
    )  # on a GPU also what refuses, so that its rows say so
    if options.dtype:
        dtypes: list[torch.dtype] | None = [DTYPES[name] for name in dict.fromkeys(options.dtype)]
    else:
        dtypes = [torch.float32] if cpu else None if options.quick else [torch.bfloat16, torch.float16]
    return list(tasks(list(dict.fromkeys(shapes)), dtypes, options.device)), list(dict.fromkeys(names))


def _problem(task: Task) -> str:
    s = task.shape
    parts = [f"batch {s.batch}", f"grid {s.grid[0]}x{s.grid[1]}", f"window {s.window[0]}x{s.window[1]}", f"patch {s.patch[0]}x{s.patch[1]}"]
    parts += [f"heads {s.heads}" + (f" on {s.groups}" if s.groups else ""), f"dim {s.head_dim}", f"text {s.text}"]
    return ", ".join(parts)


def _dtype(task: Task) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype is task.dtype)


def _wait(task: Task) -> None:
    if task.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
