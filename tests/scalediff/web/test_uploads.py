"""Files from strangers: what they are is known before they are decoded."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalediff.cascade.pictures import BEHIND_MASK
from scalediff.command.pictures import open_picture
from scalediff.web.uploads import open_upload, white_of

Image = pytest.importorskip("PIL.Image")


def bomb(width: int, height: int) -> bytes:
    """A small PNG file whose header promises a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


SMALL = Image.new("RGB", (24, 16), "red")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be a picture in one of the formats PNG, JPEG, WEBP, got none of these"),
        (b"\x89PNG\r\n\x1a\nrubbish", "got none of these"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "got none of these"),
        (encoded(SMALL, "GIF"), "got none of these"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:-900], "must be a whole picture, got a broken one"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "must be a whole picture, got a broken one"),
        (bomb(9000, 9000), r"at most 67.1 million pixels, got 9000 x 9000, 81.0 million"),
        (bomb(100_000, 100_000), r"at most 67.1 million pixels"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "secret-folder" / "file.png"
    file.parent.mkdir()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        open_upload(file)
    assert "secret-folder" not in str(raised.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Any) -> None:
        raise AssertionError("the picture was decoded")

    (tmp_path / "bomb.png").write_bytes(bomb(9000, 9000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ValueError, match="million pixels"):
        open_upload(tmp_path / "bomb.png")


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(SMALL, "PNG") + bytes(2**20))
    with pytest.raises(ValueError, match=r"a picture file must have at most 1 MiB, got 1.0 MiB"):
        open_upload(tmp_path / "a.png", max_bytes=2**20)


def test_pictures_are_read_upright_and_in_colour(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    for kind, image in [("PNG", SMALL.convert("RGBA")), ("WEBP", SMALL), ("PNG", SMALL.convert("P"))]:
        (tmp_path / "a").write_bytes(encoded(image, kind))
        assert (open_upload(tmp_path / "a").size, open_upload(tmp_path / "a").mode) == ((24, 16), "RGB")
    (tmp_path / "a").write_bytes(encoded(SMALL, "JPEG", exif=turned))
    assert open_upload(tmp_path / "a").size == (16, 24)


def test_what_is_transparent_is_white_in_a_picture_and_black_in_a_mask(tmp_path: Path) -> None:
    """Whatever colour the file hides there; a half is mixed. Also where one colour or palette entry is transparent."""
    hidden = Image.new("RGBA", (3, 1), (0, 200, 255, 0))
    hidden.putpixel((1, 0), (255, 255, 255, 51))
    hidden.putpixel((2, 0), (10, 20, 30, 255))
    hidden.save(tmp_path / "a.png")
    for read in (open_upload, open_picture):
        assert np.asarray(read(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [255] * 3, [10, 20, 30]]
        assert np.asarray(read(tmp_path / "a.png", behind=BEHIND_MASK))[0].tolist() == [[0] * 3, [51] * 3, [10, 20, 30]]
    red = Image.new("RGB", (1, 1), "red")
    for image, color in ((red, (255, 0, 0)), (red.quantize(2), red.quantize(2).getpixel((0, 0))), (Image.new("L", (1, 1), 7), 7)):
        image.save(tmp_path / "a.png", transparency=color)
        assert open_upload(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_its_first_picture(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", SMALL.size, "blue")])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_grey_levels_of_16_bits_are_not_cut_off(tmp_path: Path) -> None:
    """Also by the command; of a mask, all but black would be white."""
    levels = np.array([[0, 127 * 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    for read in (open_upload, open_picture):
        assert np.asarray(read(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 127, 128, 255]
    assert np.asarray(white_of(open_upload(tmp_path / "a.png"))).tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_of_32_bits_are_refused(tmp_path: Path, mode: str) -> None:
    """Pillow would make them white or black."""
    Image.new(mode, (4, 4), 1).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError,
        match=rf"Pillow reads, got .*a.tif: a picture must have levels of 8 bits, or .* first, got image.mode='{mode}'",
    ):
        open_picture(tmp_path / "a.tif")


def test_more_pixels_than_pillow_opens_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SMALL.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(ValueError, match=r"the file must be a picture that Pillow reads, got .*a.png: Image size \(384 pixels\) exceeds"):
        open_picture(tmp_path / "a.png")
