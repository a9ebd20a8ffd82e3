"""An HTTP proxy before the S3 server that does to single requests what networks and busy stores do."""

from __future__ import annotations

import http.client
import io
import random
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from tests.support.serving import serving

ANSWERS = {
    "slow down": (503, "SlowDown"),
    "too many requests": (429, "TooManyRequests"),
    "internal error": (500, "InternalError"),
    "conflict": (409, "ConditionalRequestConflict"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "claim success": (200, ""),
}
"""Faults that are answers: status and S3 error code. The others are `reset` (no answer), `lose reply` (the request is carried
out, the answer is not), `truncate` (half of the body), `stall` (no answer until the client gives up) and `trickle` (the answer,
a byte at a time)."""
OF_KEYS = {"denied key": "AccessDenied", "busy key": "InternalError", "missing key": "NoSuchKey"}
"""Faults of one key in the answer to a deletion of several objects, which as a request has succeeded."""
TRICKLE_SECONDS = 0.1
"""Between two bytes of a trickle."""

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
        self.kinds: frozenset[str] = frozenset()
        """Kinds of requests (GET, PUT, LIST, HEAD, POST, DELETE) that meet faults; empty: all."""
        self.always = ""
        """The fault of each request that is meant, once `faults` is empty."""
        self.closing = threading.Event()
        self.requests: list[str] = []
        """Method and path of each request, in order of arrival."""
        self.answered_bytes = 0
        """Of all bodies of answers so far."""
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

    def scatter(self, faults: Sequence[str], *, over: int, seed: int) -> None:
        """Let each of the faults meet one of the next `over` requests."""
        chosen = random.Random(seed)
        schedule = [*faults, *[""] * (over - len(faults))]
        chosen.shuffle(schedule)
        self.faults.extend(schedule)

    def fault_of(self, kind: str, path: str) -> str:
        """The fault that a request meets."""
        if not path.endswith(self.only) or (self.kinds and kind not in self.kinds):
            return ""
        try:
            return self.faults.popleft()
        except IndexError:
            return self.always

    def heal(self) -> None:
        """No more faults, no more watchers."""
        self.faults.clear()
        self.watchers.clear()
        self.only, self.kinds, self.always = "", frozenset(), ""


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """A proxy before `endpoint`, as long as the block runs."""
    proxy = FaultyProxy(endpoint)
    with serving(proxy):
        try:
            yield proxy
        finally:
            proxy.closing.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _do(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {url.path}")
        fault = self.server.fault_of("LIST" if "list-type=" in url.query else self.command, url.path)
        if fault == "stall":  # not even the request's body is read
            self._wait_for_the_client()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "reset":
            self._hang_up()
        elif fault in ANSWERS:
            status, code = ANSWERS[fault]
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>{fault}</Message></Error>".encode() if code else b"")
        elif fault in OF_KEYS:
            said = f"<Error><Key>k</Key><Code>{OF_KEYS[fault]}</Code><Message>{fault}</Message></Error>"
            self._answer(200, {}, f"<DeleteResult>{said}</DeleteResult>".encode())
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
        if fault == "trickle":
            self.close_connection, self.wfile = True, _Trickle(self.connection, self.server.closing)
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
            self.server.answered_bytes += len(body)
            self.wfile.write(body)

    def _wait_for_the_client(self) -> None:
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        while not self.server.closing.is_set() and not poll.poll(100):
            pass
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


class _Trickle(io.BufferedIOBase):
    """Sends what is written a byte at a time, until the client or the proxy has enough of it."""

    def __init__(self, connection: socket.socket, closing: threading.Event) -> None:
        self._connection = connection
        self._closing = closing

    def write(self, data: Any) -> int:
        with suppress(OSError):
            for position in range(len(data)):
                if self._closing.wait(TRICKLE_SECONDS):
                    break
                self._connection.sendall(data[position : position + 1])
        return len(data)
