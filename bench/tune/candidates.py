"""Candidates for the table of launch configurations: those that are tried, and what is found of one on a GPU.

They are in a module of their own because the command's processes import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.attention import shapes
from bench.attention.gate import truth
from bench.harness.device import first_line
from bench.harness.rows import Row
from bench.harness.timing import measure_in_turn
from bench.roofline.call import case_of, reconfigured
from scalediff_kernels.neighborhood.config import LaunchConfig, Pipeline

SHAPES = {"flux-4096": "window", "sdxl-64-4096": "", "sdxl-32-4096": ""}


@dataclass(frozen=True)
class Candidate:
    """A configuration for the image queries of a shape."""

    shape: str
    config: LaunchConfig

    @property
    def entry(self) -> Pipeline:
        """As in the table."""
        c = self.config
        return Pipeline(prod(c.query_box), prod(c.key_box), c.num_stages, c.registers, c.ping_pong)

    @property
    def name(self) -> str:
        queries, keys, stages, registers, ping_pong = self.entry
        return f"{self.shape}/{queries} x {keys}, {stages} stages, {registers} registers, {'turns' if ping_pong else 'no turns'}"

    def row(self) -> Row:
        return {"shape": self.shape} | {name: str(value) for name, value in self.entry._asdict().items()}


def candidates(name: str) -> list[Candidate]:
    """The table's configuration of a shape, and its neighbours."""
    case = case_of(shapes.SHAPES[name], "image", SHAPES[name])
    first = Candidate(name, case.launch("sm_90").config).entry
    entries = [
        first,
        first._replace(ping_pong=not first.ping_pong),
        first._replace(stages=first.stages - 1),
        first._replace(stages=first.stages + 1),
        first._replace(registers=232),
        first._replace(keys=64, stages=4),
        Pipeline(256, 64, 4, 112, ping_pong=False),
        Pipeline(192, 64, 4, 160, ping_pong=False),
    ]
    return [Candidate(name, reconfigured(case, entry)) for entry in entries if entry.stages > 1]


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
    """Compile a candidate, and put it through the gate on a grid of six patches and eight heads: some tiles for every multiprocessor."""
    full = shapes.SHAPES[candidate.shape]
    small = replace(full, grid=(full.window[0], full.window[1] + full.patch[1]), heads=8, groups=0, batch=1)
    launch, out, inputs = next(calls(candidate, small))
    launch.run()
    error, eager = truth(inputs, "window", whole=True).image.check("image", out.flatten(1, 2))
    return {"error": f"{error:.3g}", "eager_error": f"{eager:.3g}"}


def timed(candidate: Candidate, seconds: float) -> Row:
    """Time a candidate; its first result must be its last one, bit for bit."""
    shape = shapes.SHAPES[candidate.shape]
    found = list(calls(candidate, shape))
    found[0][0].run()
    first = found[0][1].clone()
    timing = measure_in_turn([launch.run for launch, _, _ in found], "cuda", seconds=seconds)
    if not (torch.equal(found[0][1], first) and first.isfinite().all()):
        raise RuntimeError("its results differ from run to run, or are not finite")
    rate = shape.flops("image") / timing.p50 / 1e9
    return {f"{name}_ms": f"{value:.4g}" for name, value in timing._asdict().items()} | {"tflops": f"{rate:.4g}"}


@torch.no_grad()
def send_rows(sender: Connection, measure: Callable[[Candidate], Row], candidates: Sequence[Candidate]) -> None:
    """Measure candidates in a process of their own; one that raises has a row that says so."""
    for candidate in candidates:
        try:
            sender.send(measure(candidate))
        except Exception as problem:
            sender.send({"status": "FAILED", "note": f"{type(problem).__name__}: {first_line(problem)}"})
