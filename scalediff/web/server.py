"""The server of the page: Gradio's application, the pictures and their tiles, behind the guard."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalediff.cascade.pipeline import check_call
from scalediff.web.gallery import Gallery
from scalediff.web.guard import App, Guard
from scalediff.web.tiles import tile
from scalediff.web.uploads import MAX_BYTES

_ASSETS = {"viewer.js": "text/javascript", "page.css": "text/css"}
_FOREVER = {"Cache-Control": "private, max-age=86400, immutable"}  # the address has the file's time


def serve(pipe: Any, *, model: str, folder: Path, host: str, listener: socket.socket) -> None:
    """Serve the page until the process is interrupted.

    Args:
        pipe: The pipeline.
        model: The name that it was loaded by.
        folder: Where pictures are saved.
        host: The host that the socket is bound to.
        listener: The socket, from `listen`.

    Raises:
        ImportError: Gradio is missing.
        TypeError, ValueError: As `check_pipeline`.
    """
    check_pipeline(pipe)
    with tempfile.TemporaryDirectory(prefix="scalediff-web-") as temporary:
        app = make_app(pipe, model=model, gallery=Gallery(folder), temporary=Path(temporary), host=host)
        make_server(app).run(sockets=[listener])


def make_server(app: App) -> Any:
    """A uvicorn server, which ends without waiting for pages that are still open."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False))


def check_pipeline(pipe: Any) -> None:
    """Check that a pipeline can draw.

    Raises:
        TypeError: It is not a text-to-image pipeline.
        ValueError: Its family is not known, or it has no autoencoder.
    """
    check_call(pipe)
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"the pipeline must have an autoencoder, which makes the pictures, got {type(pipe).__name__} with vae=None")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        OSError: The address is in use or is none of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"the page needs a free address of this machine, got {host}, port {port}: {reason}") from error


def make_app(pipe: Any, *, model: str, gallery: Gallery, temporary: Path, host: str) -> App:
    """The whole application, as ASGI.

    Args:
        pipe, model: As in `serve`.
        gallery: The pictures.
        temporary: Folder for uploads, which nothing else uses.
        host: The host that the server is bound to.
    """
    # Gradio reads these when it is imported, or later.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(temporary))
    import fastapi
    import gradio

    from scalediff.web.page import make_page, theme

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, gallery)
    app = gradio.mount_gradio_app(
        app,
        make_page(pipe, model=model, gallery=gallery),
        "/",
        server_name=host,
        allowed_paths=[],
        blocked_paths=[str(gallery.folder)],  # its pictures have addresses of their own
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        head='<link rel="stylesheet" href="scalediff/page.css"><script src="scalediff/viewer.js"></script>',
    )
    return Guard(app, host=host, uploads=temporary, max_upload=MAX_BYTES)


def _add_routes(app: Any, gallery: Gallery) -> None:
    """Add the addresses of the pictures, their thumbnails and tiles, and the page's script and style."""
    from fastapi import HTTPException
    from fastapi.responses import FileResponse, Response

    def or_not_found(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (ValueError, FileNotFoundError) as error:
            raise HTTPException(404, "not found") from error

    def picture(name: str) -> Any:
        return FileResponse(or_not_found(lambda: gallery.path(name)), media_type="image/png", filename=name)

    def thumbnail(name: str) -> Any:
        return Response(or_not_found(lambda: gallery.thumbnail(name)), media_type="image/jpeg", headers=_FOREVER)

    def one_tile(name: str, level: int, x: int, y: int) -> Any:
        return Response(or_not_found(lambda: tile(gallery.path(name), level, x, y)), media_type="image/png", headers=_FOREVER)

    def asset(name: str) -> Any:
        if name not in _ASSETS:
            raise HTTPException(404, "not found")
        return FileResponse(Path(__file__).with_name(name), media_type=_ASSETS[name])

    routes = {"pictures/{name}": picture, "thumbnails/{name}": thumbnail, "tiles/{name}/{level}/{x}/{y}": one_tile, "{name}": asset}
    for path, answer in routes.items():
        app.add_api_route(f"/scalediff/{path}", answer, methods=["GET"], response_model=None)
