"""The page's parts that are HTML: the status line, the viewer, the facts of a picture, the gallery. All text in them is escaped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from scalediff.web.gallery import COMPANIONS, Gallery, as_jpeg
from scalediff.web.uploads import white_of

PREVIEW_SIDE = 1024  # pixels of a preview's longer side


def status_html(text: str, share: float | None = None, *, error: bool = False) -> str:
    """A line of text, with a bar above it if there is a share that is done."""
    track = "" if share is None else f'<div class="sd-track"><div style="width: {100 * min(max(share, 0), 1):.1f}%"></div></div>'
    return f'<div class="sd-status" role="status">{track}<span{" class=sd-error" if error else ""}>{escape(text)}</span></div>'


def empty_html(text: str) -> str:
    """The viewer without a picture."""
    return f'<div class="sd-stage"><div class="sd-empty">{escape(text)}</div></div>'


def preview_html(image: Any) -> str:
    """The viewer with an unfinished picture, which is part of the HTML itself."""
    return _inline_html("Preview of the unfinished picture", image)


def upload_html(picture: Any, mask: Any = None) -> str:
    """The viewer with an uploaded picture, which is pale where its mask draws it anew."""
    from PIL import Image

    shown = picture.copy()
    shown.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    if mask is not None:
        pale = Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.7)
        shown = Image.composite(pale, shown, white_of(mask).resize(shown.size))
    return _inline_html("The uploaded picture", shown)


def _inline_html(label: str, image: Any) -> str:
    data = base64.b64encode(as_jpeg(image, PREVIEW_SIDE)).decode()
    return f'<div class="sd-stage"><img alt="{label}" src="data:image/jpeg;base64,{data}"></div>'


def viewer_html(gallery: Gallery, name: str) -> str:
    """The viewer with a picture of the gallery, and with those that it is compared with.

    Raises:
        ValueError: The gallery has no such picture.
    """
    names = [name, *gallery.companions(name).values()]
    data = json.dumps([_picture(gallery, one) for one in names])
    return f'<div class="sd-stage"><scalediff-viewer data-pictures="{escape(data)}"></scalediff-viewer></div>'


def details_html(gallery: Gallery, name: str) -> str:
    """The facts of a picture, with a link to its file; raises as `viewer_html`."""
    metadata = gallery.metadata(name)
    settings = metadata.get("settings", {})
    off = [part for part in ("lfm", "sg") if settings.get(part) is False]
    facts = {
        "size": f"{metadata.get('height')} x {metadata.get('width')}",
        "time": f"{metadata['seconds']:.1f} s" if "seconds" in metadata else None,
        "seed": metadata.get("seed"),
        "method": metadata.get("kind"),
        "attention": settings.get("attention") if metadata.get("method") == "scalediff" else None,
        "without": ", ".join(part.upper() for part in off) or None,
        "steps": settings.get("steps"),
        "restart": _number(settings.get("restart")),
        "guidance": _number(settings.get("guidance_scale")),
        "preset": metadata.get("preset"),
        "model": metadata.get("model"),
        "enlarged from": metadata.get("picture_size"),
        "mask": metadata.get("mask_size"),
        "strength": _number(metadata.get("strength")),
    }
    rows = [f"<div><dt>{escape(label)}</dt><dd>{escape(str(value))}</dd></div>" for label, value in facts.items() if value is not None]
    prompt = f'<div class="sd-wide"><dt>prompt</dt><dd>{escape(str(metadata.get("prompt")))}</dd></div>'
    links = [f'<a href="scalediff/pictures/{one}" download>{escape(label)}</a>' for one, label in _files(gallery, name).items()]
    return f'<dl class="sd-details">{prompt}{"".join(rows)}<div><dt>file</dt><dd>{", ".join(links)}</dd></div></dl>'


def gallery_html(gallery: Gallery) -> str:
    """The newest pictures as buttons; `data-picture` is the name."""
    buttons = []
    for name in gallery.names():
        metadata = gallery.metadata(name)
        prompt, size = escape(str(metadata.get("prompt"))), f"{metadata.get('height')} x {metadata.get('width')}"
        address = f"scalediff/thumbnails/{name}?v={_version(gallery, name)}"
        compared = " · compared" if gallery.companions(name) else ""
        buttons.append(
            f'<button type="button" data-picture="{name}" title="{prompt}"><img loading="lazy" alt="{prompt}" src="{address}">'
            f"<span>{size}{compared}</span></button>"
        )
    if not buttons:
        return f"<h2>Gallery</h2><p>Pictures that you draw are kept in {escape(str(gallery.folder))} and listed here.</p>"
    return f'<h2>Gallery</h2><div class="sd-gallery">{"".join(buttons)}</div>'


def _picture(gallery: Gallery, name: str) -> dict[str, Any]:
    metadata = gallery.metadata(name)
    seconds = f", {metadata['seconds']:.1f} s" if "seconds" in metadata else ""
    label = f"{metadata.get('kind', 'picture')}{seconds}"
    height, width = metadata["height"], metadata["width"]
    return {
        "name": name, "label": f"{label[0].upper()}{label[1:]}", "version": _version(gallery, name), "height": height, "width": width
    }  # fmt: skip


def _files(gallery: Gallery, name: str) -> Mapping[str, str]:
    """The labels of the links to a picture and its companions, by file name."""
    return {name: "PNG"} | {one: f"{COMPANIONS[kind]} PNG" for kind, one in gallery.companions(name).items()}


def _version(gallery: Gallery, name: str) -> int:
    """Changes with the file, so that a browser does not show what it kept of an earlier one."""
    return gallery.path(name).stat().st_mtime_ns // 1000


def _number(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return ", ".join(f"{one:g}" for one in value)
    return f"{value:g}" if isinstance(value, int | float) and math.isfinite(value) else None
