"""The compilation gates: one kernel by default, every kernel among the slow gates (`.ci/run`)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.compile import lowpass as compile_lowpass
from bench.compile.__main__ import KERNELS, committed, main, page
from bench.compile.attention import Case
from bench.compile.binary import Binary, exponentials, main_loops, serialised
from bench.harness.facts import ROOT
from bench.predictions import __main__ as predictions

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


def test_rows_of_some_targets_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--write", "--targets", "sm_90", "gfx942"])
    assert "--write needs all targets, for a file has the rows of all, got --targets sm_90 gfx942" in capsys.readouterr().err


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
