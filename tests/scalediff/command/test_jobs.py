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
        ("-".join(["moon"] * 20), "moon-moon-moon-moon-moon-moon-moon-moon-moon-moo"),
        ("月" * 100, "月" * 48),
        ("\U00020000" * 100, "\U00020000" * 36),
    ],
    ids=["Latin", "Cyrillic", "Han", "Devanagari", "composed", "controls", "emoji", "empty", "long", "long Han", "long rare Han"],
)
def test_a_picture_is_named_by_its_prompt_in_any_script(prompt: str, stem: str, tmp_path: Path) -> None:
    """The folder takes the longest names: `plan_jobs` checks that."""
    (job,) = plan_jobs(Namespace(out=tmp_path, seed=[2**63 - 1]), [prompt])
    assert job.out == tmp_path / f"{stem}-{2**63 - 1}.png"
