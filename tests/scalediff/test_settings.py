"""Settings refuse what they cannot mean; the plan of stages reaches any target by factors of at most two."""

from __future__ import annotations

import itertools
import math

import pytest

from scalediff.settings import Settings, plan_sizes


@pytest.mark.parametrize(
    ("native", "target", "sizes"),
    [
        ((1024, 1024), (4096, 4096), [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((1024, 1024), (3072, 3072), [(1024, 1024), (2048, 2048), (3072, 3072)]),
        ((1024, 1024), (1024, 1024), [(1024, 1024)]),
        ((64, 64), (256, 256), [(64, 64), (128, 128), (256, 256)]),
        ((64, 64), (64, 256), [(32, 128), (64, 256)]),
        ((64, 64), (72, 64), [(64, 64), (72, 64)]),
        ((64, 64), (56, 80), [(56, 80)]),
        ((64, 64), (136, 432), [(40, 112), (80, 224), (136, 432)]),
        ((64, 64), (136, 480), [(40, 120), (80, 240), (136, 480)]),
    ],
)
def test_known_plans(native: tuple[int, int], target: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    assert plan_sizes(target, native=native, multiple=8) == sizes


@pytest.mark.parametrize("native", [64, 512, 1024])
def test_every_plan_keeps_its_promises(native: int) -> None:
    sides = [
        native // 2,
        native,
        native + 8,
        3 * native // 2 // 8 * 8,
        2 * native,
        17 * native // 8 // 8 * 8,
        27 * native // 4 // 8 * 8,
        8 * native,
    ]
    for height, width in itertools.product(sides, sides):
        factor = math.sqrt(height * width) / native
        if factor < 1:
            continue
        sizes = plan_sizes((height, width), native=(native, native), multiple=8)
        assert sizes[-1] == (height, width)
        assert len(sizes) <= 1 + math.ceil(math.log2(factor))
        for side, wanted in zip(sizes[0], (height, width), strict=True):
            assert abs(side - wanted / factor) <= 8, "the base has native area and the target's shape, to the multiple"
        for (h0, w0), (h1, w1) in itertools.pairwise(sizes):
            assert h1 % 8 == w1 % 8 == 0
            assert 1 <= h1 / h0 <= 2
            assert 1 <= w1 / w0 <= 2
            assert h1 * w1 > h0 * w0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((100, 128), r"multiples of 8, got height=100, width=128"),
        ((32, 32), r"at least the model's native 64 x 64, got height=32, width=32"),
        ((0, 128), r"at least the model's native"),
        ((-64, -64), r"at least the model's native"),
    ],
)
def test_impossible_targets(target: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sizes(target, native=(64, 64), multiple=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"steps must be at least 1, got steps=0"),
        ({"restart": 0.0}, r"restart must lie in \(0, 1\], got restart=0.0"),
        ({"restart": float("nan")}, r"restart must lie in"),
        ({"guidance_scale": float("nan")}, r"guidance_scale must be finite"),
        ({"attention": "half"}, r"attention must be one of npa, full, got attention='half'"),
        ({"lfm_cutoff": 1.5}, r"lfm_cutoff must lie in \(0, 1\], got lfm_cutoff=1.5"),
        ({"sg_cutoff": float("nan")}, r"sg_cutoff must lie in"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_stage_steps_follow_the_paper() -> None:
    assert Settings(steps=50, restart=0.4).stage_steps == 20
    assert Settings(steps=30, restart=0.6).stage_steps == 18
    assert Settings(steps=1, restart=0.1).stage_steps == 1
