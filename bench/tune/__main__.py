"""Try the neighbours of the warp-specialised kernel's launch configurations on an sm_90 GPU: `python -m bench.tune`.

Of every shape the configuration of the table, then those that differ from it in one respect: stages, turns, registers, keys of a block, or
query rows. Every candidate has processes of its own with a limit, since a wrong barrier hangs: all are compiled and checked first, several
at a time, then timed one after another. A candidate that is faster than the table's is a line for `_PIPELINES` in
`kernels/scalediff_kernels/neighborhood/config.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from bench.attention import shapes
from bench.harness.command import Benchmark, parser_of, timed_line
from bench.harness.device import first_line
from bench.harness.facts import VERSIONS
from bench.harness.rows import Row
from bench.harness.timing import measure_in_turn
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.config import LaunchConfig, Problem, key_box, launch_config
from scalediff_kernels.neighborhood.geometry import attention_flops
from scalediff_kernels.testing import assert_within_budget

LIMIT = 20.0  # seconds of a process
AT_ONCE = 8  # processes that compile and check
SHAPES = {"flux-4096": "window", "sdxl-64-4096": "", "sdxl-32-4096": ""}
SAME = ("machine", "commit", "torch", *VERSIONS)
FIELDS = (
    "row", "status", "shape", "queries", "keys", "stages", "registers", "ping_pong", "p20_ms", "p50_ms", "p80_ms", "tflops", "error",
    "note", "seconds", "command", *SAME,
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A configuration for the image queries of a shape."""

    shape: str
    config: LaunchConfig

    @property
    def name(self) -> str:
        c = self.config
        turns = "turns" if c.ping_pong else "no turns"
        return f"{self.shape}/{prod(c.query_box)} x {prod(c.key_box)}, {c.num_stages} stages, {c.registers} registers, {turns}"

    def row(self) -> Row:
        c = self.config
        values = {"queries": prod(c.query_box), "keys": prod(c.key_box), "stages": c.num_stages, "registers": c.registers}
        return {"shape": self.shape, "ping_pong": str(c.ping_pong)} | {name: str(value) for name, value in values.items()}


def candidates(name: str) -> list[Candidate]:
    """The table's configuration of a shape, and its neighbours."""
    s = shapes.SHAPES[name]
    problem = Problem(s.grid, s.window, s.patch, s.head_dim, s.dtype.itemsize, s.text, rope=s.text > 0)
    first, keys = launch_config(problem, "sm_90", "warp-specialised"), {n: key_box(s.window, n) for n in (32, 64, 128, 256)}
    half = keys[64]
    changes: list[dict[str, Any]] = [
        {},
        {"ping_pong": not first.ping_pong},
        {"num_stages": first.num_stages - 1},
        {"num_stages": first.num_stages + 1},
        {"registers": 232},
        {"key_box": half, "text_block": prod(half), "num_stages": 4},
        {"query_box": (16, 16), "key_box": half, "text_block": prod(half), "num_stages": 4, "registers": 112, "ping_pong": False},
        {"query_box": (12, 16), "key_box": half, "text_block": prod(half), "num_stages": 4, "registers": 160, "ping_pong": False},
    ]
    found = [first._replace(**change) for change in changes]
    return [Candidate(name, config) for config in found if config.num_stages > 1]


def calls(candidate: Candidate, shape: shapes.Shape) -> Iterator[tuple[Any, torch.Tensor, shapes.Inputs]]:
    """The launch of a candidate, its output and its inputs, for two sets of inputs."""
    from scalediff_kernels.neighborhood.launch import image_launch

    for seed in (0, 1):
        inputs = shapes.Task(candidate.shape, shape, shape.dtype, "cuda", SHAPES[candidate.shape]).inputs(seed)
        q, k, v = inputs.image
        out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
        text_k, text_v = inputs.text[1:] if shape.text else (None, None)
        how: dict[str, Any] = {"window": shape.window, "patch": shape.patch, "offset": (0, 0), "scale": shape.head_dim**-0.5}
        yield image_launch(out, q, k, v, text_k, text_v, inputs.rope, **how, device="sm_90", config=candidate.config), out, inputs


def check(candidate: Candidate) -> Row:
    """Compile a candidate, and compare it with fp64 on a grid of six patches and one head."""
    full = shapes.SHAPES[candidate.shape]
    small = replace(full, grid=(full.window[0], full.window[1] + full.patch[1]), heads=1, groups=0, batch=1)
    launch, out, inputs = next(calls(candidate, small))
    launch.run()
    how: dict[str, Any] = {"window": small.window, "patch": small.patch}
    exact, plain = (_image(inputs, dtype, impl, how) for dtype, impl in ((torch.float64, "reference"), (small.dtype, "sdpa")))
    assert_within_budget(out, plain, exact)
    return {"error": f"{(out.double() - exact).abs().max().item():.3g}"}


def _image(inputs: shapes.Inputs, dtype: torch.dtype, impl: Any, how: dict[str, Any]) -> torch.Tensor:
    q, k, v = (x.to(dtype) for x in inputs.image)
    out: torch.Tensor
    if not inputs.task.shape.text:
        out = neighborhood_patch_attention(q, k, v, **how, impl=impl)
        return out
    rope = inputs.rope and (inputs.rope[0].double(), inputs.rope[1].double())
    text = [x.to(dtype) for x in inputs.text]
    out, _ = joint_neighborhood_patch_attention(q, k, v, *text, **how, text_rope=rope, text_queries=None, impl=impl)
    return out


def timed(candidate: Candidate, seconds: float) -> Row:
    shape = shapes.SHAPES[candidate.shape]
    timing = measure_in_turn([launch.run for launch, _, _ in calls(candidate, shape)], "cuda", seconds=seconds)
    sizes = {"heads": shape.heads, "head_dim": shape.head_dim, "batch": shape.batch, "text": shape.text}
    rate = attention_flops(grid=shape.grid, window=shape.window, **sizes) / timing.p50 / 1e9
    return {f"{name}_ms": f"{value:.4g}" for name, value in timing._asdict().items()} | {"tflops": f"{rate:.4g}"}


def in_a_process(candidate: Candidate, what: str, seconds: float) -> Row:
    """The columns that `check` or `timed` finds; status and note where it fails or hangs."""
    words = [sys.executable, "-m", "bench.tune", "--one", what, candidate.shape, json.dumps(candidate.config), "--seconds", str(seconds)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, env=os.environ, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "FAILED", "note": f"{what} was stopped after {LIMIT:.0f} s: it hangs"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found: Row = json.loads(lines[-1])
        return found
    return {"status": "FAILED", "note": f"{what}: {(done.stderr.strip().splitlines() or ['nothing was printed'])[-1][:160]}"}


def one(shape: str, config: str) -> Candidate:
    """A candidate out of the command line."""
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in json.loads(config)]
    return Candidate(shape, LaunchConfig._make(values))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("tune", __doc__.split("\n")[0], seconds=0.3)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=1.5, help="no candidate is begun later (default: %(default)s)")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "SHAPE", "CONFIG"), help="check or time one candidate in this process")
    options = parser.parse_args(arguments)
    if options.one:
        candidate = one(*options.one[1:])
        try:
            print(json.dumps(check(candidate) if options.one[0] == "check" else timed(candidate, options.seconds)))
        except Exception as problem:
            raise SystemExit(f"{type(problem).__name__}: {first_line(problem)}") from problem
        return
    deadline = time.monotonic() + 60 * options.minutes
    wanted = {candidate.name: candidate for name in options.shape for candidate in candidates(name)}

    def measure(finished: Set[str]) -> Iterator[tuple[str, Row]]:
        todo = [candidate for name, candidate in wanted.items() if name not in finished]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            checked = list(pool.map(lambda candidate: in_a_process(candidate, "check", options.seconds), todo))
        for candidate, row in zip(todo, checked, strict=True):
            if "status" not in row:
                late = time.monotonic() > deadline
                row |= {"status": "skipped", "note": "no time was left"} if late else in_a_process(candidate, "time", options.seconds)
            yield candidate.name, {"status": "ok", "note": ""} | candidate.row() | row

    table = {candidates(name)[0].name for name in options.shape}
    Benchmark("tune", FIELDS, SAME, line).run(parser, options, arguments, wanted={name: name in table for name in wanted}, measure=measure)


def line(row: Row) -> str:
    """For a terminal: a row, and the entry of the table that it is."""
    entry = f"Pipeline({row['queries']}, {row['keys']}, {row['stages']}, {row['registers']}, {row['ping_pong']})"
    return timed_line(row, f"{row['tflops']} TFLOP/s", entry)


if __name__ == "__main__":
    main()
