"""Settings refuse what they cannot mean; the plan of stages reaches any target by factors of at most two."""

from __future__ import annotations

import itertools
import math

import pytest

from scalediff.settings import Settings, check_sizes, plan_sizes


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
        ({"restart": (0.5, 1.5)}, r"restart must lie in \(0, 1\], got restart=1.5"),
        ({"lfm_cutoff": [0.25, 0]}, r"lfm_cutoff must lie in \(0, 1\], got lfm_cutoff=0"),
        ({"sg_cutoff_start": 0.0}, r"sg_cutoff_start must lie in \(0, 1\], got sg_cutoff_start=0.0"),
        ({"sg_cutoff_start": (0.5, -0.5)}, r"sg_cutoff_start must lie in \(0, 1\], got sg_cutoff_start=-0.5"),
        ({"guidance_until": -0.1}, r"guidance_until must lie in \[0, 1\], got guidance_until=-0.1"),
        ({"guidance_until": (0.5, 1.1)}, r"guidance_until must lie in \[0, 1\], got guidance_until=1.1"),
        ({"guidance_until": float("nan")}, r"guidance_until must lie in \[0, 1\], got guidance_until=nan"),
        ({"filter": "box"}, r"filter must be one of resize, gaussian, butterworth, got filter='box'"),
        ({"anchor": "noise"}, r"anchor must be one of picture, trajectory, got anchor='noise'"),
        ({"jitter": "wild"}, r"jitter must be one of none, alternate, random, got jitter='wild'"),
        ({"size_conditioning": "large"}, r"size_conditioning must be one of target, native, got size_conditioning='large'"),
        ({"size_conditioning": None}, r"size_conditioning must be one of target, native, got size_conditioning=None"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_stage_steps_follow_the_paper() -> None:
    assert Settings(steps=50, restart=0.4).stage_steps == 20
    assert Settings(steps=30, restart=0.6).stage_steps == 18
    assert Settings(steps=1, restart=0.1).stage_steps == 1


@pytest.mark.parametrize(("steps", "restart", "expected"), [(28, 0.6, 17), (4, 0.6, 3), (50, 0.33, 17), (9, 0.25, 3), (20, 1.0, 20)])
def test_a_part_of_a_step_is_a_whole_one(steps: int, restart: float, expected: int) -> None:
    """The authors keep what is left of the schedule after `int(steps * (1 - restart))` dropped steps."""
    assert Settings(steps=steps, restart=restart).stage_steps == expected


def test_a_restart_near_nothing_is_one_step() -> None:
    assert Settings(steps=10, restart=1e-18).stage_steps == 1


def test_the_ends_of_the_ranges_are_settings() -> None:
    assert Settings(guidance_until=0.0, restart=1.0, sg_cutoff_start=1.0, jitter=None).guidance_until == 0
    assert Settings(guidance_until=(0, 1)).guidance_until == (0, 1)
    assert Settings(sg_cutoff_start=None).sg_cutoff_start is None


def test_every_stage_has_its_own_of_a_tuple() -> None:
    """A list, as JSON has it, is one too; numbers are those of every stage."""
    both = Settings(steps=20, restart=(0.5, 0.25), sg_cutoff=[0.5, 0.125], guidance_until=(1, 0))  # type: ignore[arg-type]
    assert both.sg_cutoff == (0.5, 0.125)
    first, second = both.of_stage(1, 2), both.of_stage(2, 2)
    assert (first.stage_steps, second.stage_steps) == (10, 5)
    assert (first.sg_cutoff, second.sg_cutoff) == (0.5, 0.125)
    assert (first.guidance_until, second.guidance_until) == (1, 0)
    assert first.lfm_cutoff == second.lfm_cutoff == both.lfm_cutoff
    assert Settings().of_stage(3, 3) == Settings()
    assert hash(both) == hash(Settings(steps=20, restart=(0.5, 0.25), sg_cutoff=(0.5, 0.125), guidance_until=(1, 0)))


@pytest.mark.parametrize("name", ["restart", "lfm_cutoff", "sg_cutoff", "sg_cutoff_start", "guidance_until"])
def test_a_tuple_of_another_length_is_refused(name: str) -> None:
    settings = Settings(**{name: (0.5, 0.25)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{name} must have one value for each of the 3 stages .*, got {name}=\(0.5, 0.25\)"):
        settings.of_stage(1, 3)


@pytest.mark.parametrize(
    "sizes", [[(64, 64), (128, 128), (256, 256)], [(64, 64), (96, 96), (192, 192), (256, 256)], [(72, 56), (144, 112), (256, 192)]]
)
def test_sizes_that_a_cascade_can_go_through(sizes: list[tuple[int, int]]) -> None:
    check_sizes(sizes, sizes[-1], native=(64, 64), multiple=8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], r"the last stage in sizes must be the target 256 x 256, got sizes=\[\]"),
        ([(64, 64), (128, 128)], r"the last stage in sizes must be the target 256 x 256, got sizes=\[\(64, 64\), \(128, 128\)\]"),
        ([(128, 128), (256, 256)], r"first stage in sizes must have at most the native area, 64 x 64, got \(128, 128\)"),
        ([(64, 64), (132, 132), (256, 256)], r"sizes must be multiples of 8, got .*\(132, 132\)"),
        ([(64, 64), (256, 256)], r"larger than the one before, by at most 2x along an axis, got \(64, 64\) and \(256, 256\)"),
        ([(64, 64), (128, 128), (128, 128), (256, 256)], r"larger than the one before, .* got \(128, 128\) and \(128, 128\)"),
        ([(64, 64), (56, 56), (112, 112), (224, 224), (256, 256)], r"larger than the one before, .* got \(64, 64\) and \(56, 56\)"),
    ],
)
def test_sizes_that_it_cannot(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(sizes, (256, 256), native=(64, 64), multiple=8)


@pytest.mark.parametrize(
    ("target", "message"),
    [((100, 128), r"height and width must be multiples of 8, got height=100"), ((32, 32), r"at least the model's native 64 x 64")],
)
def test_sizes_to_an_impossible_target(target: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes([target], target, native=(64, 64), multiple=8)


def test_a_stage_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        check_sizes([(64, 64), (64, 128), (128, 256)], (128, 256), native=(64, 64), multiple=8)


@pytest.mark.parametrize("name", ["restart", "guidance_until"])
def test_an_empty_tuple_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        Settings(**{name: ()})  # type: ignore[arg-type]
