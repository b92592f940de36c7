"""The folder of pictures: names, companions, tiles, and nothing of the rest of the disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from scalediff.cascade.metadata import save_png
from scalediff.web.gallery import LISTED, Gallery, companion_of
from scalediff.web.tiles import TILE, levels, tile
from scalediff.web.views import details_html, gallery_html, viewer_html

Image = pytest.importorskip("PIL.Image")
FACTS = {"prompt": "a moon <script>alert(1)</script>", "seed": 3, "height": 12, "width": 20}


def picture(width: int = 20, height: int = 12) -> Any:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def test_names_come_from_the_prompt_and_are_never_taken_twice(gallery: Gallery) -> None:
    names = [gallery.new_name("A moon, /etc/passwd & ../more", 7) for _ in range(2)]
    assert names == ["a-moon-etc-passwd-more-7.png", "a-moon-etc-passwd-more-7-2.png"]
    assert gallery.new_name("月", 0) == "picture-0.png"
    gallery.drop(names[0])
    assert gallery.new_name("a moon etc passwd more", 7) == names[0]
    assert gallery.names() == [], "a name without a picture is not listed"


def test_companions_belong_to_their_picture(gallery: Gallery) -> None:
    name = gallery.new_name("a moon", 3)
    gallery.save(picture(), name, FACTS)
    assert gallery.companions(name) == {}
    gallery.save(picture(), "a-moon-3.direct.png", FACTS | {"kind": "direct inference", "seconds": 2.0})
    assert gallery.companions(name) == {"direct": "a-moon-3.direct.png"}
    assert (companion_of(name), companion_of("a-moon-3.direct.png")) == (None, "direct")
    assert gallery.names() == [name]
    gallery.drop(name)
    assert gallery.names() == [name], "only an empty file is dropped"
    shown = viewer_html(gallery, name)
    assert "Direct inference, 2.0 s" in shown
    assert "a-moon-3.direct.png" in details_html(gallery, name)


def test_text_of_users_is_escaped(gallery: Gallery) -> None:
    name = gallery.new_name("a moon", 3)
    gallery.save(picture(), name, FACTS | {"model": "<b>", "kind": "<i>"})
    for html in (viewer_html(gallery, name), details_html(gallery, name), gallery_html(gallery)):
        assert "<script" not in html
        assert "<b>" not in html
        assert "<i>" not in html
    assert "&lt;script&gt;" in details_html(gallery, name)


def test_only_pictures_of_the_folder_have_a_path(gallery: Gallery, tmp_path: Path) -> None:
    gallery.save(picture(), gallery.new_name("a moon", 3), FACTS)
    outside = tmp_path / "outside-1.png"
    save_png(picture(), outside, metadata=FACTS)
    (gallery.folder / "link-1.png").symlink_to(outside)
    picture().save(gallery.folder / "photo-1.png")
    save_png(picture(), gallery.folder / "sizeless-1.png", metadata={"prompt": "x"})
    save_png(picture(), gallery.folder / ".hidden.png", metadata=FACTS)
    names = [
        "../outside-1.png",
        str(outside),
        "link-1.png",
        "photo-1.png",
        "sizeless-1.png",
        ".hidden.png",
        "a-moon-3.png/..",
        "",
        "missing-1.png",
    ]
    for name in names:
        with pytest.raises(ValueError, match=r"must be one of the gallery|must be a picture"):
            gallery.path(name)
    assert gallery.names() == ["a-moon-3.png"]


def test_the_newest_pictures_come_first_and_not_too_many(gallery: Gallery) -> None:
    import os

    for seed in range(LISTED + 2):
        name = gallery.new_name("a", seed)
        gallery.save(picture(2, 2), name, FACTS)
        os.utime(gallery.folder / name, (seed, seed))
    assert gallery.names() == [f"a-{seed}.png" for seed in range(LISTED + 1, 1, -1)]


def test_an_empty_gallery_says_where_pictures_go(gallery: Gallery) -> None:
    assert str(gallery.folder) in gallery_html(gallery)
    assert not gallery.folder.exists(), "nothing is made before there is a picture"


def test_thumbnails_are_small_and_follow_the_file(gallery: Gallery) -> None:
    name = gallery.new_name("a", 0)
    gallery.save(picture(900, 300), name, FACTS)
    with Image.open(io.BytesIO(gallery.thumbnail(name))) as small:
        assert (small.format, small.size) == ("JPEG", (288, 96))
    gallery.save(picture(300, 300), name, FACTS)
    with Image.open(io.BytesIO(gallery.thumbnail(name))) as small:
        assert small.size == (288, 288)


@pytest.mark.parametrize(
    ("size", "count"), [((1, 1), 1), ((256, 256), 1), ((257, 3), 2), ((512, 512), 2), ((513, 8), 3), ((4096, 4096), 5)]
)
def test_the_last_level_fits_into_one_tile(size: tuple[int, int], count: int) -> None:
    assert levels(size) == count
    assert max(size) <= TILE * 2 ** (count - 1)


def test_tiles_put_together_are_the_picture(gallery: Gallery) -> None:
    name, whole = gallery.new_name("a", 0), picture(600, 300)
    gallery.save(whole, name, FACTS)
    path = gallery.path(name)
    put = Image.new("RGB", whole.size)
    for y in range(2):
        for x in range(3):
            put.paste(Image.open(io.BytesIO(tile(path, 0, x, y))), (x * TILE, y * TILE))
    assert put.tobytes() == whole.tobytes()
    assert Image.open(io.BytesIO(tile(path, 2, 0, 0))).size == (150, 75)
    for level, x, y in [(3, 0, 0), (-1, 0, 0)]:
        with pytest.raises(ValueError, match=r"level must lie in \[0, 3\)"):
            tile(path, level, x, y)
    for level, x, y in [(0, 3, 0), (0, 0, 2), (0, -1, 0)]:
        with pytest.raises(ValueError, match="the tile must lie in the 300 x 600 pixels of level 0"):
            tile(path, level, x, y)
