"""Credentials that are wrong, missing, or those of the machine."""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from embedding.corpus.storage import open_storage
from embedding.errors import AccessError
from tests.corpus.test_storage_faults import CALLS, expect_refusal
from tests.support.s3_server import S3Server
from tests.support.serving import serving


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.usefixtures("fresh_clients")
def test_wrong_credentials(variable: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "planted-secret")
    for call in ("put", "put_if_absent", "read", "list", "exists", "delete"):
        said = expect_refusal(AccessError, "", CALLS[call], open_storage("s3://tests/out"))
        assert "is not allowed: " in said
        assert said.endswith("; check the credentials and permissions of this process")
        assert not any(secret in said for secret in ("planted-secret", s3.key, s3.secret))


@pytest.mark.usefixtures("fresh_clients")
def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    said = expect_refusal(AccessError, "writing s3://tests/out/a is not possible: ", CALLS["put"], open_storage("s3://tests/out"))
    assert "Unable to locate credentials; check the URL and the credentials" in said


class _Metadata(BaseHTTPRequestHandler):
    """An instance's metadata service, which is too busy at first."""

    busy = 3
    credentials: ClassVar[dict[str, str]] = {}

    def _answer(self) -> None:
        said = json.dumps(self.credentials) if self.path.endswith("/role") else "role"
        if type(self).busy:
            type(self).busy -= 1
            self.send_response_only(503)
        else:
            self.send_response_only(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    do_GET = do_PUT = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """The tests' output stays clean."""


@pytest.mark.usefixtures("fresh_clients")
def test_an_instance_that_is_slow_to_tell_its_credentials_is_asked_again(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = s3.environment()
    _Metadata.credentials = {
        "Code": "Success",
        "AccessKeyId": environment["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": environment["AWS_SECRET_ACCESS_KEY"],
        "Token": "",
        "Expiration": "2100-01-01T00:00:00Z",
    }
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    with serving(server := HTTPServer(("127.0.0.1", 0), _Metadata)):
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        storage = open_storage(s3.folder())
        storage.put("a", b"data")
        assert storage.read("a") == b"data"
    assert _Metadata.busy == 0
