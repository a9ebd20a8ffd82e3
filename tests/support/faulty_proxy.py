"""An HTTP proxy before the S3 server that does to single requests what networks and busy stores do."""

from __future__ import annotations

import http.client
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

ANSWERS = {
    "slow down": (503, "SlowDown"),
    "internal error": (500, "InternalError"),
    "conflict": (409, "ConditionalRequestConflict"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "claim success": (200, ""),
}
"""Faults that are answers: status and S3 error code. The others are `reset` (no answer), `lose reply` (the request is carried
out, the answer is not) and `truncate` (half of the body)."""


When: TypeAlias = Literal["before", "after"]
Watcher: TypeAlias = Callable[[When, str, str], None]
"""Gets the moment, the method and the path with its query. A ConnectionError that it raises loses the request, or its answer."""


class Exchange(threading.local):
    """What else a watcher may want to know of the request in whose thread it is called."""

    client_port = 0
    """Where the request comes from: tells which process asks."""
    status = 0
    """HTTP status of the answer; 0 before it."""


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, but for each fault in `faults`: the next request meets the first of them."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.faults: deque[str] = deque()
        self.only = ""
        """Requests whose path does not end so meet no fault."""
        self.requests: list[str] = []
        """Method and path of each request, in order of arrival."""
        self.watchers: list[Watcher] = []
        """Called in the request's thread before it is passed on and after it was carried out, before its answer goes back."""
        self.exchange = Exchange()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients die in these tests; only what else happens is worth a traceback on stderr."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def endpoint(self) -> str:
        """URL that clients use."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """A proxy before `endpoint`, as long as the block runs."""
    with FaultyProxy(endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _do(self) -> None:
        self.server.requests.append(f"{self.command} {urlsplit(self.path).path}")
        meant = urlsplit(self.path).path.endswith(self.server.only)
        fault = self.server.faults.popleft() if meant and self.server.faults else ""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "reset":
            self._hang_up()
        elif fault in ANSWERS:
            status, code = ANSWERS[fault]
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>{fault}</Message></Error>".encode() if code else b"")
        else:
            try:
                self._pass_on(fault, body)
            except (OSError, http.client.HTTPException):  # the client or the server died
                self._hang_up()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _do  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """The tests' output stays clean."""

    def _pass_on(self, fault: str, body: bytes) -> None:
        self.server.exchange.client_port, self.server.exchange.status = self.client_address[1], 0
        self._tell("before")
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # Host as it came: the signature covers it
            upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        self.server.exchange.status = answer.status
        self._tell("after")
        if fault == "lose reply":
            self._hang_up()
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding")}
        self._answer(answer.status, {"Content-Length": str(len(data)), **headers}, data[: len(data) // 2] if fault == "truncate" else data)
        if fault == "truncate":
            self._hang_up()

    def _tell(self, when: When) -> None:
        for watcher in self.server.watchers:
            watcher(when, self.command, self.path)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may be gone
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
