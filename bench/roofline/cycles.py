"""Cycles of a compiled kernel on one multiprocessor of sm_90, from the disassembly of its main loop.

Per block of keys a program needs the tensor cores, the exponential unit, issue slots, and the block itself out of L2. Inside one
program products and softmax follow each other (the softmax waits for its scores, the second product for the softmax); programs
that share a multiprocessor overlap, and so do loads. A block takes, in cycles of a multiprocessor,

    max(matrix, other, l2, (matrix + other) / programs)      other = max(exponentials, issue)

Latencies and clocks are not in it. Instructions are counted as they are executed: what warps repeat costs its cycles.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from bench.attention.shapes import Shape
from scalediff_kernels.neighborhood.config import shared_memory

if TYPE_CHECKING:  # both need Triton
    from bench.compile.attention import Case
    from bench.compile.binary import Binary

# Per multiprocessor and clock, of sm_90 (NVIDIA, "Hopper Tuning Guide" and the H100 data sheet: 989.5 TFLOP/s dense at 132 x 1.83 GHz).
MATRIX_FLOPS, EXPONENTIALS, SCHEDULERS, REGISTERS, THREADS = 4096, 16, 4, 65_536, 2048
L2_BYTES = 24  # assumed: 5.6 TB/s over 132 multiprocessors at 1.75 GHz; not measured yet


class Cycles(NamedTuple):
    """Of one multiprocessor, for one block of keys of one program; `programs` share the multiprocessor."""

    matrix: float
    exponentials: float
    issue: float
    l2: float
    programs: int

    @property
    def compute(self) -> float:
        other = max(self.exponentials, self.issue)
        return max(self.matrix, other, (self.matrix + other) / self.programs)

    @property
    def total(self) -> float:
        return max(self.compute, self.l2)


def cycles(binary: Binary, num_warps: int, block_bytes: int) -> Cycles:
    """One pass of the main loop is one block of keys, `block_bytes` of K and V."""
    flops = 0
    for instruction in binary.loops[0]:
        if shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):  # issued by four warps together
            flops += 2 * prod(map(int, shape.groups())) * num_warps // 4
    exponentials = sum("MUFU.EX2" in i for i in binary.loops[0]) * num_warps * 32
    programs = min(
        REGISTERS // (-(-binary.registers // 8) * 8 * 32 * num_warps),
        (shared_memory("sm_90") + 1024) // (binary.shared + 1024),
        THREADS // (32 * num_warps),
    )
    issue = len(binary.loops[0]) * num_warps / SCHEDULERS
    return Cycles(flops / MATRIX_FLOPS, exponentials / EXPONENTIALS, issue, block_bytes / L2_BYTES, programs)


def case_of(shape: Shape, queries: Literal["image", "text"] = "image") -> Case:
    """A benchmark's shape as a kernel to compile."""
    from bench.compile.attention import Case

    sizes = (shape.grid, shape.window, shape.patch, shape.heads, shape.batch)
    return Case(shape.head_dim, shape.dtype, shape.text, queries, *sizes)
