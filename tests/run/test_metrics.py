"""Metrics: what Ray's endpoint shows of a run is what its summary says, and the dashboard and the docs speak of exactly that."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import promql_parser
import pyarrow as pa
import pytest
import ray
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.model.tiny import save_model
from tests.support import corpora, outputs
from tests.support.job import run_job
from tests.support.pages import section
from tests.support.ray_cluster import RayCluster
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((REPOSITORY / "deploy" / "grafana" / "embed-corpus.json").read_text())
TEXTS = [None, "", "the same", "the same", *(f"{number} {'long ' * number}" for number in range(36))]


@dataclass(frozen=True)
class Shown:
    """A run, and the samples of it that the endpoint shows when it is over."""

    summary: dict[str, Any]
    output: str
    samples: list[Sample]

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample with that name and these labels."""
        found = [sample for sample in self.samples if sample.name == f"ray_embed_{name}" and labels.items() <= sample.labels.items()]
        assert len(found) == 1, found
        return found[0].value

    def labels(self, name: str) -> dict[str, set[str]]:
        """The labels of the samples of that name, each with its values."""
        found: dict[str, set[str]] = {}
        for sample in self.samples:
            for label, value in sample.labels.items() if sample.name == name else ():
                found.setdefault(label, set()).add(value)
        return found


@pytest.fixture(scope="module")
def shown(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """All that is counted happens on this run: rejected, cut and equal rows, padding, failed units."""
    folder = tmp_path_factory.mktemp("metrics")
    good = pa.table({"text": TEXTS})
    source = corpora.Corpus({"a.parquet": corpora.parquet(good), "b.parquet": corpora.parquet(good)}, []).write(folder / "in")
    damaged = folder / "in" / "b.parquet"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:40] + b"\xff" * 60 + data[100:])
    output = str(folder / "résultats 100%")
    named = ["--input", source, "--output", output, "--model", str(save_model(folder / "model", "t5")), "--max-tokens", "24"]
    # in a process of its own: Ray counts double in one that connects to it again and again
    summary = run_job(*named, "--unit-rows", "10", env=ray_cluster.environment(), check=3).summary
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.environment().items():
            patch.setenv(name, value)
        url = endpoint()
    return Shown(summary, output, wait_until(lambda: scrape(url, summary["run"]), what="the run's metrics"))


def endpoint() -> str:
    """Where the one node of the cluster shows its metrics."""
    ray.init(log_to_driver=False)
    [node] = ray.nodes()
    ray.shutdown()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def scrape(url: str, run: str) -> list[Sample]:
    """The samples of one run; others of the tests are there too."""
    with urlopen(url, timeout=30) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    return [sample for family in families for sample in family.samples if sample.labels.get("run") == run]


def test_the_values_are_those_of_the_summary(shown: Shown) -> None:
    summary = shown.summary
    assert (summary["rows_rejected"], summary["units_failed"]) == (1, 4)
    assert min(summary["truncated_rows"], summary["duplicate_rows"]) > 0
    assert shown.value("rows_total") == summary["rows_out"]
    assert shown.value("tokens_total") == summary["tokens"]
    assert shown.value("rejected_rows_total") == summary["rows_rejected"]
    assert shown.value("truncated_rows_total") == summary["truncated_rows"]
    assert shown.value("duplicate_rows_total") == summary["duplicate_rows"]
    assert shown.value("units_total", outcome="committed") == summary["units_done"]
    assert shown.value("units_total", outcome="failed") == summary["units_failed"]
    assert shown.value("unit_seconds_count") == summary["units_done"]
    records = outputs.control(shown.output, "records")
    assert shown.value("padding_tokens_total") == sum(records["padding"].to_pylist()) > 0
    assert shown.value("shard_bytes_total") == sum(len(data) for data in outputs.shards(shown.output).values())
    spent = {stage: sum(records[f"{stage}_seconds"].to_pylist()) for stage in ("read", "tokenize", "wait", "encode", "write")}
    assert min(seconds for stage, seconds in spent.items() if stage != "wait") > 0
    stages = [sample for sample in shown.samples if sample.name == "ray_embed_stage_seconds_total"]
    expected = {stage: seconds for stage, seconds in spent.items() if seconds}  # the device may never have been busy
    assert {sample.labels["stage"]: sample.value for sample in stages} == pytest.approx(expected)
    assert [shown.value(f"pending_{what}") for what in ("rows", "units", "tokens")] == [0, 0, 0]
    assert shown.value("workers") == len(set(records["worker"].to_pylist()) - {""})


def test_a_run_is_told_from_others_by_few_series(shown: Shown) -> None:
    assert {sample.labels["output"] for sample in shown.samples} == {shown.output.replace("%", "%25").replace("é", "%C3%A9")}
    assert {sample.labels["WorkerId"] for sample in shown.samples if "WorkerId" in sample.labels} == {shown.samples[0].labels["WorkerId"]}
    assert len(shown.samples) < 40


def expressions() -> list[str]:
    """Every query of the dashboard, with its variables filled in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            selector = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert selector is not None
            assert selector[2] == variable["name"]
            found.append(f"count by ({selector[2]}) ({selector[1]})")
    return [re.sub(r"\$\w+", ".*", text) for text in found]


def nodes(expression: str, kind: type) -> list[Any]:
    """The parts of a query that are of that kind."""
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), found.append)
    return [node for node in found if isinstance(node, kind)]


def test_every_query_finds_what_is_shown(shown: Shown) -> None:
    for expression in expressions():
        for aggregate in nodes(expression, promql_parser.AggregateExpr):
            [selector] = nodes(aggregate.prettify(), promql_parser.VectorSelector)
            there = shown.labels(selector.name)
            assert there, f"there is no {selector.name}"
            assert set(aggregate.modifier.labels) <= there.keys(), expression
            for matcher in selector.matchers.matchers:
                assert any(re.fullmatch(matcher.value, value) for value in there[matcher.name]), expression


def test_dashboard_and_docs_leave_nothing_out(shown: Shown) -> None:
    there = {re.sub("_(bucket|count|sum)$", "", sample.name) for sample in shown.samples}
    used = {selector.name.removesuffix("_bucket") for text in expressions() for selector in nodes(text, promql_parser.VectorSelector)}
    assert used == there
    table = re.findall(r"^\| (`ray_.*?) \|", section(REPOSITORY / "docs" / "clusters.md", "## Metrics and dashboard"), flags=re.MULTILINE)
    told = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(there)


def test_grafana_knows_every_key_of_the_dashboard() -> None:
    """What Grafana's own types for dashboards do not know is lost when they read it and write it again."""
    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert lost(DASHBOARD, again) == []
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def lost(mine: object, theirs: object, place: str = "") -> list[str]:
    """Where values of `mine` are missing or others in `theirs`, which may have more keys."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return [found for key in mine for found in lost(mine[key], theirs.get(key), f"{place}.{key}")]
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return [found for number, pair in enumerate(zip(mine, theirs, strict=True)) for found in lost(*pair, f"{place}[{number}]")]
    return [] if mine == theirs else [f"{place}: {mine} became {theirs}"]
