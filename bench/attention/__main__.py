"""Neighborhood patch attention against everything else that attends to a large picture: `python -m bench.attention`.

Every row passes a gate at its very shape against attention in fp64 (`gate`), and is then timed on sets of inputs taken in turn, so that
caches are cold. How rows are measured and written: `bench/harness/gated.py`, `bench/harness/command.py`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.attention import compiled
from bench.attention.compiled import PROVIDERS
from bench.attention.gate import Truth, truth
from bench.attention.providers import Provider
from bench.attention.sdpa import one_window
from bench.attention.shapes import CPU_QUICK, CPU_SHAPES, DTYPES, QUICK, SHAPES, Inputs, Task, tasks
from bench.harness.command import Benchmark, parser_of, timed_line
from bench.harness.facts import VERSIONS
from bench.harness.gated import Candidate, measured
from bench.harness.rows import Row
from bench.harness.timing import Call, Ceilings, Timing, ceilings, sets_of_inputs
from scalediff_kernels.testing import poisoned_memory

OURS = ("triton", "triton-plain", "sdpa")
SAME = ("machine", "threads", "commit", "torch", *VERSIONS, "natten")
FIELDS = (
    "row", "status", "shape", "problem", "dtype", "rule", "provider", "function", "backend", "kernel", "p20_ms", "p50_ms", "p80_ms",
    "tflops", "matrix_percent", "copy_percent", "useful_gflop", "executed_gflop", "megabytes", "peak_megabytes", "launches", "error",
    "eager_error", "kernels_ms", "first_ms", "setup_ms", "sets", "copy_gbs", "matrix_tflops", "window_tflops", "note", "seconds",
    "command", *SAME,
)  # fmt: skip


class Bench:
    """One task; its inputs and expected results are made when they are first needed, and shared by all providers."""

    def __init__(self, task: Task, ceiling: Callable[[torch.dtype], Ceilings], *, seconds: float) -> None:
        self.task, self.seconds, self._ceiling = task, seconds, ceiling
        self._sets: list[Inputs] = []
        self._truths: dict[str, Truth] = {}

    def measured(self, providers: Sequence[Provider]) -> Iterator[Row]:
        """A row for each. On a CPU torch's attention on one window alone is timed beside them; on a GPU that is too little work."""
        windows = any(provider.function == "window" for provider in providers)
        beside = (lambda: [one_window(self.task)[0]]) if windows else None
        yield from measured([self._candidate(one) for one in providers], self.task.device, seconds=self.seconds, beside=beside)

    def _candidate(self, provider: Provider) -> Candidate:
        task, s = self.task, self.task.shape
        sizes = [f"{name} {y}x{x}" for name, (y, x) in (("grid", s.grid), ("window", s.window), ("patch", s.patch))]
        heads = f"heads {s.heads}" + (f" on {s.groups}" if s.groups else "")
        row = {
            "shape": task.name, "problem": ", ".join([f"batch {s.batch}", *sizes, heads, f"dim {s.head_dim}", f"text {s.text}"]),
            "dtype": task.dtype_name, "rule": task.rule, "provider": provider.name, "function": provider.function,
            "useful_gflop": f"{task.flops(provider.function) / 1e9:.4g}", "megabytes": f"{task.bytes(provider.function) / 1e6:.4g}",
        }  # fmt: skip
        return Candidate(row, partial(self._prepare, provider), partial(self._numbers, provider), provider.refusal(task))

    def _prepare(self, provider: Provider) -> tuple[Row, list[Call]]:
        """The first call, the gate, and the calls to time."""
        task = self.task
        self._sets = self._sets or [task.inputs(seed) for seed in range(sets_of_inputs(task.bytes("full"), task.device))]
        ready = provider.prepare(task)
        laid = [ready.lay(inputs) for inputs in self._sets]
        begun = time.perf_counter()
        ready.run(laid[0])
        if task.device == "cuda":
            torch.cuda.synchronize()
        row = {"first_ms": f"{1000 * (time.perf_counter() - begun):.4g}"}
        row |= {} if ready.setup_ms is None else {"setup_ms": f"{ready.setup_ms:.4g}"}
        if provider.function not in self._truths:
            self._truths[provider.function] = truth(self._sets[0], provider.function)
        seen = SeenBackends()
        # What our code and the loop leave unwritten is NaN.
        with poisoned_memory() if provider.name in (*OURS, "loop") else nullcontext(), nullcontext() if ready.backend else seen:
            result = ready.run(laid[0])
        error, eager = self._truths[provider.function].check(ready.unlay(result))
        row |= {"backend": ready.backend or " and ".join(seen.names), "error": f"{error:.3g}", "eager_error": f"{eager:.3g}"}
        return row, [partial(ready.run, x) for x in laid]

    def _numbers(self, provider: Provider, timing: Timing, beside: Timing | None) -> Row:
        task, ceiling = self.task, self._ceiling(self.task.dtype)
        rate = task.flops(provider.function) / timing.p50 / 1e9
        moved = task.bytes(provider.function) / timing.p50 / 1e6
        numbers = {
            "tflops": rate, "copy_gbs": ceiling.copy_gbs, "matrix_tflops": ceiling.matrix_tflops,
            "executed_gflop": (provider.executed(task) or 0) / 1e9,
            "window_tflops": one_window(task)[1] / beside.p50 / 1e9 if beside and provider.function == "window" else 0,
        }  # fmt: skip
        percents = {"matrix_percent": rate / ceiling.matrix_tflops, "copy_percent": moved / ceiling.copy_gbs}
        row = {name: f"{value:.4g}" for name, value in numbers.items() if value}
        return row | {name: f"{100 * value:.3g}" for name, value in percents.items()}


class SeenBackends(TorchDispatchMode):
    """Records which SDPA backends run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if match := re.search(r"_scaled_dot_product_\w*?(cudnn|flash|efficient)", str(function)):
            self.names[match[1]] = None
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    picked, names = _picked(options)
    ceiling = cache(lambda dtype: ceilings(options.device, dtype, seconds=options.seconds))

    def measure(finished: Set[str]) -> Iterator[tuple[str, Row]]:
        for task in picked:
            wanted = [PROVIDERS[name] for name in names if task.row_name(name) not in finished]
            for row in Bench(task, ceiling, seconds=options.seconds).measured(wanted):
                yield task.row_name(row["provider"]), row

    wanted = {task.row_name(name): name in OURS for task in picked for name in names}
    Benchmark("attention", FIELDS, SAME, line).run(parser, options, arguments, wanted=wanted, measure=measure)


def line(row: Row) -> str:
    rates = f"{row['tflops']} TFLOP/s, {row['matrix_percent']}% of a matrix product, {row['copy_percent']}% of a copy"
    return timed_line(row, rates, row["backend"], f"ms by kernel: {row['kernels_ms']}" if row["kernels_ms"] else "")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("attention", __doc__.split("\n")[0], seconds=0.5)
    parser.add_argument("--shape", nargs="+", metavar="NAME", choices=[*SHAPES, *CPU_SHAPES], help=f"of {', '.join(SHAPES | CPU_SHAPES)}")
    parser.add_argument("--provider", nargs="+", metavar="NAME", choices=[*PROVIDERS], help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], help="default: bf16 fp16; on a CPU fp32")
    parser.add_argument("--quick", action="store_true", help="few shapes and providers, each shape in its model's dtype")
    return parser


def _picked(options: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """Tasks and providers; on a GPU also providers that refuse, so that their rows say so."""
    cpu, quick = options.device == "cpu", options.quick
    shapes = options.shape or ((CPU_QUICK if quick else CPU_SHAPES) if cpu else (QUICK if quick else SHAPES))
    names = options.provider or (compiled.CPU if cpu else compiled.QUICK if quick else PROVIDERS)
    names_of_dtypes = options.dtype or (["fp32"] if cpu else [] if quick else ["bf16", "fp16"])
    dtypes = [DTYPES[name] for name in dict.fromkeys(names_of_dtypes)]
    return list(tasks(list(dict.fromkeys(shapes)), dtypes, options.device)), list(dict.fromkeys(names))


if __name__ == "__main__":
    main()
