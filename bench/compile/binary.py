"""Compile a launch for a GPU that this machine does not have, and read the binary.

Triton is given a target in place of a driver, and asks it for nothing else; the binary is disassembled with the tools in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from scalediff_kernels._launch import Launch

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Binary:
    """What the compiler made; `loops` holds the instructions of the innermost loops with products, the main loop first."""

    registers: int
    spills: int
    shared: int
    code: str
    loops: tuple[tuple[str, ...], ...]

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.code))


def compile_launch(launch: Launch, target: str) -> Binary:
    """Compile for `target`, without running; the active driver is replaced for good, so do it in a process of its own."""
    absent = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: target,  # compiled kernels are kept by device
        get_current_stream=lambda device=None: 0,
    )
    driver.set_active(absent)
    knobs.compilation.disable_line_info = True  # the same instructions in less time
    compiled = launch.kernel.warmup(grid=(launch.programs,), **launch.arguments)
    shared = compiled.metadata.shared
    if TARGETS[target].backend == "hip":
        code = compiled.asm["amdgcn"]
        facts = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
        return Binary(facts["vgpr_count"], facts["vgpr_spill_count"], shared, code, ())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        code = _run("nvdisasm", "-c", "-ndf", cubin.name)  # without the targets of indirect branches, which take time to find
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Binary(int(registers[1]), spills(code.splitlines()), shared, code, tuple(map(tuple, main_loops(code))))


def main_loops(code: str) -> list[list[str]]:
    """Instructions of the innermost loops with matrix products, from nvdisasm's listing: a label up to the branch back to it.

    The loop with the largest share of products comes first.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.+?)\s*;", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                spans.append((labels[back[1]], len(instructions)))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    tensor_cores = r"\b(?:HGMMA|HMMA|UTCHMMA)\b"
    product = tensor_cores if re.search(tensor_cores, code) else r"\bFFMA\b"

    def share(loop: list[str]) -> float:
        return sum(bool(re.search(product, i)) for i in loop) / len(loop)

    loops = [instructions[start:stop] for start, stop in inner]
    return sorted(filter(share, loops), key=share, reverse=True)


def spills(instructions: Iterable[str]) -> int:
    return sum(bool(re.search(r"\b(?:STL|LDL)\b", i)) for i in instructions)


def serialised(loop: Iterable[str]) -> bool:
    """Whether ptxas makes the warpgroup products of a loop wait for each other: more waits than its two products need."""
    return sum("WARPGROUP.DEPBAR" in i for i in loop) > 2


def order(loop: Iterable[str]) -> tuple[str, ...]:
    """Warpgroup products, waits for all but so many of them, and exponentials in the order of a loop, from the first product after a wait.

    Neighbours of one kind count once.
    """
    kinds = {r"\bHGMMA": "products", r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\d)": "wait", r"\bMUFU\.EX2": "exponentials"}
    found: list[str] = []
    for instruction in loop:
        for pattern, kind in kinds.items():
            if match := re.search(pattern, instruction):
                name = f"wait {match[1]}" if kind == "wait" else kind
                found += [name] if found[-1:] != [name] else []
    turned = (tuple(found[i:] + found[:i]) for i in range(len(found)) if found[i] == "products" and found[i - 1].startswith("wait"))
    return next(turned, tuple(found))


def exponentials(loop: Iterable[str], num_warps: int) -> int:
    """Of one pass of a loop, all threads of a program together."""
    return 32 * num_warps * sum("MUFU.EX2" in i for i in loop)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
