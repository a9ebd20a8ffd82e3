"""Where a model's files come from on many machines: copied once for each, whole or not at all, and the same model wherever they lie."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from embedding.config import JobConfig
from embedding.errors import AccessError, ConfigError, ModelError, ModelUnreachableError
from embedding.model.source import ModelFiles, ModelSource
from embedding.model.spec import ModelSpec, check_files
from embedding.names import DEFAULT_MODEL
from embedding.run.models import _is_wanted, cache_folder, find_model, model_folder
from tests.model.tiny import save_model, spec_of
from tests.run.here import embed_here, prove_here
from tests.support import corpora, outputs
from tests.support.faulty_proxy import faulty_proxy
from tests.support.hub import COMMIT, Hub, hub
from tests.support.job import run_job
from tests.support.s3_server import S3Server
from tests.support.waiting import wait_until

NAME = "someone/tiny"
PROCESSES = 3
DOWNLOAD = f"""
import sys
from pathlib import Path
from embedding.model.source import ModelSource
Path(sys.argv[1]).touch()
print(ModelSource("hub", "{NAME}", "{COMMIT}").folder(["model.safetensors"]))
"""
COPY = """
import pickle, sys
from pathlib import Path
from embedding.run.models import model_folder
spec = pickle.loads(Path(sys.argv[2]).read_bytes())
Path(sys.argv[1]).touch()
print(model_folder(spec))
"""
"""Both are what a worker does before it loads its model."""
RESOLVE = """
import pickle, sys
from pathlib import Path
from embedding.config import JobConfig
from embedding.run.models import find_model
spec = find_model(JobConfig(input=("x",), output="x", model=sys.argv[1]), precision="fp32")
Path(sys.argv[2]).write_bytes(pickle.dumps(spec))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what a training leaves beside a model."""
    folder = save_model(tmp_path_factory.mktemp("model"), "bert")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"of another day")
    (folder / "optimizer.pt").write_bytes(b"large")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def upload(folder: Path, url: str) -> str:
    return corpora.Corpus(
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}, []
    ).write(url)


def at(url: str, **options: str) -> ModelSpec:
    return find_model(JobConfig.build(input=("x",), output="x", model=url, **options), precision="fp32")


class Processes:
    """Some that each want the same model on this machine, at the same moment."""

    def __init__(self, program: str, *arguments: str, folder: Path, env: dict[str, str]) -> None:
        self._ready = [folder / f"ready-{number}" for number in range(PROCESSES)]
        command = [sys.executable, "-c", program]
        variables = {**os.environ, **env}
        self._running = [
            subprocess.Popen([*command, str(ready), *arguments], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for ready in self._ready
        ]

    def wait_until_all_want_it(self) -> None:
        wait_until(lambda: all(ready.exists() for ready in self._ready), what="every process to want the model")

    def folders(self) -> set[str]:
        answers = [process.communicate(timeout=120) for process in self._running]
        assert [process.returncode for process in self._running] == [0] * PROCESSES, answers
        return {stdout.strip() for stdout, _ in answers}


@pytest.fixture
def server(model: Path) -> Iterator[Hub]:
    with hub(NAME, model) as started:
        yield started


def asking(endpoint: str, tmp_path: Path) -> dict[str, str]:
    """Variables of a process that asks a hub: its library gives up after 10 s, in which a loaded machine starts no three others."""
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "120", "HF_HUB_ETAG_TIMEOUT": "120"}
    return {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **patience}


@pytest.fixture
def hub_environment(server: Hub, tmp_path: Path) -> dict[str, str]:
    return asking(server.endpoint, tmp_path)


def test_one_process_of_a_machine_downloads_a_hub_model(server: Hub, hub_environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    found = tmp_path / "spec"
    server.refusals.extend([503, 429])
    subprocess.run([sys.executable, "-c", RESOLVE, NAME, str(found)], env={**os.environ, **hub_environment}, check=True, timeout=120)
    spec: ModelSpec = pickle.loads(found.read_bytes())
    assert spec.source == ModelSource("hub", NAME, COMMIT)
    assert spec.fingerprint_fields() == spec_of(model).fingerprint_fields()
    assert server.downloads()["model.safetensors"] == 0  # its digest is the hub's

    server.requests.clear()
    server.refusals.append(429)
    another = {**hub_environment, "HF_HOME": str(tmp_path / "another machine")}
    processes = Processes(DOWNLOAD, folder=tmp_path, env=another)
    server.before_download = lambda _: processes.wait_until_all_want_it()
    [folder] = processes.folders()

    assert set(server.downloads().values()) == {1}
    assert server.downloads()["model.safetensors"] == 1
    assert len([path for path in server.requests if "/api/models/" in path]) == 2  # a refusal and an answer
    check_files(spec, ModelFiles(Path(folder)))
    assert not Path(folder, "checkpoint-5").exists()


def test_the_cache_stands_in_for_a_hub_that_is_not_reached(model: Path, tmp_path: Path) -> None:
    """A connection that fails is no OSError of the hub's library, and a commit alone is not found again by its branch,
    nor a model of which not every file was wanted."""
    online, offline = tmp_path / "online", tmp_path / "offline"
    with hub(NAME, model) as server:
        environment = {**os.environ, **asking(server.endpoint, tmp_path)}
        resolve = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=120)
        resolve([sys.executable, "-c", RESOLVE, NAME, str(online)], check=True)
        resolve([sys.executable, "-c", DOWNLOAD, str(tmp_path / "ready")], check=True)
    resolve([sys.executable, "-c", RESOLVE, NAME, str(offline)], check=True)
    assert pickle.loads(offline.read_bytes()) == pickle.loads(online.read_bytes())


@pytest.mark.parametrize(
    ("answer", "code", "sentence"),
    [
        (None, 1, "Connection refused); check the path and the network, then run the same command again"),
        (404, 2, "is neither a folder nor a model that the hub shows you; check the spelling"),
        (403, 2, "is neither a folder nor a model in the hub's cache, and the hub refuses it ("),
        ("offline", 2, "HF_HUB_OFFLINE forbids asking the hub; check the spelling, or unset that variable"),
    ],
)
def test_only_a_hub_that_does_not_answer_is_worth_another_try(
    answer: int | str | None, code: int, sentence: str, model: Path, tmp_path: Path
) -> None:
    source = corpora.plain(rows=2, files=1).write(tmp_path / "in")
    with hub("someone/other" if answer == 403 else NAME, model) as server:
        server.refusals.extend([403] * (answer == 403))
        environment = asking("http://127.0.0.1:1" if answer is None else server.endpoint, tmp_path)
        environment |= {"HF_HUB_OFFLINE": str(int(answer == "offline")), "RAY_ADDRESS": ""}
        named = ["--input", source, "--output", str(tmp_path / "out"), "--model", "someone/other"]
        done = run_job(*named, "--dry-run", env=environment, check=code)
    assert "error: --model=someone/other is neither a folder nor a model " in done.stderr
    assert sentence in done.stderr


def test_one_process_of_a_machine_copies_a_model_at_a_url(s3: S3Server, model: Path, cache: Path, tmp_path: Path) -> None:
    url = upload(model, f"{s3.folder()}/tiny")
    (tmp_path / "spec").write_bytes(pickle.dumps(at(url)))
    with faulty_proxy(s3.endpoint) as proxy:
        another = {"AWS_ENDPOINT_URL": proxy.endpoint, "EMBED_CACHE": str(tmp_path / "another machine")}
        processes = Processes(COPY, str(tmp_path / "spec"), folder=tmp_path, env=another)

        def hold(when: str, method: str, path: str) -> None:
            if (when, method) == ("before", "GET") and path.endswith("safetensors"):
                processes.wait_until_all_want_it()

        proxy.watchers.append(hold)
        [folder] = processes.folders()
        assert len([path for path in proxy.requests if path.startswith("GET") and path.endswith("model.safetensors")]) == 1
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in Path(folder).parent.iterdir()) == [Path(folder).name, f"{Path(folder).name}.lock"]
    assert folder == str(tmp_path / "another machine" / "models" / Path(folder).name)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(folder).name]


def test_the_same_model_elsewhere_goes_on_with_the_output(s3: S3Server, model: Path, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=20, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    url = upload(model, f"{s3.folder()}/tiny")
    assert at(url).fingerprint_fields() == spec_of(model).fingerprint_fields()
    embed_here(source, output, url)
    assert outputs.document(output, "_control/job.json")["asked"]["model"] == url
    assert prove_here(output).status == "proved"
    assert embed_here(source, output, model) == []  # there is nothing left to do
    assert at(f"file://{model}").source == ModelSource("folder", str(model))


def test_a_changed_model_is_not_mixed_with_the_copy(s3: S3Server, model: Path, tmp_path: Path) -> None:
    url = upload(model, f"{s3.folder()}/tiny")
    spec = at(url)
    first = model_folder(spec)
    assert model_folder(spec) == first
    other = save_model(tmp_path / "other", "electra")
    upload(other, url)
    second = model_folder(spec)
    assert second != first
    with pytest.raises(ModelError, match="on this machine differs from what the job was planned with"):
        check_files(spec, ModelFiles(second))


def test_modules_of_a_model_at_a_url_are_copied_too(s3: S3Server, packaged_model: Path) -> None:
    url = upload(packaged_model, f"{s3.folder()}/minilm")
    spec = at(url)
    here = at(DEFAULT_MODEL)
    assert spec.fingerprint_fields() == here.fingerprint_fields()
    assert (model_folder(spec) / "1_Pooling" / "config.json").is_file()


def test_what_a_died_process_left_is_removed(s3: S3Server, model: Path, cache: Path) -> None:
    url = upload(model, f"{s3.folder()}/tiny")
    folder = model_folder(at(url))
    left = folder.rename(folder.with_name(f"{folder.name}.0000.tmp"))
    (left / "model.safetensors").write_bytes(b"half of")
    assert model_folder(at(url)) == folder
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_model_at_a_url_that_cannot_be_had(s3: S3Server, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(model, f"{s3.folder()}/tiny")
    with pytest.raises(ModelError, match="--revision=main needs a hub id"):
        at(url, revision="main")
    with pytest.raises(ModelError, match="has no files; check the spelling"):
        at(f"{url}-not-there")
    with pytest.raises(ConfigError, match="cannot be opened"):
        at("nonsense://bucket/model")
    spec = at(url)
    S3FileSystem.clear_instance_cache()  # which know their credentials
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessError):
        at(url)
    with pytest.raises(ModelUnreachableError, match=r"cannot be copied to this machine: .* is not allowed") as caught:
        model_folder(spec)
    assert caught.value.exit_code == 1
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["../config.json", "a/../../config.json", "checkpoint-5/model.safetensors", "pytorch_model.bin"])
def test_what_does_not_belong_to_a_model_is_not_copied(name: str) -> None:
    folders = {"", "..", "a/../..", "1_Pooling"}
    assert not _is_wanted(name, folders)
    assert _is_wanted("config.json", folders)
    assert _is_wanted("1_Pooling/model.safetensors", folders)


def test_a_cache_that_takes_nothing(s3: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(model, f"{s3.folder()}/tiny")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBED_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be copied to .* set EMBED_CACHE to a folder with room for it"):
        at(url)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["EMBED_CACHE"], "models")
    monkeypatch.delenv("EMBED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/embed-corpus/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "embed-corpus" / "models"
