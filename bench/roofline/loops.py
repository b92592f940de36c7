"""The main loop of a compiled kernel as the steps of a warp, read off the disassembly: what it issues, and what it waits for where.

A step is an action and its amounts. `run`: cycles of issue slots, of the pipe of half rate and of the exponential unit, and of latency.
`product`: cycles of the tensor cores. `wait`: products that may stay in flight. `acquire`, `release`: an mbarrier, by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

# Of a multiprocessor of sm_90 and clock (NVIDIA's "Hopper Tuning Guide", "CUDA C++ Programming Guide", and the data sheet of the H100:
# 989.5 TFLOP/s dense at 132 x 1.83 GHz); a warp issues to one of four schedulers, and the warps of a warpgroup have one each.
MATRIX_FLOPS, EXPONENTIALS, SCHEDULERS = 4096, 16, 4
HALF_RATE = re.compile(r"FMNMX|F2FP|FSETP|ISETP|IADD3|LOP3|LEA|SHF|SEL|PRMT")
LATENCY = 25  # cycles of a barrier, a wait, or two shuffles of one reduction; assumed


class Step(NamedTuple):
    action: str
    amounts: tuple[float, ...] = ()
    name: str = ""


def steps(loop: Iterable[str], *, ping_pong: bool = False) -> tuple[Step, ...]:
    """The steps of one pass of a consumer's loop, through which one warp of each scheduler goes."""
    turn = ["turn"] if ping_pong else []
    acquired, released = iter(["v", *turn, "k"]), iter([*turn, "k", "v"])
    found, run, flops = list[Step](), [0.0] * 4, 0

    def end(*step: Step) -> None:
        """End a run of instructions, which is not empty, with a step."""
        if any(run):
            found.append(Step("run", tuple(run)))
        run[:] = [0.0] * 4
        found.extend(step)

    for instruction in loop:
        name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
        if name.startswith("MUFU") and not run[2]:  # a softmax takes its maxima first
            end()
        run[0] += 1
        run[1] += 2 * bool(HALF_RATE.match(name))
        run[2] += 32 * SCHEDULERS / EXPONENTIALS * name.startswith("MUFU")
        run[3] += LATENCY * bool(re.match(r"BAR\b|WARPGROUP\.DEPBAR|SYNCS\.PHASECHK", name)) + LATENCY / 2 * name.startswith("SHFL")
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            if not flops:
                end(Step("product", (0,)))
                product = len(found) - 1
            flops += 2 * prod(map(int, shape.groups()))
            if "gsb0" in instruction:
                found[product], flops = Step("product", (flops / MATRIX_FLOPS,)), 0
        elif name.startswith("WARPGROUP.DEPBAR"):
            end(Step("wait", (int(instruction.split("0x")[-1], 16),)))
        elif name.startswith("SYNCS.PHASECHK"):
            end(Step("acquire", name=next(acquired)))
        elif name.startswith("SYNCS.ARRIVE"):
            end(Step("release", name=next(released)))
    end()
    return tuple(found)


def cycles(loop: Iterable[Step], action: str, resource: int = 0) -> float:
    """Cycles that one pass needs of a resource."""
    return sum(step.amounts[resource] for step in loop if step.action == action)


def to_text(loop: Iterable[Step]) -> str:
    return "; ".join(" ".join([step.action, *(f"{amount:g}" for amount in step.amounts), step.name]).strip() for step in loop)


def from_text(text: str) -> tuple[Step, ...]:
    found = []
    for action, *words in map(str.split, text.split("; ")):
        named = action in ("acquire", "release")
        found.append(Step(action, name=words[0]) if named else Step(action, tuple(map(float, words))))
    return tuple(found)
