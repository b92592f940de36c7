"""The rows of `python -m bench.streaming`."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from bench.streaming.__main__ import main


def test_bands_are_near_one_piece_and_tiles_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--size", "64", "--tile", "32", "--elements", "4096"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [[call, way] for call in ("decode", "encode") for way in ("one piece", "bands", "tiles")]
    largest = {(call, way): float(difference) for call, way, difference, *_ in lines}
    for call in ("decode", "encode"):
        assert largest[call, "one piece"] == 0
        assert 0 < largest[call, "bands"] < 1e-4 < 1e-2 < largest[call, "tiles"]
