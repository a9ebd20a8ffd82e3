"""Requests to stores: how long one may take, what is retried and for how long, and what the error says when retrying did not help.

Two layers try again, both by libraries with jittered waits. botocore repeats a single request to S3, so that page 700 of a listing
does not cost the 699 before it; tenacity repeats what the job asked for, on every kind of store. s3fs' own tries are off: all
three would multiply.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, MetadataRetrievalError
from botocore.exceptions import ConnectionError as EndpointError
from botocore.parsers import ResponseParserError
from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    stop_when_event_set,
    wait_random_exponential,
)

from embedding.corpus import ending
from embedding.errors import AccessError, ConfigError, StorageError, StorageFullError

log = logging.getLogger(__name__)
T = TypeVar("T")

_PATIENCE_SECONDS = "60"
_WAIT = wait_random_exponential(multiplier=0.25, max=10)
"""Seconds between tries, jittered so that many workers do not come back at once."""
_TRIES_OF_A_REQUEST = 3
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 30
"""Without a byte from the store for so long, a request is given up and tried again."""
_ANSWERS_PER_REQUEST = 4
_BYTES_PER_ANSWER = 2**23
"""A whole request may take four times as long, and once more for each 8 MiB that it carries: a trickle ends too."""

WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""There is no such file, folder or bucket, or a file where a folder must be."""
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PERMANENT_ERRNOS = _FULL_ERRNOS | {errno.EINVAL, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE}
_EXPIRED_WITHOUT_A_WORD = "400"
"""Answers to HEAD have no body and so no error code; S3 gives this one for a token that has expired."""
_DAMAGED_ON_THE_WAY = frozenset({"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})
_NETWORK_TYPES = (EndpointError, HTTPClientError, aiohttp.ClientError, MetadataRetrievalError, ResponseParserError, TimeoutError)


class _Session(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore ships no types
    """aiobotocore's, but bounds whole requests, bodies in both directions included."""

    def _get_request_timeout(self, request: Any) -> aiohttp.ClientTimeout:
        of_parts = super()._get_request_timeout(request) or self._timeout
        first, last = map(int, re.findall(r"\d+", str(request.headers.get("Range", ""))) or (1, 0))
        size = int(request.headers.get("Content-Length", 0)) + last - first + 1
        whole = of_parts.sock_read * (_ANSWERS_PER_REQUEST + size / _BYTES_PER_ANSWER)
        return aiohttp.ClientTimeout(total=whole, sock_connect=of_parts.sock_connect, sock_read=of_parts.sock_read)


def client_options(configured: dict[str, Any]) -> dict[str, Any]:
    """Options of an S3 client; `configured` (from FSSPEC_S3) wins."""
    # An instance's credentials are asked for once by botocore, and by every process of a fleet: one busy answer would end the run.
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "5")
    return {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _ANSWER_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": _TRIES_OF_A_REQUEST},
        "http_session_cls": _Session,
        **configured,
    }


def is_transient(error: BaseException) -> bool:
    """Whether trying the same request again can help: throttling, time-outs, resets, server errors, or a StorageError about them."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    if isinstance(error, (*WRONG_PATH, PermissionError)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS or error_code(error) in _DAMAGED_ON_THE_WAY
    return isinstance(error, _NETWORK_TYPES)


def patience() -> float:
    """Seconds for which a store that fails is tried again, and once more where the first try alone took longer.

    Raises:
        ConfigError: EMBED_STORE_SECONDS is no number.
    """
    text = os.environ.get("EMBED_STORE_SECONDS", _PATIENCE_SECONDS)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"EMBED_STORE_SECONDS={text} is not a number of seconds; unset it, or set it to a number such as 60") from None


def with_retries(action: Callable[[], T]) -> T:
    """The result of `action`, tried again with jittered exponential waits while its error is transient and patience lasts."""
    if ending.asked.is_set():
        return _in_time(action)
    retrying = Retrying(
        stop=stop_all(stop_after_attempt(2), stop_after_delay(patience())) | stop_when_event_set(ending.asked),
        wait=_WAIT,
        sleep=sleep_using_event(ending.asked),
        retry=retry_if_exception(is_transient),
        before_sleep=before_sleep_log(log, logging.DEBUG),
        reraise=True,
    )
    return retrying(action)


def _in_time(action: Callable[[], T]) -> T:
    """The result of `action` where it comes before this process has to end; left alone in its thread where it does not."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:  # noqa: BLE001  (raised where the answer is waited for)
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(ending.seconds_left())
    except TimeoutError as error:
        raise TimeoutError("no answer before this process had to end") from error


def error_code(error: BaseException) -> str:
    """The S3 error code behind what s3fs raised, such as PreconditionFailed (HTTP 412)."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    return str(cause.response["Error"]["Code"]) if isinstance(cause, ClientError) else ""


def is_of_store(error: Exception) -> bool:
    """Whether a store raised it while Arrow read a file; Arrow's own input errors are plain OSErrors without a number."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turns what a store raises into one sentence that begins with `doing`.

    Raises:
        ConfigError: there is no such place: running again as is will not help.
        AccessError: access is denied, or credentials are missing.
        StorageFullError: no room is left.
        StorageError: anything else.
    """
    try:
        yield
    except WRONG_PATH as error:
        raise ConfigError(f"{doing} failed: {error}; check the path") from error
    except (OSError, ClientError, *_NETWORK_TYPES) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, PermissionError) or number == errno.EROFS or error_code(error) == _EXPIRED_WITHOUT_A_WORD:
            raise AccessError(f"{doing} is not allowed: {what}; check the credentials and permissions of this process") from error
        if number in _FULL_ERRNOS:
            raise StorageFullError(f"{doing} failed: {what}; free some space, then run the same command again to resume") from error
        raise StorageError(f"{doing} failed: {what}; run the same command again to resume") from error
    except BotoCoreError as error:  # no request was sent: credentials, region, profile, bucket name
        raise AccessError(f"{doing} is not possible: {' '.join(str(error).split())}; check the URL and the credentials") from error
