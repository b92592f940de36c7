"""Folders: what `generate` left and what others did, and a sentence for what cannot be scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evaluate.folders import common_size, open_folder, open_folders, read_picture, size_of
from tests.bench.evaluate.pictures import generated_folder, picture, plain_folder

PROMPTS = ["a fox", "an owl"]


def test_a_generated_folder_has_its_run(tmp_path: Path) -> None:
    folder = open_folder(generated_folder(tmp_path / "a", PROMPTS, seed=5))
    assert (folder.name, len(folder), folder.run["model"]) == ("a", 2, "demo")
    assert [file.name for file in folder.files] == ["000000-5.png", "000001-6.png"]


def test_a_plain_folder_has_its_pictures_in_order(tmp_path: Path) -> None:
    plain_folder(tmp_path / "a", [3, 1])
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / ".002.png.7.part").touch()
    folder = open_folder(tmp_path / "a")
    assert [file.name for file in folder.files] == ["001.png", "003.png"]
    assert folder.run == {}


def test_a_picture_is_upright_and_in_colour(tmp_path: Path) -> None:
    turned = picture(0, (20, 30)).getexif()
    turned[0x0112] = 6  # a quarter turn
    picture(0, (20, 30)).save(tmp_path / "a.jpg", exif=turned)
    picture(0, (20, 30)).convert("L").save(tmp_path / "b.png")
    assert size_of(tmp_path / "a.jpg") == (30, 20)
    assert read_picture(tmp_path / "a.jpg").size == (20, 30)
    assert read_picture(tmp_path / "b.png").mode == "RGB"


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an existing folder, got .*none"):
        open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"must hold pictures \(.png, .*with none"):
        open_folder(tmp_path)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    path = generated_folder(tmp_path / "a", PROMPTS)
    (path / "000001-1.png").unlink()
    with pytest.raises(ValueError, match="must hold all 2 pictures of its run, got 1: repeat the same generate command"):
        open_folder(path)


def test_a_run_with_another_picture_or_with_a_damaged_record(tmp_path: Path) -> None:
    path = generated_folder(tmp_path / "a", PROMPTS)
    picture(0).save(path / "sheet.png")
    with pytest.raises(ValueError, match="must hold no other pictures than the 2 of its run, got 3"):
        open_folder(path)
    (path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json must be the one that `generate` wrote, got Expecting"):
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
    path = plain_folder(tmp_path / "a", [0, 1])
    picture(2, (64, 48)).save(path / "002.png")
    with pytest.raises(ValueError, match=r"must be of one size, got 48 x 48 in .*001.png and 64 x 48 in .*002.png"):
        common_size([open_folder(path)])


def test_folders_that_do_not_match(tmp_path: Path) -> None:
    first = generated_folder(tmp_path / "first", PROMPTS)
    others = {
        "as many pictures, which are paired, got 2 in .*first and 3 in .*more": generated_folder(tmp_path / "more", [*PROMPTS, "a cat"]),
        "of the same names, which pair them, got others in .*seeds": generated_folder(tmp_path / "seeds", PROMPTS, seed=9),
        "of the same names, which pair them, got others in .*plain": plain_folder(tmp_path / "plain", [0, 1]),
        "the same prompts, or all .*, got others in .*first and .*prompts": generated_folder(tmp_path / "prompts", ["a fox", "a cat"]),
        "of one size, got 48 x 48 in .* and 64 x 48 in": generated_folder(tmp_path / "size", PROMPTS, (64, 48)),
    }
    assert common_size([open_folder(first), open_folder(generated_folder(tmp_path / "same", PROMPTS))]) == (48, 48)
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            common_size([open_folder(first), open_folder(other)])


def test_folders_of_one_name_are_named_by_their_parents_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [generated_folder(tmp_path / name, PROMPTS) for name in ("sdxl/scalediff", "sdxl/direct", "flux/scalediff", "a/sdxl/scalediff")]
    monkeypatch.chdir(paths[0])
    named = {
        2: ["scalediff", "direct"],
        3: ["sdxl/scalediff", "sdxl/direct", "flux/scalediff"],
        4: [f"{tmp_path.name}/sdxl/scalediff", f"{tmp_path.name}/sdxl/direct", f"{tmp_path.name}/flux/scalediff", "a/sdxl/scalediff"],
    }
    for count, names in named.items():
        folders = open_folders([Path("."), *paths[1:count]])
        assert [folder.name for folder in folders] == names
        assert common_size(folders) == (48, 48)
    with pytest.raises(ValueError, match=r"folders must be different, each is a row, got \., .*sdxl.direct, .*sdxl.scalediff"):
        open_folders([Path("."), paths[1], paths[0]])
