"""Files that are written completely or not at all, and what a killed process leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalediff.cascade import metadata
from scalediff.cascade.metadata import read_metadata, replacing, save_png, temporary

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell which processes have numbers of one set")


def ended_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def part_of(file: Path, pid: int) -> Path:
    """The temporary file of another process of this system."""
    return Path(str(temporary(file)).replace(f"-{os.getpid()}.part", f"-{pid}.part"))


@on_linux
def test_what_ended_processes_of_this_system_left_of_a_file_is_removed(tmp_path: Path) -> None:
    file, ended = tmp_path / "moon.png", ended_process()
    stale = part_of(file, ended)
    kept = {
        part_of(file, os.getppid()),
        part_of(file, 1),  # of another user
        part_of(tmp_path / "moon.preview.png", ended),
        tmp_path / f".moon.png.another-machine-{ended}.part",
        stale.with_name(stale.name.replace(str(ended), "x")),
    }
    for one in (stale, *kept):
        one.touch()
    with replacing(file) as part:
        part.write_text("a picture")
    assert set(tmp_path.iterdir()) == {file, *kept}
    assert file.read_text() == "a picture"


@on_linux
@pytest.mark.parametrize("numbering", ["another start of the kernel", "another container", ""])
def test_the_files_of_other_systems_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbering: str) -> None:
    """Also if the machine has the same name, so that only the numbers of processes tell that it is another one; or if they do not."""
    file = tmp_path / "moon.png"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(metadata, "_numbering", lambda: numbering)
        theirs = part_of(file, ended_process())
        theirs.touch()
        with replacing(file) as part:
            part.write_text("a picture")
        assert theirs.exists() == (numbering == "")
        theirs.touch()
    with replacing(file) as part:
        part.write_text("a picture")
    assert theirs.exists()


@on_linux
def test_a_file_that_must_not_be_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's in a folder such as /tmp."""
    file = tmp_path / "moon.png"
    stale = part_of(file, ended_process())
    stale.touch()
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == stale:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with replacing(file) as part:
        part.write_text("a picture")
    assert file.read_text() == "a picture"


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "moon.png"
    file.write_text("a picture")
    with pytest.raises(TypeError, match="write"), replacing(file) as part, part.open("w") as half:
        half.writelines(["half a", None])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "a picture"


def test_the_metadata_of_a_picture_that_is_too_large_for_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    save_png(image.new("RGB", (16, 16)), tmp_path / "x.png", metadata={"prompt": "a moon"})
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(image.DecompressionBombError):
        image.open(tmp_path / "x.png")
    assert read_metadata(tmp_path / "x.png") == {"prompt": "a moon"}


def test_metadata_behind_the_pixels_is_found(tmp_path: Path) -> None:
    """Where other software writes it."""
    image = pytest.importorskip("PIL.Image")
    save_png(image.new("RGB", (16, 16)), tmp_path / "x.png", metadata={"prompt": "a moon"})
    data = (tmp_path / "x.png").read_bytes()
    chunks, at = list[bytes](), 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        chunks.append(data[at:end])
        at = end
    texts = [chunk for chunk in chunks if chunk[4:8] in (b"tEXt", b"iTXt", b"zTXt")]
    assert texts
    others = [chunk for chunk in chunks if chunk not in texts]
    (tmp_path / "x.png").write_bytes(data[:8] + b"".join([*others[:-1], *texts, others[-1]]))
    assert read_metadata(tmp_path / "x.png") == {"prompt": "a moon"}
