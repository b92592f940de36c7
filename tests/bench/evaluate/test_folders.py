"""Folders: what `generate` left and what others did, and a sentence for what cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.evaluate.folders import check_comparable, open_folder, read_picture, size_of
from tests.bench.evaluate.pictures import generated_folder, picture, plain_folder

PROMPTS = ["a fox", "an owl"]


def test_a_generated_folder_has_prompts_seeds_and_seconds(tmp_path: Path) -> None:
    folder = open_folder(generated_folder(tmp_path / "a", PROMPTS, seed=5))
    assert (folder.name, folder.prompts, folder.seeds, folder.seconds) == ("a", PROMPTS, [5, 6], [1.0, 2.0])
    assert [file.name for file in folder.files] == ["0.png", "1.png"]


def test_a_plain_folder_has_its_pictures_in_order(tmp_path: Path) -> None:
    plain_folder(tmp_path / "a", [3, 1])
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / ".002.png.7.part").touch()
    folder = open_folder(tmp_path / "a")
    assert [file.name for file in folder.files] == ["001.png", "003.png"]
    assert folder.prompts == []


def test_a_picture_is_upright_and_in_colour(tmp_path: Path) -> None:
    turned = picture(0, (20, 30)).getexif()
    turned[0x0112] = 6  # a quarter turn
    picture(0, (20, 30)).save(tmp_path / "a.jpg", exif=turned)
    picture(0, (20, 30)).convert("L").save(tmp_path / "b.png")
    assert size_of(tmp_path / "a.jpg") == (30, 20)
    assert read_picture(tmp_path / "a.jpg").shape == (3, 30, 20)
    grey = read_picture(tmp_path / "b.png")
    assert torch.equal(grey[0], grey[2])


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an existing folder, got .*none"):
        open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"must hold pictures \(.png, .*with none"):
        open_folder(tmp_path)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    path = generated_folder(tmp_path / "a", PROMPTS)
    lines = (path / "manifest.jsonl").read_text().splitlines()
    (path / "manifest.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="must hold all 2 pictures of its run, got 1: repeat the same generate command"):
        open_folder(path)
    (path / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match="must hold all 2 pictures of its run, got 0"):
        open_folder(path)


def test_a_manifest_without_its_pictures_or_that_is_none(tmp_path: Path) -> None:
    path = generated_folder(tmp_path / "a", PROMPTS)
    (path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"every picture of its manifest, got no 1.png \(1 missing\)"):
        open_folder(path)
    (path / "manifest.jsonl").write_text(json.dumps({"file": "0.png"}) + "\n")
    with pytest.raises(ValueError, match=r"must be those that `generate` wrote, got .*KeyError"):
        open_folder(path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_corrupted_picture_is_named(tmp_path: Path, damage: str) -> None:
    file = plain_folder(tmp_path / "a", [0]) / "000.png"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    file.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "text": b"not a picture"}[damage])
    with pytest.raises(ValueError, match=r"a complete picture that Pillow reads, got .*000.png"):
        read_picture(file)
    if damage == "text":
        with pytest.raises(ValueError, match=r"a complete picture that Pillow reads, got .*000.png"):
            size_of(file)


def test_a_picture_of_another_size_in_a_folder(tmp_path: Path) -> None:
    file = plain_folder(tmp_path / "a", [0]) / "000.png"
    with pytest.raises(ValueError, match=r"must be 64 x 64, got 48 x 48 in .*000.png"):
        read_picture(file, size=(64, 64))


def test_folders_that_do_not_match(tmp_path: Path) -> None:
    first = generated_folder(tmp_path / "first", PROMPTS)
    others = {
        "as many pictures, got 2 in .*first and 3 in .*more": generated_folder(tmp_path / "more", [*PROMPTS, "a cat"]),
        "the same prompts and seeds, got 1 different in": generated_folder(tmp_path / "prompts", ["a fox", "a cat"]),
        "the same prompts and seeds, got 2 different in": generated_folder(tmp_path / "seeds", PROMPTS, seed=9),
        "pictures of one size, got 48 x 48 in first, 64 x 48 in size": generated_folder(tmp_path / "size", PROMPTS, (64, 48)),
        "must all have a manifest or none": plain_folder(tmp_path / "plain", [0, 1]),
        "different names, which are their rows, got 'first' twice": generated_folder(tmp_path / "other" / "first", PROMPTS),
    }
    check_comparable([open_folder(first), open_folder(generated_folder(tmp_path / "same", PROMPTS))])
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            check_comparable([open_folder(first), open_folder(other)])


def test_plain_folders_match_by_file_name(tmp_path: Path) -> None:
    first, second = plain_folder(tmp_path / "a", [0, 1]), plain_folder(tmp_path / "b", [0, 2])
    with pytest.raises(ValueError, match="without a manifest must have the same file names"):
        check_comparable([open_folder(first), open_folder(second)])
