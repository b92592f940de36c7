"""Sizes that cannot be: too large for the device, or too narrow for the filter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

import scalediff
from scalediff import draw
from scalediff.cascade import autoencoder_memory, fitting
from scalediff.cascade.fitting import Switches, check_fit, describe_fit, fit_of, fitting_size
from scalediff.cascade.memory import MARGIN, Estimate, estimate
from scalediff.patching.circular import wraps_rows
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built

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
    assert fit_of(demo, ARGUMENTS, (1024, 512), Switches(vae_tiling=True, split_guidance=True)).peak == needs.peak(tiled=True, split=True)
    monkeypatch.setattr(fitting, "available_bytes", lambda device: None)
    assert re.fullmatch(r"this run needs about \d\.\d GiB", fit_of(demo, ARGUMENTS, (1024, 512)).describe())


def test_an_autoencoder_whose_rows_wrap_is_not_estimated_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the run or the patch says so; columns may wrap in bands."""
    pipe, embeddings = built("SDXL")
    told = list[Estimate]()
    monkeypatch.setattr(fitting, "available_bytes", lambda device: None)
    monkeypatch.setattr(fitting, "estimate", lambda *given: told.append(estimate(*given)) or told[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(autoencoder_memory.streaming, "ELEMENTS", 2**12)

    def in_parts(wrap: tuple[bool, bool]) -> int:
        fit_of(pipe, embeddings, (64, 64), Switches(vae_tiling=True, wrap=wrap))
        return told[-1].vae_tiled

    in_bands, in_tiles = in_parts((False, False)), in_parts((True, False))
    assert in_tiles != in_bands == in_parts((False, True))
    with scalediff.patch_model(pipe, wrap=(True, False)):
        assert (in_parts((True, False)), in_parts((False, False))) == (in_tiles, in_bands)
    assert not wraps_rows(pipe.vae)


RUN: dict[str, Any] = {"height": 1024, "width": 512, "steps": 1, "restart": 1.0}


def test_a_run_that_does_not_fit_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers and what to change; what is named as fitting does."""
    monkeypatch.setattr(fitting, "available_bytes", lambda device: MARGIN + 60 * MIB)
    message = (
        r"the run must fit into the memory of cpu, got 1024 x 512: this run needs about 1\.\d GiB; 1\.1 GiB are available; it needs about "
        r"1\.\d GiB as configured.*; otherwise use a smaller size.*; (\d+) x (\d+) would fit; force=True runs it all the same"
    )
    with pytest.raises(ValueError, match=message) as raised:
        check_fit(demo, ARGUMENTS, (1024, 512))
    height, width = map(int, re.findall(r"(\d+) x (\d+) would fit", str(raised.value))[0])
    check_fit(demo, ARGUMENTS, (height, width))


DEFAULTS = (None, "npa", "full")


def test_every_run_is_checked_before_it_starts(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its last size, with its switches, by every method that sees the picture as a whole; `force` turns the check off."""

    def refuse(pipe: Any, arguments: Any, size: tuple[int, int], switches: Any = None, *, force: bool = False, **ranks: Any) -> None:
        assert arguments["prompt"] == "a moon"
        if not force:
            raise ValueError(f"too large: {size}, {switches}")

    monkeypatch.setattr(draw, "check_fit", refuse)
    monkeypatch.setattr(draw, "run", lambda *args, **kwargs: pytest.fail("drawn"))
    picture = Image.new("RGB", (64, 128), (20, 30, 60))
    switches: dict[str, Any] = {"vae_tiling": True, "split_guidance": True, "wrap": (False, True)}
    told = re.escape(f"too large: (256, 128), {Switches(**switches)}")
    run: dict[str, Any] = {"height": 256, "width": 128, "steps": 1, "restart": 1.0}
    with pytest.raises(ValueError, match=told):
        scalediff.generate(demo, "a moon", **run, **switches)
    with pytest.raises(ValueError, match=told):
        scalediff.upscale(demo, picture, "a moon", **run, **switches)
    with pytest.raises(pytest.fail.Exception, match="drawn"):
        scalediff.generate(demo, "a moon", force=True, **run)
    with pytest.raises(pytest.fail.Exception, match="drawn"):
        scalediff.upscale(demo, picture, "a moon", force=True, **run)
    small: dict[str, Any] = {"height": 64, "width": 128, "steps": 1}
    with pytest.raises(ValueError, match=r"too large: \(64, 128\), None"):
        scalediff.generate(demo, "a moon", method="direct", **small)
    assert scalediff.generate(demo, "a moon", method="multidiffusion", **small).images


def test_with_plenty_of_memory_nothing_is_estimated(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken for plenty is more than any estimate."""
    needs = estimate(demo, ARGUMENTS, (64, 64))
    plenty = sum(needs.weights.values()) + MARGIN + fitting._PLENTY * 64 * 64
    assert plenty - MARGIN > 2 * (needs.peak() - MARGIN)
    monkeypatch.setattr(fitting, "fit_of", lambda *args, **kwargs: pytest.fail("estimated"))
    for available in (plenty, None):
        monkeypatch.setattr(fitting, "available_bytes", lambda device, available=available: available)
        check_fit(demo, ARGUMENTS, (64, 64))
    monkeypatch.setattr(fitting, "available_bytes", lambda device: plenty - 1)
    with pytest.raises(pytest.fail.Exception, match="estimated"):
        check_fit(demo, ARGUMENTS, (64, 64))


def by_layers(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def by_groups(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def over_devices(pipe: Any) -> None:
    pipe.hf_device_map = {"transformer": 0, "vae": 1}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (by_layers, "a pipeline whose weights are offloaded by layers or groups cannot be estimated"),
        (by_groups, "a pipeline whose weights are offloaded by layers or groups cannot be estimated"),
        (over_devices, "the memory of a pipeline on several devices cannot be estimated"),
    ],
)
def test_what_cannot_be_estimated_is_not_refused(monkeypatch: pytest.MonkeyPatch, place: Callable[[Any], None], message: str) -> None:
    """Weights that are not all on the device at once: the estimate would count them all."""
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 1)
    pipe, arguments = built("SD3")
    with pytest.raises(ValueError, match="the run must fit into the memory of cpu"):
        check_fit(pipe, arguments, (32, 32))
    place(pipe)
    with pytest.raises(NotImplementedError, match=message):
        fit_of(pipe, arguments, (32, 32))
    check_fit(pipe, arguments, (32, 32))
