"""A hub of models on the loopback: the few answers of huggingface.co's API that finding and downloading a model takes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.serving import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"
"""Files that a real hub keeps by their digest, and tells it."""


class Hub(ThreadingHTTPServer):
    """Has one model, at one commit."""

    daemon_threads = True

    def __init__(self, model: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.folder = folder
        self.requests: list[str] = []
        """Method and path of each, in order of arrival."""
        self.refusals: deque[int] = deque()
        """Statuses that the next questions about the model get."""
        self.before_download: Callable[[str], None] = lambda _: None
        """Called with a file's name before its bytes are sent."""

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> Counter[str]:
        """How often the bytes of each file were asked for."""
        return Counter(path.rpartition("/")[2] for path in self.requests if path.startswith("GET ") and "/resolve/" in path)


@contextmanager
def hub(model: str, folder: Path) -> Iterator[Hub]:
    """Serve the folder as the hub model of that name, as long as the block runs."""
    server = Hub(model, folder)
    with serving(server):
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _do(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        api, files = f"/api/models/{self.server.model}", f"/{self.server.model}/resolve/{COMMIT}/"
        if path.startswith(files):
            self._file(path.removeprefix(files))
        elif path.startswith(api) and self.server.refusals:
            self._answer(self.server.refusals.popleft(), {}, b"{}")
        elif path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            siblings = [{"rfilename": each["path"], **each} for each in self._tree()]
            self._json({"id": self.server.model, "modelId": self.server.model, "sha": COMMIT, "siblings": siblings})
        elif path == f"{api}/tree/{COMMIT}":
            self._json(self._tree())
        else:
            self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")

    do_GET = do_HEAD = _do  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """The tests' output stays clean."""

    def _tree(self) -> list[dict[str, Any]]:
        entries = []
        for file in sorted(self.server.folder.rglob("*")):
            if file.is_file():
                digest, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
                large = {"lfs": {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}} if file.suffix == LARGE else {}
                path = file.relative_to(self.server.folder).as_posix()
                entries.append({"type": "file", "path": path, "size": size, "oid": digest[:40], "blobId": digest[:40], **large})
        return entries

    def _file(self, name: str) -> None:
        data = (self.server.folder / name).read_bytes()
        if self.command == "GET":
            self.server.before_download(name)
        etag = hashlib.sha256(data).hexdigest()
        self._answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}, data)

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
