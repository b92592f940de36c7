"""Compile the kernels for GPUs that are not there, and read the binaries: `python -m bench.compile --csv bench/results/compile.csv`.

Every entry of `launch_config`'s table, at a full and a padded head dim, is built by the library's own launch code on meta tensors,
compiled by Triton with a target in place of a driver, and disassembled with the tools in Triton's wheel. Gates: no spills (fp32,
which runs beside the tensor cores: none in the main loops); the generation's matrix instructions; TMA on the descriptor path,
cp.async on the pointer path; no trip of keys or values through registers in the main loops of sm_90.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bench.harness import ROOT, write_rows, write_text
from scalediff_kernels._launch import Launch
from scalediff_kernels.neighborhood.config import LaunchConfig, shared_memory
from scalediff_kernels.neighborhood.launch import image_launch, text_launch

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HEAD_DIMS = {torch.bfloat16: (40, 64, 128, 160), torch.float32: (64, 160)}  # every column of the table, full and padded

LEGEND = """Registers per thread / KB of shared memory per program; `p` marks the pointer path. Windows of 64 x 64, patches of 32 x 32,
24 heads; text rotated. Windows that boxes do not tile, ragged text and odd strides are compiled and gated as well, not shown. Faults
are what the gates of `bench.compile` find. Made on a CPU by `python -m bench.compile --csv bench/results/compile-VERSION.csv`, once
by each Triton (`pip install --target DIR --no-deps "triton==3.6.*"` and `PYTHONPATH=DIR` for the oldest), and then
`python -m bench.compile --doc docs/compiled.md`."""


@dataclass(frozen=True)
class Case:
    """One launch to compile: the FLUX grid at 4096 px unless said."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    text: int = 0
    queries: str = "image"
    grid: tuple[int, int] = (256, 256)
    window: tuple[int, int] = (64, 64)
    patch: tuple[int, int] = (32, 32)
    heads: int = 24
    batch: int = 1
    layout: str = "contiguous"  # "odd": strides that allow no wide loads; "expanded": one batch seen twice, which no descriptor takes

    def launch(self, device: str, config: LaunchConfig | None = None) -> Launch:
        def tokens(*shape: int) -> torch.Tensor:
            pad = self.layout == "odd"
            x = torch.empty(self.batch, *shape, self.heads, self.head_dim + pad, dtype=self.dtype, device="meta")[..., : self.head_dim]
            return x.expand(2, *x.shape[1:]) if self.layout == "expanded" else x

        q, k, v = (tokens(*self.grid) for _ in range(3))
        text_q, text_k, text_v = (tokens(self.text) for _ in range(3)) if self.text else (None, None, None)
        rope = (torch.empty(64, self.head_dim // 2, device="meta"),) * 2 if self.text else None
        arguments: dict[str, Any] = {
            "window": self.window, "patch": self.patch, "offset": (0, 0), "scale": self.head_dim**-0.5, "device": device, "config": config,
        }  # fmt: skip
        if self.queries == "image":
            return image_launch(torch.empty_like(q), q, k, v, text_k, text_v, rope, **arguments)
        assert text_q is not None
        assert text_k is not None
        assert text_v is not None
        return text_launch(torch.empty_like(text_q), text_q, k, v, text_k, text_v, rope, **arguments)


def cases() -> Iterator[Case]:
    """Every entry of the table: windows that boxes tile, and that they do not; text none, even, ragged; both kernels, every layout."""
    for dtype, dims in HEAD_DIMS.items():
        for dim in dims:
            yield Case(dim, dtype)
            yield Case(dim, dtype, text=512)
            yield Case(dim, dtype, text=512, queries="text")
            for window, patch in (((52, 76), (26, 38)), ((27, 15), (13, 7))):
                yield Case(dim, dtype, window=window, patch=patch, text=77)
            yield Case(dim, dtype, window=(52, 76), patch=(26, 38), text=77, queries="text")
            yield Case(dim, dtype, window=(3, 3), patch=(2, 2), text=77)
            for layout in ("odd", "expanded"):
                yield Case(dim, dtype, text=77, layout=layout)
                yield Case(dim, dtype, text=77, queries="text", layout=layout)


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


class _Absent:
    """Stands for the driver of a GPU that is not there: Triton asks it for nothing but the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}-{self.target.arch}"  # compiled kernels are kept by device

    def get_current_stream(self, device: object = None) -> int:
        return 0


def compile_launch(launch: Launch, target: str) -> Binary:
    """Compile for `target`, without running; the active driver is replaced for good, so do it in a process of its own."""
    driver.set_active(_Absent(TARGETS[target]))
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
        code = _run("nvdisasm", "-c", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Binary(int(registers[1]), _spills(code.splitlines()), shared, code, tuple(map(tuple, main_loops(code))))


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
    product = r"\b(?:HGMMA|HMMA|UTCHMMA)\b" if re.search(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", code) else r"\bFFMA\b"

    def share(loop: list[str]) -> float:
        return sum(bool(re.search(product, i)) for i in loop) / len(loop)

    loops = [instructions[start:stop] for start, stop in spans if (start, stop) in inner]
    return sorted((loop for loop in loops if share(loop)), key=share, reverse=True)


def check(case: Case, target: str, launch: Launch, binary: Binary) -> list[str]:
    """What is wrong with a binary."""
    faults = []
    if target.startswith("sm_") and not binary.loops:
        faults.append("no main loop found")
    if binary.shared > shared_memory(target):
        faults.append(f"{binary.shared} bytes of shared memory, {shared_memory(target)} there")
    spills = sum(map(_spills, binary.loops)) if case.dtype is torch.float32 and binary.loops else binary.spills
    if spills:
        faults.append(f"{spills} spills")
    descriptors = launch.config.path == "descriptor"
    if descriptors and not binary.count(r"\bUTMALDG"):
        faults.append("no TMA")
    if case.dtype is torch.float32:
        return faults
    if case.layout == "contiguous" and min(case.window) >= 4 and target in ("sm_90", "sm_100") and not descriptors:
        faults.append("not on the descriptor path")
    generation = {"sm_90": r"\bHGMMA", "sm_100": r"\bUTCHMMA", "gfx942": "v_mfma"}
    wide = prod(launch.config.query_box) >= 64  # a matrix instruction of sm_90 and sm_100 takes 64 rows
    product = generation.get(target, r"\bHMMA") if wide or target == "gfx942" else r"\bHMMA"
    if not binary.count(product):
        faults.append(f"no {product}")
    if target == "sm_90" and descriptors and wide and _moves(binary):
        faults.append("keys or values go through registers in the main loop")
    wide_loads = case.layout != "odd" and launch.config.num_stages > 1
    if target.startswith("sm_") and not descriptors and wide_loads and not binary.count(r"\bLDGSTS"):
        faults.append("no cp.async")
    return faults


def _spills(instructions: Iterable[str]) -> int:
    return sum(bool(re.search(r"\b(?:STL|LDL)\b", i)) for i in instructions)


def _moves(binary: Binary) -> bool:
    """Whether a loop moves anything between registers and shared memory."""
    return any(re.search(r"\b(?:LDSM|STSM|STS|LDS)\b", i) for loop in binary.loops for i in loop)


def row(case: Case, target: str) -> dict[str, Any]:
    launch = case.launch(target)
    config = launch.config
    facts = {
        "triton": triton.__version__, "target": target, "queries": case.queries, "dtype": str(case.dtype).removeprefix("torch."),
        "head_dim": case.head_dim, "layout": case.layout, "window": "x".join(map(str, case.window)), "text": case.text, "path": config.path,
        "query_box": "x".join(map(str, config.query_box)),
        "key_box": "x".join(map(str, config.key_box)), "warps": launch.arguments["num_warps"], "stages": config.num_stages,
    }  # fmt: skip
    try:
        binary = compile_launch(launch, target)
    except Exception as error:  # a compiler that gives up is a result: it belongs into the table
        return facts | {"registers": "", "spills": "", "shared": "", "faults": f"does not compile: {str(error).splitlines()[0][:80]}"}
    return facts | {
        "registers": binary.registers,
        "spills": binary.spills,
        "shared": binary.shared,
        "faults": "; ".join(check(case, target, launch, binary)),
    }


def markdown(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """docs/compiled.md from the rows of each Triton version, oldest first."""
    lines = ["# What the compiler makes of the attention kernel", "", LEGEND]
    for version, rows in tables.items():
        broken = sum(bool(r["faults"]) for r in rows)
        lines += ["", f"## Triton {version}: {len(rows)} kernels, {broken} with faults", ""]
        targets = list(dict.fromkeys(r["target"] for r in rows))
        lines += ["| queries | dtype | D | text | " + " | ".join(targets) + " |", "|---|---|--:|--:|" + "--:|" * len(targets)]
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for r in rows:
            if r["window"] == "64x64" and r["text"] != "77" and r["layout"] == "contiguous":
                path = "" if r["path"] == "descriptor" else "p "
                cell = f"{path}{r['registers']}/{-(-int(r['shared']) // 1024)}" if r["registers"] else "does not compile"
                cells.setdefault((r["queries"], r["dtype"], r["head_dim"], r["text"]), {})[r["target"]] = cell
        lines += ["| " + " | ".join([*key, *(row.get(t, "") for t in targets)]) + " |" for key, row in cells.items()]
    return "\n".join(lines) + "\n"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _rows_of(target: str) -> list[dict[str, Any]]:
    return [row(case, target) for case in cases()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    parser.add_argument("--doc", type=Path, help="compile nothing, write this page from the committed rows")
    options = parser.parse_args()
    if options.doc:
        write_text(options.doc, markdown(committed()))
        return
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for target, result in zip(options.targets, pool.map(_rows_of, options.targets), strict=True):
            rows += result
            broken = [r for r in result if r["faults"]]
            print(f"triton {triton.__version__} {target}: {len(result)} kernels, {len(broken)} with faults", flush=True)
            for r in broken:
                print("  ", *(f"{key}={value}" for key, value in r.items() if key not in ("triton", "target")), flush=True)
    if options.csv:
        write_rows(options.csv, list(rows[0]), rows)
    raise SystemExit(any(r["faults"] for r in rows))


def committed() -> dict[str, list[dict[str, str]]]:
    """Rows by Triton version, oldest first."""
    tables = {}
    for path in sorted((ROOT / "bench" / "results").glob("compile-*.csv")):
        with path.open(newline="") as file:
            tables[path.stem.removeprefix("compile-")] = list(csv.DictReader(file))
    return tables


if __name__ == "__main__":
    main()
