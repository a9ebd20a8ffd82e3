"""What a hostile model or corpus cannot do, and where a secret is not found: all proved on real runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from safetensors.numpy import save_file

from embedding import JobConfig
from embedding.corpus.plan import make_unit
from embedding.corpus.sources import Source
from embedding.errors import ConfigError, CorpusError, ModelError
from embedding.run.cli import run
from embedding.run.proof.config import VerifyConfig
from embedding.run.proof.verify import verify_corpus
from tests.model.tiny import WIDTH, save_model, write_json
from tests.run.conftest import Embed
from tests.run.here import embed_here, prove_here
from tests.support import corpora, outputs
from tests.support.damage import hidden_text
from tests.support.job import REPOSITORY, run_job
from tests.support.ray_cluster import RayCluster
from tests.support.s3_server import S3Server


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"), "bert")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def source(tmp_path: Path) -> str:
    return corpora.plain(rows=3, files=1).write(tmp_path / "in")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What planted code makes when it runs."""
    return tmp_path / "planted-code-ran"


def test_the_bomb_goes_off(trace: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


def test_pickles_beside_safetensors_are_not_loaded(model: Path, source: str, trace: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.pkl", "1_Pooling/pytorch_model.bin"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(pickle.dumps(Bomb(trace)))
    embed_here(source, str(tmp_path / "out"), model)
    assert not trace.exists()
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin only"):
        embed_here(source, str(tmp_path / "other"), model)
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["bert", "invented"])
def test_code_of_a_model_folder_is_not_run_unless_it_is_trusted(
    model_type: str, model: Path, source: str, trace: Path, tmp_path: Path
) -> None:
    code = f"import os\nos.mkdir({str(trace)!r})\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (model / f"{name}.py").write_text(code)
    classes = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own", "AutoTokenizer": ["tokenization_own.Own", None]}
    for name in ("config.json", "tokenizer_config.json"):
        write_json(model / name, json.loads((model / name).read_text()) | {"auto_map": classes})
    write_json(model / "config.json", json.loads((model / "config.json").read_text()) | {"model_type": model_type})
    if model_type == "bert":
        embed_here(source, str(tmp_path / "out"), model)
    else:
        with pytest.raises(ModelError, match="a model that brings its own code needs --trust-remote-code"):
            embed_here(source, str(tmp_path / "out"), model)
    assert not trace.exists()
    with pytest.raises((ModelError, AttributeError)):  # the planted module has no such class, but it was run
        embed_here(source, str(tmp_path / "trusted"), model, trust_remote_code=True)
    assert trace.exists()


def outside(tmp_path: Path, output: str) -> dict[str, bytes]:
    """Every file but the output's."""
    return {name: data for name, data in outputs.files(str(tmp_path)).items() if not name.startswith(f"{output}/")}


@pytest.mark.parametrize("way", ["../outside", "2_Dense/../../outside", "{outside}"])
def test_a_model_folder_names_no_file_outside_itself(way: str, model: Path, source: str, tmp_path: Path) -> None:
    place = tmp_path / "outside"
    path = way.format(outside=place)
    (model / "2_Dense").mkdir()
    names = {"": "Transformer", "1_Pooling": "Pooling", path: "Dense"}
    write_json(model / "modules.json", [{"path": key, "type": f"sentence_transformers.models.{kind}"} for key, kind in names.items()])
    write_json(model / "1_Pooling" / "config.json", {"embedding_dimension": WIDTH, "pooling_mode": "mean"})
    write_json(place / "config.json", {"in_features": WIDTH, "out_features": 4, "bias": False})
    save_file({"linear.weight": np.ones((4, WIDTH), np.float32)}, place / "model.safetensors")
    before = outside(tmp_path, "out")
    with pytest.raises(ModelError, match="lies outside its folder"):
        embed_here(source, str(tmp_path / "out"), model)
    assert outside(tmp_path, "out") == before


def test_an_index_of_weights_names_no_file_outside(model: Path, source: str, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "weights.safetensors")
    write_json(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"x": "../weights.safetensors"}})
    with pytest.raises(ModelError, match="lies outside its folder"):
        embed_here(source, str(tmp_path / "out"), model)


def test_a_model_whose_files_are_links_is_only_read(model: Path, source: str, tmp_path: Path) -> None:
    """The hub's cache is made of links, so they are followed; what they lead to stays as it is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in list(model.iterdir()):
        (elsewhere / file.name).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(elsewhere / file.name)
    before = outside(tmp_path, "out")
    embed_here(source, str(tmp_path / "out"), model)
    assert prove_here(str(tmp_path / "out")).status == "proved"
    assert outside(tmp_path, "out") == before


def joined(*parts: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), min_size=1).map("".join)


@given(path=joined(*"a./\\~=%\0é", ".."), folders=joined(*"a.=/", "..", "k=.."))
def test_no_source_can_name_a_shard_outside_the_output(path: str, folders: str) -> None:
    name = make_unit(Source(path, f"file:///{folders}/{path}", 1, "1"), 0, 1, "f").shard
    assert name.startswith("data/")
    assert ".." not in PurePosixPath(name).parts
    assert "\0" not in name
    assert "//" not in name


PICKLING_TYPES = {
    "ray.data.arrow_tensor": False,
    "ray.data.arrow_tensor_v2": False,
    "ray.data.arrow_pickled_object": True,
    "arrow.py_extension_type": True,
}
"""Names of types of Arrow, and whether a column of one is copied: as bytes, which nobody loads."""


@pytest.mark.parametrize(("name", "storable"), PICKLING_TYPES.items())
def test_a_parquet_file_with_a_pickle_in_its_schema_runs_nothing(
    name: str, storable: bool, saved: Path, trace: Path, tmp_path: Path
) -> None:
    """Ray registers types of Arrow that were once read by unpickling what the file says."""
    payload = cloudpickle.dumps(Bomb(trace))
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
    kind, value = (pa.list_(pa.int64()), [1]) if "tensor" in name else (pa.large_binary(), payload)
    fields = [pa.field("id", pa.int64()), pa.field("text", pa.string()), pa.field("bad", kind, metadata=metadata)]
    table = pa.table([pa.array([1]), pa.array(["one"]), pa.array([value], kind)], schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "bad.parquet")
    output = str(tmp_path / "out")
    with nullcontext() if storable else pytest.raises(CorpusError, match=r"bad\.parquet is not a readable Parquet file"):
        embed_here(str(tmp_path / "bad.parquet"), output, saved, keep_columns=["bad"])
        assert prove_here(output).status == "proved"
    assert not trace.exists()


def test_a_type_of_ray_on_a_column_of_another_kind_is_one_sentence(tmp_path: Path, saved: Path) -> None:
    bad = pa.field("bad", pa.int64(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor", "ARROW:extension:metadata": "[1]"})
    table = pa.table([pa.array(["one"]), pa.array([1])], schema=pa.schema([pa.field("text", pa.string()), bad]))
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(CorpusError, match=r"bad\.parquet is not a readable Parquet file"):
        embed_here(str(tmp_path / "bad.parquet"), str(tmp_path / "out"), saved, id_column=None)


SECRET_URLS = [
    "s3://AKIAKEY:planted-secret@bucket/corpus",
    "s3://AKIAKEY:planted/secret@bucket/corpus",
    "ftp://user:planted-secret@host/corpus",
    "https://host/a.parquet?X-Amz-Algorithm=x&X-Amz-Signature=planted-secret",
    "https://host/a.parquet?sv=2024&sig=planted-secret",
    "https://host/a.parquet?AWSAccessKeyId=planted-secret",
]


@pytest.mark.parametrize("url", SECRET_URLS)
@pytest.mark.parametrize("option", ["input", "output", "json-summary", "model"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(
    option: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"input": "in", "output": str(tmp_path / "out")} | {option: url}
    file = tmp_path / "job.yaml"
    file.write_text("".join(f"{key.replace('-', '_')}: '{value}'\n" for key, value in arguments.items()))
    ways = [[word for key, value in arguments.items() for word in (f"--{key}", value)], ["--config", str(file)]]
    for way in ways:
        assert run(way) == 2
        printed = capsys.readouterr()
        assert f"--{option} is a URL that contains a password, key or signature" in printed.err
        assert "planted" not in printed.out + printed.err
    values: dict[str, Any] = {key.replace("-", "_"): (value,) if key == "input" else value for key, value in arguments.items()}
    with pytest.raises(ConfigError) as refused:
        JobConfig(**values)
    assert "planted" not in str(refused.value)
    if option != "input":
        with pytest.raises(ConfigError) as refused:
            VerifyConfig(**{"output": "out"} | {option.replace("-", "_"): url})
        assert "planted" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("url", ["s3://bucket/a@b:c", "abfs://container@account.dfs.core.windows.net/x", "/a:b@c", "C:/x@y", "hub/id"])
def test_other_urls_are_no_secret(url: str) -> None:
    assert JobConfig(input=(url,), output=url, model=url).output == url


HUB_TOKEN = "hf_PlantedTokenOfNobody0123456789"
WRONG_SECRET = "PlantedWrongSecret0123456789abcdef"


def places(text: bytes, names: dict[str, bytes]) -> list[str]:
    """Where the text stands, also where compression hides it."""
    hidden = {name: " ".join(hidden_text(data)).encode() for name, data in names.items()}
    return [name for name, data in names.items() if text in data or text in hidden[name]]


def session_files(cluster: RayCluster) -> Iterator[tuple[str, bytes]]:
    """Everything that Ray keeps on the disk: logs, of the driver too, and what it stores."""
    folder = Path(psutil.Process(cluster.pid).cmdline()[-1])
    for parent, _, names in os.walk(folder):  # of a cluster that runs: what goes while it is looked at is passed over
        for file in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):
                if file.is_file():
                    yield str(file.relative_to(folder)), file.read_bytes()


def test_no_secret_is_written_anywhere(s3: S3Server, ray_cluster: RayCluster, saved: Path, tmp_path: Path) -> None:
    root = s3.folder()
    table = pa.table({"id": [1, 2], "text": pa.array(["a text to be found", None]), "mark": ["MarkToBeFound"] * 2})
    source = corpora.Corpus({"a.parquet": corpora.parquet(table)}, []).write(f"{root}/in")
    output = f"{root}/out"
    arguments = ["--input", source, "--output", output, "--id-column", "id", "--keep-columns", "mark", "--model", str(saved)]
    env = {**ray_cluster.environment(), "HF_TOKEN": HUB_TOKEN}
    verify: list[str | Path] = [sys.executable, REPOSITORY / "jobs" / "verify_corpus.py", output]

    good = run_job(*arguments, "--json-summary", str(tmp_path / "summary.json"), env=env)
    proof = subprocess.run(verify, capture_output=True, check=True, env={**os.environ, **env}, timeout=240)
    denied = run_job(*arguments, env={**env, "AWS_SECRET_ACCESS_KEY": WRONG_SECRET}, check=2)
    no_bucket = run_job(*arguments[2:], "--input", "s3://no-such-bucket/in", env=env, check=2)

    printed = {"proof": proof.stdout + proof.stderr, "summary": (tmp_path / "summary.json").read_bytes()}
    for number, result in enumerate((good, denied, no_bucket)):
        printed |= {f"{number} stdout": result.stdout.encode(), f"{number} stderr": result.stderr.encode()}
    written = printed | outputs.files(output)
    kept = dict(session_files(ray_cluster))
    assert any(name.startswith("data/") for name in places(b"MarkToBeFound", written))
    assert "1 stderr" in places(b"denied", written) or "1 stderr" in places(b"not allowed", written)
    assert any("worker" in name for name in kept)
    for secret in (s3.secret, WRONG_SECRET, HUB_TOKEN):
        assert places(secret.encode(), written) == []
        assert [name for name, data in kept.items() if secret.encode() in data] == []


def test_no_secret_is_in_what_ray_ships(s3: S3Server, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the driver pickles for other processes; the rows beside it are units, which hold a URL and numbers."""
    shipped: list[bytes] = []
    dumps: Callable[..., bytes] = cloudpickle.dumps

    def kept(*arguments: Any, **options: Any) -> bytes:
        shipped.append(dumps(*arguments, **options))
        return shipped[-1]

    root = s3.folder()
    source, output = corpora.plain(rows=4, files=1).write(f"{root}/in"), f"{root}/out"
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setattr(cloudpickle, "dumps", kept)
    embed(input=source, output=output)
    assert verify_corpus(VerifyConfig(output=output)).status == "proved"
    for name in (b"read_stage", b"EmbeddingWorker", b"check_stage", b"WorkerJob", b"CheckJob", output.encode()):
        assert any(name in data for data in shipped), name
    for secret in (s3.secret, HUB_TOKEN):
        assert not any(secret.encode() in data for data in shipped)
