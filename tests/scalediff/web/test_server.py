"""What the server answers and what it refuses; nothing is read from outside its folders."""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from scalediff.web.gallery import Gallery
from scalediff.web.guard import MAX_BODY, _known
from scalediff.web.server import check_pipeline, listen
from scalediff.web.uploads import MAX_BYTES

Image = pytest.importorskip("PIL.Image")
Served = tuple[str, Gallery]


def ask(address: str, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
    """One request, with the path as it stands here: no client tidies it up."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    connection.request(method, path, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def status(address: str, path: str, **named: Any) -> int:
    return ask(address, path, **named).status


def upload(address: str, data: bytes, name: str) -> http.client.HTTPResponse:
    """Send a file as the page does."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + data + b"\r\n--x--\r\n"
    return ask(address, "/gradio_api/upload", method="POST", body=body, Content_Type="multipart/form-data; boundary=x")


@pytest.fixture
def picture(served: Served) -> str:
    gallery = served[1]
    name = gallery.new_name("a moon", 1)
    gallery.save(Image.new("RGB", (300, 40)), name, {"prompt": "a moon", "height": 40, "width": 300})
    return name


def test_the_page_and_its_parts_are_served(served: Served, picture: str) -> None:
    kinds = {"/": "text/html", "/scalediff/page.css": "text/css", "/scalediff/viewer.js": "text/javascript", "/theme.css": "text/css",
             f"/scalediff/pictures/{picture}": "image/png", f"/scalediff/thumbnails/{picture}?v=1": "image/jpeg",
             f"/scalediff/tiles/{picture}/0/1/0": "image/png"}  # fmt: skip
    for path, kind in kinds.items():
        answer = ask(served[0], path)
        assert (answer.status, answer.headers.get_content_type()) == (200, kind), path
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"], path


def test_files_outside_the_folders_are_not_served(served: Served, picture: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    folder = served[1].folder
    (folder / "secret.txt").write_text("secret")
    up = "../" * 12
    for path in (
        str(secret),
        "/etc/passwd",
        str(folder / picture),
        str(folder / "secret.txt"),
        str(Path(__file__)),
        f"{up}etc/passwd",
        "pyproject.toml",
    ):
        for form in (path, path.replace("/", "%2F"), path.replace(".", "%2e"), "/" + path):
            assert status(served[0], f"/gradio_api/file={form}") in (403, 404), form
            assert status(served[0], f"/file={form}") == 404
    for name in (
        "secret.txt",
        "..%2Fsecret.png",
        f"{up}etc/passwd",
        "%2Fetc%2Fpasswd",
        "%252e%252e%252fsecret.png",
        "server.py",
        ".hidden",
    ):
        for place in ("pictures/", "thumbnails/", "tiles/", ""):
            end = "/0/0/0" if place == "tiles/" else ""
            assert status(served[0], f"/scalediff/{place}{name}{end}") == 404, name
    for path in ("/assets/../../routes.py", "/assets/%2e%2e/%2e%2e/routes.py", "/static/..%2f..%2froutes.py"):
        assert status(served[0], path) in (403, 404), path


@pytest.mark.parametrize("end", ["9/0/0", "0/5/0", "-1/0/0", "0/-1/0", "a/b/c", "0/0"])
def test_tiles_that_are_not_there(served: Served, picture: str, end: str) -> None:
    assert status(served[0], f"/scalediff/tiles/{picture}/{end}") in (404, 422)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/file=https://example.org/a.png",
        "/gradio_api/proxy=https://example.org/",
        "/monitoring", "/monitoring/summary", "/docs", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json",
        "/login", "/pwa_icon", "/gradio_api/run/predict",
        "/gradio_api/runs", "/gradio_api/deep_link", "/gradio_api/mcp/", "/gradio_api/call/draw", "/manifest.json", "/nothing",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(served: Served, path: str) -> None:
    assert status(served[0], path) == 404
    assert status(served[0], path, method="POST", body=b"{}") == 404


def test_uploads_are_limited_and_stay_in_their_folder(served: Served) -> None:
    answer = upload(served[0], b"small", "../../../evil.png")
    assert answer.status == 200
    (path,) = json.loads(answer.read())
    temporary = Path(os.environ["GRADIO_TEMP_DIR"])
    assert Path(path).resolve().is_relative_to(temporary.resolve())
    assert Path(path).read_bytes() == b"small"
    too_large = {"Content_Type": "multipart/form-data; boundary=x", "Content_Length": str(MAX_BYTES + MAX_BODY + 1)}
    assert status(served[0], "/gradio_api/upload", method="POST", **too_large) == 413
    assert upload(served[0], bytes(MAX_BYTES + 1), "large.png").status == 413
    assert not [file for file in temporary.rglob("large*") if file.stat().st_size > MAX_BYTES]


def test_other_requests_are_small_and_name_their_length(served: Served) -> None:
    assert status(served[0], "/gradio_api/queue/join", method="POST", Content_Length=str(MAX_BODY + 1)) == 413
    assert status(served[0], "/gradio_api/queue/join", method="POST", Transfer_Encoding="chunked") == 413
    assert status(served[0], "/", Content_Length="many") in (400, 413)


@pytest.mark.parametrize(
    ("named", "host", "known"),
    [
        ("127.0.0.1:7860", "127.0.0.1", True), ("localhost:7860", "127.0.0.1", True), ("[::1]:7860", "::1", True),
        ("10.0.0.5", "127.0.0.1", True),
        ("gpu.local:80", "gpu.local", True), ("any.name", "0.0.0.0", True), ("evil.example:7860", "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)  # fmt: skip
def test_names_that_the_server_is_known_by(named: str, host: str, known: bool) -> None:
    assert _known(named, host) is known


def test_another_site_does_not_reach_the_page_under_its_own_name(served: Served) -> None:
    assert status(served[0], "/", Host="evil.example") == 403
    assert ask(served[0], "/config", Origin="https://evil.example").headers.get("Access-Control-Allow-Origin") is None


def test_nothing_of_the_page_names_another_site(served: Served) -> None:
    """Telemetry, sharing and fonts of others are off; the browser test watches the requests themselves."""
    config = json.loads(ask(served[0], "/config").read())
    assert config["analytics_enabled"] is False
    assert config.get("is_space", False) is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    theme = ask(served[0], "/theme.css").read().decode()
    assert set(re.findall(r"https?://[\w.]+", theme)) == {"http://www.w3.org"}, "the name of SVG, which is no address"


def test_a_control_does_not_take_a_path_or_an_address_instead_of_an_upload(served: Served, tmp_path: Path) -> None:
    """Gradio's own value for an uploaded file is a path, and a client can send any."""
    image = tmp_path / "mine.png"
    Image.new("RGB", (64, 64)).save(image)
    config = json.loads(ask(served[0], "/config").read())
    file = next(one["id"] for one in config["components"] if one["type"] == "file")
    (change,) = [one["id"] for one in config["dependencies"] if [file, "change"] in [list(target) for target in one["targets"]]]

    def send(path: Any, index: int = change, mask: Any = None) -> tuple[int, str]:
        """The status, and what a client hears that names these paths as its picture and its mask."""
        files = [one and {"path": one, "meta": {"_type": "gradio.FileData"}} for one in (path, mask)]
        data = {"data": files, "fn_index": index, "session_hash": "abc"}
        joined = ask(served[0], "/gradio_api/queue/join", method="POST", body=json.dumps(data).encode(), Content_Type="application/json")
        heard = ask(served[0], "/gradio_api/queue/data?session_hash=abc").read().decode() if joined.status == 200 else ""
        return joined.status, heard

    (own,) = json.loads(upload(served[0], image.read_bytes(), "own.png").read())
    assert "data:image" in send(own)[1], "its view, where the file was uploaded"
    up = f"{Path(own).parent}/{'../' * 20}"
    for path in (
        str(image),
        "/etc/passwd",
        "mine.png",
        f"{up}{image}",
        f"{up}etc/passwd",
        "http://127.0.0.1:1/",
        "https://example.org/a.png",
        [own],
        3,
    ):
        for index in (change, 0):
            assert send(path, index) == (403, ""), path
        assert send(own, mask=path) == (403, ""), path
    link = Path(own).with_name("link.png")
    link.symlink_to(image)
    assert send(str(link)) == (403, "")
    for body in (b"", b"{", b"[" * 100_000):
        assert status(served[0], "/gradio_api/queue/join", method="POST", body=body, Content_Type="application/json") == 403


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=f"the page needs a free address of this machine, got 127.0.0.1, port {port}: address already in use"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(OSError, match=r"got nowhere\.invalid, port 0: "):
        listen("nowhere.invalid", 0)


def test_pipelines_that_cannot_draw_are_refused_at_once(demo: Any) -> None:
    check_pipeline(demo)
    without = copy.copy(demo)  # the demo itself would keep an entry without autoencoder in its config
    without.vae = None
    with pytest.raises(ValueError, match="must have an autoencoder, which makes the pictures, got StableDiffusionPipeline with vae=None"):
        check_pipeline(without)
    with pytest.raises(TypeError):
        check_pipeline(demo.unet)
