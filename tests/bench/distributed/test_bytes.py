"""The bytes and the predicted times of docs/guide/several-gpus.md."""

from __future__ import annotations

import pytest

from bench.distributed.__main__ import LAYERS, LINKS, PAGE, RANKS, SIZES, attention_work, efficiency, exchanged, linear_work, main, seconds
from bench.harness.rows import RESULTS, read_records


def test_the_page_is_up_to_date() -> None:
    pytest.importorskip("pandas")
    with pytest.raises(SystemExit) as ended:
        main(["--check"])
    assert ended.value.code == 0
    assert "begin bytes" in PAGE.read_text()


def test_the_work_is_what_bench_flops_counts() -> None:
    for row in [row for row in read_records(RESULTS / "flops.csv") if (row["model"], row["method"]) == ("flux", "npa")]:
        size = int(row["size"])
        assert attention_work(size) * LAYERS / 1e12 == pytest.approx(float(row["forward_attention"]), rel=1e-6)
        assert linear_work(size) * LAYERS / 1e12 == pytest.approx(float(row["forward_linear"]), rel=1e-3)


def test_a_halo_is_less_than_all_keys_and_grows_no_faster_than_a_side() -> None:
    for ranks in RANKS:
        small, large = exchanged(4096, ranks), exchanged(8192, ranks)
        assert small.halo < small.gathered / 4
        assert large.halo <= 2 * small.halo
        assert large.gathered == 4 * small.gathered


def test_an_infinite_bandwidth_leaves_the_latency() -> None:
    """Nothing else is lost: the work of the ranks is that of one."""
    alone = seconds(4096, 1, 1.0)
    assert seconds(4096, 8, float("inf")) - alone / 8 == pytest.approx(6 * 30e-6)
    assert all(efficiency(size, ranks, bandwidth) <= 1 for size in SIZES for ranks in RANKS for bandwidth in LINKS.values())
