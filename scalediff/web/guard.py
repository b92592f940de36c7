"""What the page's server answers: the page's own addresses to hosts that it is known by, within limits, and nothing else."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY = 2**20  # bytes of a request that uploads no file: the values of the controls
# Gradio has more: a proxy, a monitor, pages of its own. Only what the page needs is answered.
_ALLOWED = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/(assets|static|svelte|scalediff)/.+"
    r"|/gradio_api/(startup-events|queue/(join|data)|heartbeat/\w+|upload|upload_progress|cancel|reset|app_id|file=(?!\w+:).+)"
)
# The browser is told to load nothing from elsewhere, whatever the page contains.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)
_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class Guard:
    """Refuse requests that the page never makes, and tell the browser to load nothing from elsewhere.

    Args:
        app: The application behind it.
        host: The host that the server is bound to. Requests must name it, an IP address or localhost, so that another site cannot reach
            the page under a name of its own (DNS rebinding). A server that is bound to all addresses is reached by any name.
        uploads: The folder of the uploaded files. The value of a control may name files of this folder, and no other file and no address:
            Gradio would read or load whatever it names.
        max_upload: Bytes of the largest upload.
    """

    def __init__(self, app: App, *, host: str, uploads: Path, max_upload: int) -> None:
        self._app, self._host, self._uploads, self._max_upload = app, host, uploads.resolve(), max_upload

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # the page has no websockets
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not _known(headers.get("host", ""), self._host):
            await _refuse(send, 403, "this server is not known by that name")
            return
        path = unquote(scope["path"])
        if not _ALLOWED.fullmatch(path) or ".." in path.split("/"):
            await _refuse(send, 404, "not found")
            return
        uploads = path == "/gradio_api/upload"
        limit = self._max_upload + MAX_BODY if uploads else MAX_BODY  # an upload has headers of its own around the file
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit or (scope["method"] == "POST" and "content-length" not in headers):
            await _refuse(send, 413, f"a request must name its length and have at most {limit} bytes")
            return
        if path == "/gradio_api/queue/join":
            body = await _body(receive)
            if not _names_only_files_of(self._uploads, body):
                await _refuse(send, 403, "a control takes only files that were uploaded to this page")
                return
            receive = _replayed(body, receive)
        await self._app(scope, receive, _with_headers(send))


def _known(named: str, host: str) -> bool:
    """Whether a Host header is an IP address, localhost or the host that the server is bound to."""
    name = re.sub(r":\d+$", "", named).strip("[]").lower()
    if name in (host.lower(), "localhost") or host in ("0.0.0.0", "::"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _body(receive: Receive) -> bytes:
    """The whole body of a request, whose length is limited by now."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A function that receives a body that was read before, and then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _names_only_files_of(folder: Path, body: bytes) -> bool:
    """Whether every file that a JSON text names, as `path` of a mapping at any depth, lies in a folder. False if it is no JSON."""
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            if "path" in value and not (isinstance(value["path"], str) and Path(value["path"]).resolve().is_relative_to(folder)):
                return False
        elif isinstance(value, list):
            left += value
    return True


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *own]
        await send(message)

    return send_with_headers


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    send = _with_headers(send)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
