"""What the controls say, as a job; and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from scalediff.cascade.pipeline import named_preset
from scalediff.settings import Settings
from scalediff.web.jobs import (
    FIELDS,
    SETTINGS,
    default_values,
    format_numbers,
    job_of,
    parse_numbers,
    parse_sizes,
    values_of_metadata,
)
from tests.scalediff.web.conftest import values

Image = pytest.importorskip("PIL.Image")
SQUARE = Image.new("RGB", (64, 64))


def test_the_controls_have_every_setting_and_start_with_the_preset(demo: Any) -> None:
    assert set(SETTINGS) == set(asdict(Settings()))
    assert set(default_values(demo)) == set(FIELDS)
    job = job_of(demo, {**default_values(demo), "prompt": " a moon "})
    assert (job.prompt, job.size, job.seed, job.sizes, job.negative_prompt) == ("a moon", (256, 256), 0, None, None)
    assert job.settings == named_preset(demo, "default").settings


def test_every_control_reaches_the_job(demo: Any) -> None:
    changed = {
        "negative_prompt": "the sun", "seed": 2**63 - 1, "height": 128.0, "width": 96, "steps": 7, "guidance_scale": 2,
        "restart": "0.5, 0.4",
        "guidance_until": "0.5", "attention": "full", "lfm": False, "sg": False, "lfm_cutoff": "0.25", "sg_cutoff": "0.5",
        "sg_cutoff_start": "1", "filter": "gaussian", "anchor": "trajectory", "jitter": "random", "size_conditioning": "native",
        "wrap": "xy",
        "sizes": "64x48, 128x96", "vae_tiling": "on", "vae_attention": "npa", "split_guidance": True, "force": True, "preview": True,
    }  # fmt: skip
    job = job_of(demo, values(demo, **changed))
    assert job.size == (128, 96)
    assert job.sizes == [(64, 48), (128, 96)]
    assert (job.negative_prompt, job.seed, job.vae_tiling, job.vae_attention) == ("the sun", 2**63 - 1, True, "npa")
    assert job.split_guidance
    assert job.force
    assert job.preview
    assert asdict(job.settings) == {
        "steps": 7, "restart": (0.5, 0.4), "guidance_scale": 2.0, "attention": "full", "lfm": False, "sg": False, "lfm_cutoff": 0.25,
        "sg_cutoff": 0.5, "sg_cutoff_start": 1.0, "filter": "gaussian", "anchor": "trajectory", "guidance_until": 0.5, "jitter": "random",
        "size_conditioning": "native", "wrap": (True, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "the prompt must say what to draw, got an empty prompt"),
        ({"height": 100}, "height and width must be multiples of 8, got height=100"),
        ({"height": None}, "height must be an integer, got an empty field"),
        ({"height": 64.5}, "height must be an integer, got 64.5"),
        ({"width": 0}, "width must be at least 1, got width=0"),
        ({"seed": -1}, r"seed must be at least 0 and at most \d+, got seed=-1"),
        ({"steps": 0}, "steps must be at least 1, got steps=0"),
        ({"guidance_scale": None}, "guidance_scale must be a number, got an empty field"),
        ({"restart": ""}, "restart must be a number, or one number for each stage, got an empty field"),
        ({"restart": "half"}, "restart must be a number, or one number for each stage separated by commas, got 'half'"),
        ({"restart": "2"}, r"restart must lie in \(0, 1\], got restart=2.0"),
        ({"sizes": "large"}, "sizes must be HxW for every stage, separated by commas, got 'large'"),
        ({"sizes": "64x64"}, "the last stage in sizes must be the target 72 x 72"),
        ({"method": "magic"}, "method must be one of scalediff, direct, .* got 'magic'"),
        ({"vae_tiling": "perhaps"}, "vae_tiling must be one of if needed, on, off, got 'perhaps'"),
        ({"preset": "turbo"}, "preset must be one of"),
        ({"filter": "median"}, "filter must be one of"),
        ({"wrap": "z"}, "wrap must be one of as patched, none, x, y, xy, got 'z'"),
    ],
)
def test_what_a_job_cannot_be(demo: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_of(demo, values(demo, **changes))


def test_only_text_and_scalediff_are_compared(demo: Any) -> None:
    for changes, picture in [({"method": "demofusion"}, None), ({}, Image.new("RGB", (64, 64)))]:
        with pytest.raises(ValueError, match="a comparison needs a picture drawn from text by the method scalediff"):
            job_of(demo, values(demo, **changes), picture=picture, compare=True)


@pytest.mark.parametrize(
    ("changes", "uploads", "message"),
    [
        ({"strength": "2"}, {"picture": SQUARE}, r"strength must lie in \(0, 1\], got strength=2.0"),
        ({"strength": "0.5"}, {}, "a mask and a strength change an uploaded picture, got a strength alone"),
        ({}, {"mask": SQUARE}, "a mask and a strength change an uploaded picture, got a mask alone"),
        ({"method": "demofusion"}, {"picture": SQUARE}, "a picture is enlarged by the method scalediff, got method='demofusion'"),
        ({}, {"picture": SQUARE, "mask": SQUARE}, "the mask must be white where the picture is drawn anew, got a mask without white"),
    ],
)
def test_what_cannot_change_a_picture(demo: Any, changes: dict[str, Any], uploads: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_of(demo, values(demo, **changes), **uploads)


def test_a_strength_is_one_number(demo: Any) -> None:
    with pytest.raises(TypeError, match="strength must be a number"):
        job_of(demo, values(demo, strength="0.5, 0.4"), picture=SQUARE)


def test_numbers_and_sizes_are_read_as_they_are_written() -> None:
    for value in (0.4, (0.4, 0.3), 1 / 3, 1, None):
        assert parse_numbers("restart", format_numbers(value)) == value
    assert parse_sizes(" 64X48,128x96 ") == [(64, 48), (128, 96)]
    assert parse_sizes("") is None


def test_the_metadata_gives_the_values_back(demo: Any) -> None:
    given = values(
        demo, seed=5, sg=False, restart="0.5, 0.25", jitter="as patched", vae_tiling="off", negative_prompt="fog", sizes="64x64, 72x72",
        wrap="x",
    )  # fmt: skip
    settings = asdict(job_of(demo, given).settings) | {"restart": [0.5, 0.25], "wrap": [False, True]}  # JSON has no tuples
    metadata = {
        "prompt": "a full moon", "negative_prompt": "fog", "seed": 5, "height": 72, "width": 72, "method": "scalediff", "preset": "default",
        "settings": settings, "vae": {"tiling": False, "attention": "full"}, "split_guidance": False, "asked_sizes": "64x64, 72x72",
    }  # fmt: skip
    back = values_of_metadata(metadata)
    assert back == {name: given[name] for name in FIELDS if name not in ("force", "preview")}
