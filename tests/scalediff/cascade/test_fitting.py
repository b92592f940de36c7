"""Sizes that cannot be: too large for the device, or too narrow for the filter."""

from __future__ import annotations

import re
from typing import Any

import pytest

import scalediff
from scalediff.cascade import fitting
from scalediff.cascade.fitting import describe_fit, fit_of, fitting_size
from scalediff.cascade.memory import MARGIN, estimate
from tests.conftest import seeded

ARGUMENTS = {"prompt": "a moon", "guidance_scale": 1.5}
MIB = 2**20


def plain(size: tuple[int, int]) -> dict[str, bool]:
    return {}


@pytest.mark.parametrize("size", [(4096, 4096), (512, 2048), (30000, 30000)])
def test_the_size_that_fits_does_and_is_not_small(demo: Any, size: tuple[int, int]) -> None:
    room = MARGIN + 200 * MIB
    fits = fitting_size(demo, ARGUMENTS, size, room, plain)
    assert fits is not None
    height, width = fits
    assert height % 8 == width % 8 == 0
    assert abs(height * size[1] / (width * size[0]) - 1) < 0.15
    assert 0.7 * room < estimate(demo, ARGUMENTS, fits).peak() <= room


def test_nothing_fits_where_the_weights_do_not(demo: Any) -> None:
    assert fitting_size(demo, ARGUMENTS, (4096, 4096), MIB, plain) is None
    assert fitting_size(demo, ARGUMENTS, (4096, 4096), MARGIN // 2, plain) is None
    assert describe_fit(None) == "no size is known to fit"


def test_tiling_is_decided_for_every_size(demo: Any) -> None:
    asked: list[tuple[int, int]] = []

    def options(size: tuple[int, int]) -> dict[str, bool]:
        asked.append(size)
        return {"tiled": size[0] > 256}

    fits = fitting_size(demo, ARGUMENTS, (4096, 4096), MARGIN + 100 * MIB, options)
    assert fits == asked[-1]


@pytest.mark.parametrize("method", ["scalediff", "multidiffusion"])
def test_a_picture_beyond_all_memory_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(fitting, "total_bytes", lambda device: MARGIN + 300 * MIB)
    message = r"must fit into the memory of cpu, 1.3 GiB, got 12800 x 12800, which takes 1.8 GiB for its pixels alone; \d+ x \d+ would fit"
    with pytest.raises(ValueError, match=message):
        scalediff.generate(demo, "a moon", height=12800, width=12800, generator=seeded(), method=method)


def test_a_batch_is_counted(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "total_bytes", lambda device: 12 * 128**2 * 2 - 1)
    run: dict[str, Any] = {"height": 128, "width": 128, "steps": 1, "generator": seeded()}
    with pytest.raises(ValueError, match="for its pixels alone; no size is known to fit"):
        scalediff.generate(demo, ["a moon"] * 2, **run)
    scalediff.generate(demo, "a moon", **run)


def test_too_narrow_for_the_filter(demo: Any) -> None:
    """The size is named, and the least that it names is right; a cutoff that is too low at any size is named itself."""
    message = r"a stage of 16 x \d+ is too narrow: the coarse grid of its low-pass filter has no pixel along the shorter side, .* got 16"
    with pytest.raises(ValueError, match=message) as raised:
        scalediff.generate(demo, "a moon", height=16, width=2048, generator=seeded())
    assert "cutoff" not in str(raised.value)
    least = int(re.findall(r"must be at least (\d+) pixels", str(raised.value))[0])
    run: dict[str, Any] = {"generator": seeded(), "steps": 1, "restart": 1.0}
    with pytest.raises(ValueError, match="too narrow"):
        scalediff.generate(demo, "a moon", height=least - 8, width=512, **run)
    assert scalediff.generate(demo, "a moon", height=least, width=256, **run).images[0].size == (256, least)
    with pytest.raises(ValueError, match=r"cutoff must leave at least one coarse pixel, got cutoff=0.01"):
        scalediff.generate(demo, "a moon", height=128, width=128, lfm_cutoff=0.01)


def test_a_run_is_compared_with_the_memory_that_is_available(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and split guidance count as they are used; a run that fits has no advice."""
    monkeypatch.setattr(fitting, "available_bytes", lambda device: MARGIN + 60 * MIB)
    small, large = fit_of(demo, ARGUMENTS, (64, 64)), fit_of(demo, ARGUMENTS, (1024, 512))
    assert (small.advice, small.size) == ("", None)
    assert re.fullmatch(r"this run needs about 1\.\d GiB; 1\.1 GiB are available", small.describe())
    assert large.advice
    assert large.size is not None
    assert fit_of(demo, ARGUMENTS, large.size).advice == ""
    needs = estimate(demo, ARGUMENTS, (1024, 512))
    assert large.peak == needs.peak()
    assert fit_of(demo, ARGUMENTS, (1024, 512), vae_tiling=True, split_guidance=True).peak == needs.peak(tiled=True, split=True)
    monkeypatch.setattr(fitting, "available_bytes", lambda device: None)
    assert re.fullmatch(r"this run needs about \d\.\d GiB", fit_of(demo, ARGUMENTS, (1024, 512)).describe())
