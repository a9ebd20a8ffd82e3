"""A hub on the loopback: the few answers of huggingface.co's API that finding and downloading a model, or reading a dataset, takes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.serving import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"
"""Files that a real hub keeps by their digest, and tells it."""


class Hub(ThreadingHTTPServer):
    """Has one model, at one commit."""

    daemon_threads = True

    def __init__(self, model: str, folder: Path, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or _Handler)
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


class DatasetHub(Hub):
    """Has one dataset, at every commit that was pushed."""

    def __init__(self, dataset: str) -> None:
        super().__init__(dataset, Path(), _DatasetHandler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[str, str] = {}
        """Commits of branches and tags, and of themselves."""
        self.token: str | None = None
        """Who does not show it is told that there is no such dataset."""
        self.gated: str | None = None
        """Paths that have this in them are only for those who accepted some terms, and nobody has."""
        self.ranges: list[tuple[str, int, int]] = []
        """What was asked of files: name, first byte, last byte."""
        self.faults: deque[int] = deque()
        """Statuses that the next ranges get, without their bytes."""
        self.page = 1000
        """Entries of a listing that one answer has."""

    def push(self, files: dict[str, bytes], *revisions: str) -> str:
        """A commit that has these files, to which main and the other revisions point from now on."""
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.revisions |= dict.fromkeys(("main", *revisions, commit), commit)
        return commit


@contextmanager
def dataset_hub(dataset: str) -> Iterator[DatasetHub]:
    """Serve a dataset of that name, as long as the block runs."""
    server = DatasetHub(dataset)
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


class _DatasetHandler(_Handler):
    server: DatasetHub

    def _do(self) -> None:
        place = urlsplit(self.path)
        path = unquote(place.path)
        self.server.requests.append(f"{self.command} {path}")
        api, files = f"/api/datasets/{self.server.model}", f"/datasets/{self.server.model}/resolve/"
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._answer(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif self.server.gated and self.server.gated in path:
            self._answer(403, {"X-Error-Code": "GatedRepo"}, b"{}")
        elif path.startswith(files):
            self._range(*path.removeprefix(files).split("/", 1))
        elif self.server.refusals:
            self._answer(self.server.refusals.popleft(), {}, b"{}")
        elif path == api or path.startswith(f"{api}/revision/"):
            self._info(path.removeprefix(api).removeprefix("/revision/") or "main")
        elif path.startswith(f"{api}/tree/"):
            commit, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
            self._list(commit, folder, {key: value[0] for key, value in parse_qs(place.query).items()})
        else:
            self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")

    do_GET = do_HEAD = _do  # noqa: N815

    def _info(self, revision: str) -> None:
        if commit := self.server.revisions.get(revision):
            self._json({"id": self.server.model, "sha": commit, "siblings": []})
        else:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")

    def _list(self, commit: str, folder: str, query: dict[str, str]) -> None:
        """Files and folders below, in pages."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, data in sorted(self.server.commits[self.server.revisions[commit]].items()):
            if name.startswith(prefix):
                parts = name.removeprefix(prefix).split("/")
                for path in (prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))):
                    entries[path] = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
                entries[name] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        deep = query.get("recursive", "false").lower()
        listed = [entry for path, entry in entries.items() if deep == "true" or "/" not in path.removeprefix(prefix)]
        if not listed:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
            return
        start = int(query.get("cursor", 0))
        stop = start + self.server.page
        more = f"{self.server.endpoint}{urlsplit(self.path).path}?recursive={deep}&cursor={stop}"
        link = {"Link": f'<{more}>; rel="next"'} if stop < len(listed) else {}
        self._answer(200, {"Content-Type": "application/json", **link}, json.dumps(listed[start:stop]).encode())

    def _range(self, commit: str, name: str) -> None:
        data = self.server.commits.get(commit, {}).get(name)
        if data is None:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
            return
        first, last = (int(end) for end in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.ranges.append((name, first, last))
        if self.server.faults:
            self._answer(self.server.faults.popleft(), {}, b"")
        else:
            self._answer(206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])
