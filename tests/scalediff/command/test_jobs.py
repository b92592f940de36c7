"""The names of pictures, by prompt and seed."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from scalediff.command.jobs import plan_jobs


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A moon, over/hills!", "a-moon-over-hills"),
        ("Луна над горами", "луна-над-горами"),
        ("月光下的山", "月光下的山"),
        ("हिन्दी में चाँद", "हिन्दी-में-चाँद"),  # with marks, which are no letters
        ("Cafe\u0301 au lait", "caf\u00e9-au-lait"),  # one name for both ways to write it
        ("../moon\x00\u202e", "moon"),
        ("\U0001f319", "picture"),
        ("", "picture"),
        ("m" * 48, "m" * 48),
        ("-".join(["moon"] * 20), "moon-moon-moon-moon-moon-moon-moon-moon-b7741a80"),  # the ends are those of sha256sum
        ("月" * 100, "月" * 39 + "-a9c49707"),
        ("\U00020000" * 100, "\U00020000" * 33 + "-1162d699"),
    ],
    ids=["Latin", "Cyrillic", "Han", "Devanagari", "composed", "controls", "emoji", "empty", "whole", "long", "long Han", "long rare Han"],
)
def test_a_picture_is_named_by_its_prompt_in_any_script(prompt: str, stem: str, tmp_path: Path) -> None:
    """The folder takes the longest names: `plan_jobs` checks that."""
    (job,) = plan_jobs(Namespace(out=tmp_path, seed=[2**63 - 1]), [prompt])
    assert job.out == tmp_path / f"{stem}-{2**63 - 1}.png"


def test_long_prompts_that_begin_alike_have_different_names(tmp_path: Path) -> None:
    """Drawn one after the other, neither overwrites the other's picture, and `--skip-existing` skips neither for the other."""
    start = "masterpiece, best quality, highly detailed, sharp focus, "
    first, second = (plan_jobs(Namespace(out=tmp_path, seed=[0]), [start + what])[0].out for what in ("a moon", "the sun"))
    (third,) = plan_jobs(Namespace(out=tmp_path, seed=[0]), [start + "a [moon]"])
    assert len({first, second, third.out}) == 3
    assert all(file.name.startswith("masterpiece-best-quality-highly-detaile") for file in (first, second))
