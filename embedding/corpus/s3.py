"""The client of S3: how long a request may take, its other options, and what it raises.

Imported where S3 is asked or an error is looked at: a process that reads and writes a local disk need not spend the time.
"""

from __future__ import annotations

import os
import re
from typing import Any, Final

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, MetadataRetrievalError
from botocore.exceptions import ConnectionError as EndpointError
from botocore.parsers import ResponseParserError

_TRIES_OF_A_REQUEST = 3
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 30
"""Without a byte from the store for so long, a request is given up and tried again."""
_ANSWERS_PER_REQUEST = 4
_BYTES_PER_ANSWER = 2**23
"""A whole request may take four times as long, and once more for each 8 MiB that it carries: a trickle ends too."""

NETWORK_ERRORS: Final = (EndpointError, HTTPClientError, aiohttp.ClientError, MetadataRetrievalError, ResponseParserError, TimeoutError)
"""What also the clients of other stores raise where an answer does not come, or does not come whole."""
REFUSED: Final = ClientError
"""The store's own errors, by code."""
NOT_ASKED: Final = BotoCoreError
"""Where no request was sent: credentials, region, profile, bucket name."""


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


def code_of(error: BaseException) -> str:
    """The S3 error code behind what s3fs raised, such as PreconditionFailed (HTTP 412)."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    return str(cause.response["Error"]["Code"]) if isinstance(cause, ClientError) else ""
