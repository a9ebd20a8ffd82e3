"""What goes wrong with a store is tried again where that can help, and else told in one sentence of the right kind."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import botocore.exceptions
import pytest
from s3fs.errors import translate_boto_error

from embedding.corpus.reader import Columns, read_layout, read_unit
from embedding.corpus.requests import explained, is_transient, with_retries
from embedding.corpus.sources import require_unchanged
from embedding.corpus.storage import Storage, open_storage
from embedding.errors import AccessError, ConfigError, EmbeddingJobError, StorageError, StorageFullError
from tests.corpus.reading import put_source, whole
from tests.support.corpora import plain
from tests.support.faulty_proxy import FaultyProxy
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("no_waiting")
CALLS: dict[str, Callable[[Storage], Any]] = {
    "put": lambda storage: storage.put("a", b"data"),
    "put_if_absent": lambda storage: storage.put_if_absent("new", b"data"),
    "put_if_version": lambda storage: storage.put_if_version("a", b"data", '"version"'),
    "read": lambda storage: storage.read("a"),
    "read_version": lambda storage: storage.read_version("a"),
    "list": lambda storage: storage.list("data"),
    "exists": lambda storage: storage.exists("a"),
    "delete": lambda storage: storage.delete(["a"]),
    "open": lambda storage: storage.open("a").read(),
}
WRITES = ("put", "put_if_absent", "delete")


@pytest.fixture
def storage(s3: S3Server, proxy: FaultyProxy) -> Storage:
    """A folder behind the proxy, with the object `a` in it."""
    storage = open_storage(s3.folder())
    storage.put("a", b"old")
    proxy.requests.clear()
    return storage


def expect_refusal(kind: type[EmbeddingJobError], begins: str, call: Callable[[Storage], Any], storage: Storage) -> str:
    with pytest.raises(EmbeddingJobError) as refused:
        call(storage)
    assert type(refused.value) is kind
    assert str(refused.value).startswith(begins)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("fault", ["slow down", "internal error", "reset"])
def test_a_passing_fault_is_not_seen(fault: str, storage: Storage, proxy: FaultyProxy) -> None:
    for call in CALLS.values():
        proxy.faults.extend([fault, fault])
        call(storage)
        assert not proxy.faults
        storage.put("a", b"old")


def test_a_lost_reply_is_no_lost_put(storage: Storage, proxy: FaultyProxy) -> None:
    for call, name in (("put", "a"), ("put_if_absent", "new")):
        proxy.requests.clear()
        proxy.faults.append("lose reply")
        assert CALLS[call](storage) in (None, True)
        assert storage.read(name) == b"data"
        assert proxy.requests[0] == proxy.requests[1]


def test_a_lost_reply_is_no_lost_takeover(storage: Storage, proxy: FaultyProxy) -> None:
    seen = storage.read_version("a")
    assert seen is not None
    proxy.faults.append("lose reply")
    assert storage.put_if_version("a", b"mine", seen[1])
    assert storage.read("a") == b"mine"
    assert not storage.put_if_version("a", b"another", seen[1])


def test_a_conflict_is_tried_again(storage: Storage, proxy: FaultyProxy) -> None:
    proxy.faults.append("conflict")
    assert storage.put_if_absent("new", b"data")
    assert len(proxy.requests) == 2


def test_half_a_body_is_no_body(storage: Storage, proxy: FaultyProxy) -> None:
    storage.put("large", bytes(range(256)) * 4000)
    proxy.faults.append("truncate")
    assert storage.read("large") == bytes(range(256)) * 4000
    assert not proxy.faults


def test_a_fault_that_stays_is_told_when_the_tries_are_spent(storage: Storage, proxy: FaultyProxy) -> None:
    proxy.faults.extend(["internal error"] * 100)
    said = expect_refusal(StorageError, f"writing {storage.url}/a failed: ", CALLS["put"], storage)
    assert said.endswith("; run the same command again to resume")
    assert 4 <= len(proxy.requests) < 100


@pytest.mark.parametrize("fault", ["denied", "expired"])
def test_a_refusal_is_not_tried_again(fault: str, storage: Storage, proxy: FaultyProxy) -> None:
    proxy.faults.extend([fault] * 100)
    for number, call in enumerate(WRITES):
        said = expect_refusal(AccessError, "deleting " if call == "delete" else "writing ", CALLS[call], storage)
        assert f"is not allowed: {fault}; check the credentials and permissions of this process" in said
        assert len(proxy.requests) == number + 1


def test_an_object_that_cannot_be_deleted_is_told_though_the_request_succeeds(storage: Storage, proxy: FaultyProxy) -> None:
    proxy.faults.extend(["busy key", "busy key", "missing key"])
    storage.delete(["a", "b"])
    assert storage.exists("a")
    proxy.faults.append("denied key")
    said = expect_refusal(AccessError, "deleting ", CALLS["delete"], storage)
    assert "/k: denied key; check the credentials and permissions" in said
    storage.delete(["a", "b"])
    assert not storage.exists("a")


def test_many_objects_are_deleted_in_requests_of_a_thousand(storage: Storage, proxy: FaultyProxy) -> None:
    storage.delete([*(f"{number}" for number in range(1001)), "a"])
    assert len(proxy.requests) == 2
    assert not storage.exists("a")


def test_a_token_that_expired_is_no_access_also_where_the_answer_has_no_body(s3: S3Server, proxy: FaultyProxy) -> None:
    source = put_source(s3.folder(), b"data")
    proxy.requests.clear()
    proxy.kinds, proxy.always = frozenset({"HEAD"}), "expired"
    with pytest.raises(AccessError, match=rf"^checking {source.uri} is not allowed: .*Bad Request; check the credentials"):
        require_unchanged(source)
    assert proxy.requests


def test_a_look_whether_one_may_write_leaves_nothing(storage: Storage, proxy: FaultyProxy) -> None:
    def look(where: Storage) -> None:
        where.require_writable("probe")

    look(storage)
    assert {request.split()[0] for request in proxy.requests} <= {"PUT", "GET", "HEAD"}
    proxy.faults.extend(["", "claim success"])  # of a store that ignores the condition
    look(storage)
    assert proxy.requests[-1].split()[0] in ("DELETE", "POST")
    assert storage.list("").keys() == {"a"}
    proxy.faults.extend(["", "denied"])  # the bucket is asked for first
    expect_refusal(AccessError, f"writing {storage.url} is not allowed: ", look, storage)
    nowhere = open_storage("s3://no-such-bucket/out")
    expect_refusal(ConfigError, "writing s3://no-such-bucket/out failed: there is no bucket", look, nowhere)


@pytest.mark.parametrize("fault", ["reset", "truncate", "slow down", "internal error"])
def test_a_source_is_read_through_faults_at_any_request(fault: str, s3: S3Server, proxy: FaultyProxy) -> None:
    corpus, columns = plain(rows=20, files=1), Columns("text")
    source = put_source(s3.folder(), corpus.files["part-0.parquet"])
    proxy.requests.clear()
    read_layout(source, columns)
    read_unit(whole(source, 20), columns)
    for position in range(len(proxy.requests)):
        proxy.faults.extend([""] * position + [fault] * 2)
        assert read_layout(source, columns).num_rows == 20
        assert read_unit(whole(source, 20), columns).text.to_pylist() == [row["text"] for row in corpus.rows]
        proxy.faults.clear()


def test_a_source_whose_store_fails_is_not_called_damaged(s3: S3Server, proxy: FaultyProxy) -> None:
    source = put_source(s3.folder(), plain(rows=20, files=1).files["part-0.parquet"])
    proxy.faults.extend([""] * 4 + ["internal error"] * 200)
    for read in (lambda: read_unit(whole(source, 20), Columns("text")), lambda: read_layout(source, Columns("text"))):
        with pytest.raises(StorageError, match=rf"ing {source.uri} failed: .*; run the same command again to resume$"):
            read()


@pytest.mark.usefixtures("fresh_clients")
def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for call in CALLS.values():
        said = expect_refusal(StorageError, "", call, open_storage("s3://tests/out"))
        assert f'failed: Could not connect to the endpoint URL: "{endpoint}' in said


@pytest.mark.parametrize("call", ["put", "put_if_absent", "list", "delete"])
@pytest.mark.usefixtures("s3")
def test_a_missing_bucket(call: str) -> None:
    said = expect_refusal(ConfigError, "", CALLS[call], open_storage("s3://no-such-bucket/out"))
    assert "s3://no-such-bucket/out" in said
    assert said.endswith("failed: The specified bucket does not exist; check the path")


@pytest.mark.parametrize("url", ["s3://", "s3://not a bucket/out", "gopher://host/out"])
@pytest.mark.usefixtures("s3")
def test_an_impossible_url(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_storage(url).put("a", b"")
    assert url.rstrip("/") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("call", WRITES)
@pytest.mark.usefixtures("unprivileged")
def test_a_folder_that_may_not_be_written(call: str) -> None:
    with TemporaryDirectory() as folder:  # tmp_path is root's own
        Path(folder, "a").write_bytes(b"old")
        Path(folder).chmod(0o555)
        said = expect_refusal(AccessError, "", CALLS[call], open_storage(folder, temporary_folder="_control/tmp"))
        assert "is not allowed: [Errno 13] Permission denied" in said
        look = open_storage(f"{folder}/new/out")
        expect_refusal(AccessError, f"writing {folder}/new/out is not allowed: ", lambda storage: storage.require_writable("probe"), look)
        Path(folder).chmod(0o755)
        look.require_writable("probe")
        with pytest.raises(ConfigError, match=r"/a failed: .*/a is not a folder; check the path"):
            open_storage(f"{folder}/a").require_writable("probe")
        assert [path.name for path in Path(folder).iterdir()] == ["a"]


@pytest.mark.usefixtures("unprivileged")
def test_a_folder_that_may_not_be_read() -> None:
    with TemporaryDirectory() as folder:
        locked = Path(folder, "data", "locked")
        locked.mkdir(parents=True, mode=0)
        expect_refusal(AccessError, f"listing {folder}/data is not allowed: ", CALLS["list"], open_storage(folder))


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    said = expect_refusal(ConfigError, f"writing {tmp_path}/out/a failed: ", CALLS["put"], open_storage(str(tmp_path / "out")))
    assert said.endswith("; check the path")


def test_a_value_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path), temporary_folder="_control/tmp")
    storage.put("data/a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for put in (storage.put, storage.put_if_absent):
            with pytest.raises(StorageError, match=r"writing .*/data/a failed: .*File too large"):
                put("data/a", b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.list("") == {"data/a": 3}


def of_s3(code: str) -> OSError:
    """What s3fs makes of an error answer."""
    answer = botocore.exceptions.ClientError({"Error": {"Code": code, "Message": code}}, "PutObject")
    error: OSError = translate_boto_error(answer)
    return error


def told_of(cause: Exception) -> StorageError:
    error = StorageError("reading a failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.EBUSY, "Please reduce your request rate."), True),
        (OSError(errno.EIO, "input/output error"), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"), True),
        (botocore.exceptions.ConnectTimeoutError(endpoint_url="http://s3"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3"), True),
        (aiohttp.ClientPayloadError("Response payload is not completed"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold"), False),
        (of_s3("IncompleteBody"), True),
        (of_s3("XAmzContentSHA256Mismatch"), True),
        (of_s3("TooManyRequests"), True),
        (of_s3("InvalidArgument"), False),
        (of_s3("ExpiredToken"), False),
        (PermissionError("Access Denied"), False),
        (FileNotFoundError("The specified bucket does not exist"), False),
        (FileExistsError(), False),
        (NotADirectoryError(), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (botocore.exceptions.ParamValidationError(report="Invalid bucket name"), False),
        (told_of(TimeoutError()), True),
        (told_of(OSError(errno.ENOSPC, "No space left on device")), False),
        (StorageError("not about a request"), False),
        (ValueError("a mistake of ours"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_what_is_worth_another_try(error: BaseException, transient: bool) -> None:
    assert is_transient(error) is transient
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        with_retries(attempt)
    assert len(tries) == (4 if transient else 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), AccessError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StorageFullError),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), StorageFullError),
        (botocore.exceptions.ProfileNotFound(profile="nobody"), ConfigError),
        (botocore.exceptions.CredentialRetrievalError(provider="sso", error_msg="expired\ntwice"), ConfigError),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"), StorageError),
        (aiohttp.ClientPayloadError("Response payload is not completed"), StorageError),
        (TimeoutError(), StorageError),
    ],
    ids=repr,
)
def test_errors_are_told_in_one_sentence(error: Exception, kind: type[EmbeddingJobError]) -> None:
    with pytest.raises(kind) as refused, explained("writing a"):
        raise error
    assert str(refused.value).startswith("writing a ")
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is error


def test_mistakes_of_ours_are_not_explained_away() -> None:
    with pytest.raises(KeyError), explained("writing a"):
        raise KeyError("a mistake of ours")
