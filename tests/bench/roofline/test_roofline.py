"""The model of a multiprocessor: steady states that follow by hand, and the committed rows."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.harness.facts import ROOT
from bench.roofline import __main__ as roofline
from bench.roofline.call import PEAK_TFLOPS, costs, efficiency
from bench.roofline.loops import Step, cycles, from_text, steps, to_text
from bench.roofline.pipeline import Schedule, fair_rates

DOC = ROOT / "docs" / "evidence" / "tuning.md"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, "
HGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"


def consumers(count: int = 2, *, issue: float = 0, exp: float = 0, turns: bool = False, **changes: Any) -> Schedule:
    """Both products need 100 cycles, the softmax between them `issue` and `exp`."""
    loop = from_text(
        "acquire v; acquire turn; product 100; product 100; release turn; wait 1; release k; "
        f"run {issue} 0 {exp} 0; acquire k; wait 0; release v"
    )
    loop = tuple(step for step in loop if turns or step.name != "turn")
    return replace(Schedule(loop, count, stages=4, block_bytes=0), **changes)


def rows() -> list[dict[str, str]]:
    with roofline.RESULT.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_consumer_computes_its_softmax_beside_its_second_product() -> None:
    assert consumers(1, exp=60).block() == pytest.approx(200)  # hidden
    assert consumers(1, exp=160).block() == pytest.approx(100 + 160)  # the scores, then the softmax, which is longer than P V
    assert consumers(1, exp=160, issue=200).block() == pytest.approx(100 + 200)


@pytest.mark.parametrize("turns", [False, True])
def test_consumers_are_bound_by_what_they_need_most_of(turns: bool) -> None:
    assert consumers(2, exp=150, turns=turns).block() == pytest.approx(2 * 200)
    assert consumers(3, exp=150, turns=turns).block() == pytest.approx(3 * 200)
    assert consumers(4, exp=500, turns=turns).block() == pytest.approx(4 * 500, rel=0.01)
    assert consumers(4, issue=500, turns=turns).block() == pytest.approx(4 * 500, rel=0.01)


def test_loads_bound_by_bytes_or_by_stages() -> None:
    assert consumers(2, block_bytes=24_000).block() == pytest.approx(1000)
    few, more = (consumers(2, exp=150, stages=stages, block_bytes=8000).block() for stages in (2, 4))
    assert few > more == pytest.approx(2 * 200)


def test_one_stage_is_not_enough() -> None:
    """A consumer waits for the next keys before it releases values, and for its queries, which come after the second block of keys."""
    with pytest.raises(RuntimeError, match="every actor waits for another"):
        consumers(1, stages=1).cycles(4, 1)


def test_more_bytes_a_clock_are_never_slower() -> None:
    for s in (consumers(2, exp=150, block_bytes=5000), consumers(3, exp=250, turns=True, block_bytes=5000)):
        times = [replace(s, l2=l2).call(8, 6) for l2 in (2, 4, 8, 16, 32, 64)]
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(times)), times


def test_who_waits_for_a_turn_that_nobody_gives_is_found() -> None:
    never = consumers(2, turns=True)
    never = replace(never, loop=tuple(step for step in never.loop if step != Step("release", name="turn")))
    with pytest.raises(RuntimeError, match="every actor waits for another"):
        never.cycles(4, 1)


def test_turns_alternate() -> None:
    """With instructions before its products, a consumer whose turn it is delays the other; without turns nobody waits."""
    loop = from_text(
        "acquire v; acquire turn; run 300 0 0 0; product 10; product 10; release turn; wait 1; release k; acquire k; wait 0; release v"
    )
    taken = Schedule(loop, 2, stages=4, block_bytes=0)
    free = replace(taken, loop=tuple(step for step in loop if step.name != "turn"))
    assert taken.block() == pytest.approx(2 * 300, rel=0.02)  # one after the other
    assert free.block() == pytest.approx(2 * 300, rel=0.06)  # issue slots are shared


def test_a_tile_has_a_beginning_and_an_end() -> None:
    s = consumers(1, exp=60, query_bytes=24, finish=80)
    assert s.cycles(20, 1) - s.cycles(10, 1) == pytest.approx(10 * 200)
    assert s.call(10, 40) == pytest.approx(s.cycles(10, 40), rel=0.01)
    assert s.call(10, 1) > 10 * 200 + 80


def test_units_are_shared_fairly() -> None:
    first, second, third = (iter(()) for _ in range(3))
    rates = fair_rates({first: (10, 0, 100), second: (50, 0, 100), third: (100, 0, 0)})
    assert rates[first] == rates[second] == pytest.approx(0.5)  # half of the exponential unit each
    assert rates[third] == pytest.approx(1 - 0.05 - 0.25)  # what is left of the issue slots


def test_steps_are_those_of_the_code() -> None:
    listing = [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", HGMMA, "UMOV UR4, UR5", f"{HGMMA}, gsb0", HGMMA, f"{HGMMA}, gsb0",
        WAIT + "0x1", "FMNMX R1, R2, R3, !PT", "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8], RZ", "MUFU.EX2 R1, R1", "FADD R1, R1, R2",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R2", WAIT + "0x0", "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9], RZ", "FMUL R24, R24, R1",
    ]  # fmt: skip
    loop = steps(listing)
    assert [step.name or step.action for step in loop if step.action != "run"] == [
        "v", "product", "product", "wait", "k", "k", "wait", "v",
    ]  # fmt: skip
    assert [step.amounts[0] for step in loop if step.action == "wait"] == [1, 0]
    assert cycles(loop, "product") == 2 * 2 * 64  # 2 x 64 x 128 x 16 FLOPs at 4096 a clock, each
    assert cycles(loop, "run", 2) == 8  # 32 threads at four a clock and scheduler
    assert cycles(loop, "run") == len(listing)
    assert cycles(loop, "run", 1) == 2, "the maximum goes through a pipe of half rate"
    assert from_text(to_text(loop)) == loop


def test_the_committed_rows_are_those_of_the_model() -> None:
    """Cycles follow from the recorded loops, for the shipped candidates."""
    shipped = [row for row in rows() if row["note"] == "shipped"]
    assert [row["shape"] for row in shipped] == list(roofline.SHAPES)
    for row in shipped[::2]:
        s = roofline.schedule_of(row)
        found = costs(s, efficiency(64 if row["shape"].startswith("SDXL") else 128))
        for column in ("matrix", "exponentials", "issue", "block"):
            assert float(row[column]) == pytest.approx(found[column], abs=1.5)


def test_the_best_come_first_and_those_with_faults_last() -> None:
    for name in roofline.SHAPES:
        found = [row for row in rows() if row["shape"] == name and row["path"] != "published"]
        ranks = [(row["note"] not in ("", "shipped"), -float(row["tflops"] or 0)) for row in found]
        assert ranks == sorted(ranks)
        assert all(row["note"] in ("", "shipped", "spills in the loop") or not row["tflops"] for row in found)
        assert all(("spills in the loop" in row["note"]) == (row["loop_spills"] > "0") for row in found if row["tflops"])
        assert -PEAK_TFLOPS < ranks[0][1] < 0


def test_products_are_counted_as_they_are_executed() -> None:
    for row in rows():
        if row["tflops"] and row["path"] != "published":
            width = 64 if row["shape"].startswith("SDXL") else 128
            assert float(row["matrix"]) == 4 * int(row["queries"]) * int(row["keys"]) * width / 4096
            assert float(row["exponentials"]) >= int(row["queries"]) * int(row["keys"]) / 16


def test_the_factors_are_those_of_published_kernels() -> None:
    for row, one in zip([row for row in rows() if row["path"] == "published"], roofline.PUBLISHED, strict=True):
        assert float(row["tflops"]) * efficiency(one.head_dim) == pytest.approx(one.tflops, rel=0.01)


def test_the_page_is_that_of_the_committed_rows() -> None:
    assert roofline.page(DOC.read_text()) == DOC.read_text()
