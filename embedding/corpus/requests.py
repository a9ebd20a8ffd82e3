"""Requests to stores: what is tried again and for how long, and what the error says when that did not help.

Two layers try again, both by libraries with jittered waits. botocore repeats a single request to S3, so that page 700 of a listing
does not cost the 699 before it; tenacity repeats what the job asked for, on every kind of store. s3fs' own tries are off: all
three would multiply.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

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
from embedding.errors import AccessError, ConfigError, EmbeddingJobError, StorageError, StorageFullError

log = logging.getLogger(__name__)
T = TypeVar("T")

_PATIENCE_SECONDS = "60"
_WAIT = wait_random_exponential(multiplier=0.25, max=10)
"""Seconds between tries, jittered so that many workers do not come back at once."""

WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""There is no such file, folder or bucket, or a file where a folder must be."""
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PERMANENT_ERRNOS = _FULL_ERRNOS | {errno.EINVAL, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE}
_EXPIRED_WITHOUT_A_WORD = "400"
"""Answers to HEAD have no body and so no error code; S3 gives this one for a token that has expired."""
_DAMAGED_ON_THE_WAY = frozenset({"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})


def is_transient(error: BaseException) -> bool:
    """Whether trying the same request again can help: throttling, time-outs, resets, server errors, or a StorageError about them."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    if not isinstance(error, Exception) or isinstance(error, (*WRONG_PATH, PermissionError, EmbeddingJobError)):
        return False
    from embedding.corpus import s3

    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS or s3.code_of(error) in _DAMAGED_ON_THE_WAY
    return isinstance(error, s3.NETWORK_ERRORS)


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
    except Exception as error:
        if (told := _told(doing, error)) is None:
            raise
        raise told from error


def _told(doing: str, error: Exception) -> EmbeddingJobError | None:
    """What to say of an error that a store raised; None for any other."""
    if isinstance(error, EmbeddingJobError):
        return None
    if isinstance(error, WRONG_PATH):
        return ConfigError(f"{doing} failed: {error}; check the path")
    from embedding.corpus import s3

    what = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (OSError, s3.REFUSED, *s3.NETWORK_ERRORS)):
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, PermissionError) or number == errno.EROFS or s3.code_of(error) == _EXPIRED_WITHOUT_A_WORD:
            return AccessError(f"{doing} is not allowed: {what}; check the credentials and permissions of this process")
        if number in _FULL_ERRNOS:
            return StorageFullError(f"{doing} failed: {what}; free some space, then run the same command again to resume")
        return StorageError(f"{doing} failed: {what}; run the same command again to resume")
    if isinstance(error, s3.NOT_ASKED):
        return AccessError(f"{doing} is not possible: {what}; check the URL and the credentials")
    return None
