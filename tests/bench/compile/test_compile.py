"""The compilation gates and the static roofline: one kernel by default, every kernel among the slow gates (`.ci/run`)."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.compile import lowpass as compile_lowpass
from bench.compile.__main__ import committed, page
from bench.compile.attention import Case
from bench.compile.binary import Binary, exponentials, main_loops, serialised
from bench.compile.rows import KERNELS
from bench.harness.facts import ROOT
from bench.predictions import __main__ as predictions
from bench.roofline.cycles import cycles

DOC = ROOT / "docs" / "evidence" / "compiled.md"

LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0040*/                   MUFU.EX2 R7, R6 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   STG.E.128 desc[UR6][R2.64], R8 ;
        /*0070*/              @!P1 BRA `(.L_x_0) ;
"""


def test_the_main_loop_is_the_innermost_with_the_products() -> None:
    (loop,) = main_loops(LISTING)
    assert [i.split()[0] for i in loop] == ["HGMMA.64x64x16.F32.BF16", "HGMMA.64x128x16.F32.BF16", "MUFU.EX2", "@!P0"]
    assert main_loops("nothing here") == []


def test_cycles_follow_from_the_instructions() -> None:
    binary = Binary(registers=168, spills=0, shared=60_000, code=LISTING, loops=tuple(map(tuple, main_loops(LISTING))))
    counted = cycles(binary, num_warps=8, block_bytes=240)
    assert counted.matrix == 2 * (2 * 64 * 64 * 16 + 2 * 64 * 128 * 16) / 4096
    assert counted.exponentials == 8 * 32 / 16
    assert counted.issue == 4 * 8 / 4
    assert counted.programs == 1  # 168 registers x 256 threads, twice, are more than 65,536
    assert counted.l2 == 10
    assert counted.total == counted.matrix + counted.exponentials
    assert counted._replace(l2=1000.0).total == 1000


def test_products_that_wait_for_each_other_and_repeated_softmaxes_are_faults() -> None:
    (loop,) = main_loops(LISTING)
    assert exponentials(loop, num_warps=8) == 8 * 32
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert not serialised([*loop, wait, wait])
    assert serialised([*loop, wait, wait, wait])

    def faults(case: Case, waits: int, exponential: int) -> list[str]:
        loops = (("HGMMA.64x64x16", *[wait] * waits, *["MUFU.EX2 R7, R6"] * exponential),)
        return case.faults("sm_90", case.launch("sm_90"), Binary(200, 0, 1000, "HGMMA UTMALDG", loops))

    case = Case(128, text=512, path="descriptor")  # 128 x 128 scores on eight warps: 64 exponentials a thread, and two of a row's maxima
    assert faults(case, 2, 66) == []
    assert faults(case, 3, 66) == ["products that wait for each other"]
    assert faults(case, 1, 132) == ["2.06 exponentials a score"]
    assert faults(Case(160, text=512, path="descriptor"), 34, 72) == [], "known: docs/evidence/compiled.md"
    assert faults(Case(160, path="descriptor"), 34, 20) == ["products that wait for each other"]
    assert "head dims above 128" in DOC.read_text()


def pipeline(products: int = 16, exponentials: int = 66, order: str = "PweW") -> tuple[str, ...]:
    """A main loop of a consumer: products, the wait for scores, exponentials, the wait for all, or in another order."""
    kinds = {
        "P": ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]"] * products,
        "w": ["WARPGROUP.DEPBAR.LE gsb0, 0x1"],
        "e": ["MUFU.EX2 R7, R6"] * exponentials,
        "W": ["WARPGROUP.DEPBAR.LE gsb0, 0x0"],
    }
    return tuple(instruction for kind in order for instruction in kinds[kind])


@pytest.mark.parametrize(
    ("loops", "fault"),
    [
        ([pipeline()] * 2, ""),
        ([pipeline(order="eWPw"), pipeline()], ""),  # the same loop, turned
        ([pipeline()], "1 main loops for 2 consumers"),
        ([pipeline(), pipeline(products=15)], "not 16 products in every main loop"),
        ([pipeline(), pipeline(order="PwWe")], "a main loop in the order products, wait 1, wait 0, exponentials"),
        ([pipeline(), pipeline(order="PwPweW")], "not 16 products in every main loop"),
        ([pipeline(), pipeline(exponentials=132)], "2.06 exponentials a score"),
        ([pipeline(), (*pipeline(), "STL [R1], R2")], "1 spills in the main loops"),
        ([pipeline(), (*pipeline(), "LDSM.16.M88.4 R4, [R2]")], "keys or values go through registers in the main loop"),
    ],
)
def test_faults_of_a_pipeline_are_named(loops: list[tuple[str, ...]], fault: str) -> None:
    case = Case(128, text=512)
    code = "UTMALDG.5D " * 8 + "USETMAXREG"
    found = case.faults("sm_90", case.launch("sm_90"), Binary(168, 0, 200_000, code, tuple(loops)))
    assert fault in found if fault else found == []
    assert "8 loads by TMA" not in found
    assert "7 loads by TMA" in case.faults("sm_90", case.launch("sm_90"), Binary(168, 0, 200_000, "UTMALDG.5D " * 7, tuple(loops)))


def test_the_roofline_counts_what_is_repeated_and_ranks_what_is_serialised_last() -> None:
    with (ROOT / "bench" / "results" / "static-roofline-sm_90.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["note"] and row["bound"]]
    for row in (row for row in rows if row["bound"]):
        width = 128 if row["shape"].startswith("FLUX") else 64
        useful = 4 * int(row["queries"]) * int(row["keys"]) * width / 4096
        assert float(row["bound"]) == pytest.approx(989.5 * useful / float(row["total"]), rel=2e-3)
        assert float(row["matrix"]) >= useful
    for name in dict.fromkeys(row["shape"] for row in rows):
        bounds = [bool(row["bound"]) for row in rows if row["shape"] == name]
        assert bounds == sorted(bounds, reverse=True)


def test_predictions_shown_are_the_committed_ones() -> None:
    assert predictions.page() == predictions.PAGE.read_text()


def test_faults_are_named() -> None:
    case = Case(128, path="descriptor")
    launch = case.launch("sm_90")
    broken = Binary(registers=255, spills=3, shared=300_000, code="HMMA", loops=(("LDSM R1 ;",),))
    assert case.faults("sm_90", launch, broken) == [
        "300000 bytes of shared memory, 232448 there",
        "3 spills",
        "no TMA",
        r"no \bHGMMA",
        "keys or values go through registers in the main loop",
    ]
    assert Case(128).faults("sm_80", Case(128).launch("sm_80"), Binary(200, 0, 1000, "HMMA", ())) == ["no main loop found", "no cp.async"]


def test_the_page_is_that_of_the_committed_rows() -> None:
    assert page(DOC.read_text()) == DOC.read_text()
    assert [(kernels, version) for kernels in KERNELS for version in committed(kernels)] == [
        ("attention", "3.6"), ("attention", "3.9"), ("lowpass", "3.6"), ("lowpass", "3.9"),
    ]  # fmt: skip
    assert all((rows["faults"] == "").all() for kernels in KERNELS for rows in committed(kernels).values())


def test_the_roofline_shown_is_that_of_the_committed_rows() -> None:
    """Every line of the table in docs/internals/kernels.md is a line of the CSV: blocks, programs, cycles, bound."""
    with (ROOT / "bench" / "results" / "static-roofline-sm_90.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("programs", "matrix", "exponentials", "issue", "l2", "total", "bound")
    measured = {
        (r["shape"][:4], f"{r['queries']} x {r['keys']}, {r['num_warps']}, {r['num_stages']}", *(r[c] for c in columns)) for r in rows
    }
    shown, shape = set(), ""
    for line in (ROOT / "docs" / "internals" / "kernels.md").read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        if len(cells) == 2 + len(columns) and cells[1][:1].isdigit():
            shape = cells[0][:4] or shape
            shown.add((shape, *cells[1:]))
    assert len(shown) == 8
    assert shown <= measured


COMPILED = """
from bench.compile import attention as compile_attention
from bench.compile import lowpass as compile_lowpass
from bench.compile.binary import compile_launch
cases = [compile_attention.Case(128, text=512), compile_lowpass.Case("down", "latent", pictures=3)]
launches = [case.launch("sm_90") for case in cases]
binaries = [compile_launch(launch, "sm_90") for launch in launches]
print([case.faults("sm_90", launch, binary) for case, launch, binary in zip(cases, launches, binaries)], len(binaries[0].loops[0]) > 50)
"""


def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """In a process of its own, out of the interpreter: the FLUX shape, and the coarse grid of a guided step, for sm_90, gated."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-c", COMPILED]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
    assert out.strip() == "[[], []] True"


def test_faults_of_the_filters_are_named() -> None:
    case = compile_lowpass.Case("up", "latent", pictures=1)
    launch = case.launch("sm_90")
    assert case.faults("sm_90", launch, Binary(255, 3, 300_000, "FFMA", ())) == [
        "300000 bytes of shared memory, 232448 there",
        "3 spills in the main loops",
        r"no \b(?:HMMA|HGMMA|UTC\w*MMA)\S*TF32",
        "pictures without wide loads",
        "no wide stores",
    ]
