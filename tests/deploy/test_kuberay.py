"""rayjob.yaml is what KubeRay's own schema accepts, and its entrypoint calls the retries off where running again would not help."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shlex
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from embedding.run.cli import parse
from tests.support.serving import serving

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "deploy" / "kuberay" / "embed_corpus.py"

SCHEMA = Path(__file__).with_name("kuberay-1.7.0-rayjob.json.gz")
"""The schema of `ray.io/v1` in ray-operator/config/crd/bases/ray.io_rayjobs.yaml of KubeRay 1.7.0 (Apache-2.0), as JSON, without the
descriptions and without `status`, which is KubeRay's to fill."""


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """The objects of rayjob.yaml by kind."""
    text = (REPOSITORY / "deploy" / "kuberay" / "rayjob.yaml").read_text()
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


@pytest.fixture
def rayjob(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(objects["RayJob"])


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    """As strict as `kubectl apply`, which refuses unknown keys."""
    return jsonschema.Draft202012Validator(closed(json.loads(gzip.decompress(SCHEMA.read_bytes()))))


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused in every object whose keys it lists, but for `metadata`, of which it lists none."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return schema


def test_kuberay_accepts_it(rayjob: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(rayjob)] == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(backOffLimit=3),
        lambda spec: spec["rayClusterSpec"].update(enableInTreeAutoscalling=True),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=2),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(images="x"),
        lambda spec: spec["rayClusterSpec"]["autoscalerOptions"].update(version="v3"),
        lambda spec: spec.update(ttlSecondsAfterFinished="ten"),
    ],
    ids=["key", "key of the cluster", "key of a group", "key of a container", "value", "type"],
)
def test_kuberay_refuses_a_slip(
    rayjob: dict[str, Any], validator: jsonschema.Draft202012Validator, break_it: Callable[[dict[str, Any]], None]
) -> None:
    break_it(rayjob["spec"])
    assert not validator.is_valid(rayjob)


def test_the_entrypoint_is_this_job(rayjob: dict[str, Any]) -> None:
    program, script, *arguments = shlex.split(rayjob["spec"]["entrypoint"])
    assert (program, script) == ("python", "/opt/embed-corpus/deploy/kuberay/embed_corpus.py")
    config = parse(arguments)
    assert config is not None
    [group] = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.worker_range() == (1, group["maxReplicas"])
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_account_may_patch_this_rayjob_and_nothing_else(objects: dict[str, dict[str, Any]]) -> None:
    [rule] = objects["Role"]["rules"]
    name = objects["RayJob"]["metadata"]["name"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "resourceNames": [name], "verbs": ["patch"]}
    pod = objects["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert pod["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"] == objects["RoleBinding"]["subjects"][0]["name"]
    assert {"name": "RAYJOB_NAME", "value": name} in pod["containers"][0]["env"]


def certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1, signed by itself, as `ca.crt` of the folder."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "ca.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(private)
    return folder / "ca.crt"


@contextmanager
def recording_api(folder: Path) -> Iterator[tuple[int, list[tuple[str, str | None, Any]]]]:
    """A port that speaks TLS and takes any PATCH, and what it got. Kubernetes itself is not to be had here."""
    requests: list[tuple[str, str | None, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, self.headers["Authorization"], json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(folder), folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        yield server.server_port, requests


@pytest.mark.parametrize(("arguments", "code", "called_off"), [(["--inptu", "x"], 2, True), (["--help"], 0, False)], ids=["2", "0"])
def test_only_a_final_end_calls_the_retries_off(arguments: list[str], code: int, called_off: bool, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the account's token\n")
    with recording_api(tmp_path) as (port, requests):
        env = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(port),
            "RAYJOB_NAME": "embed-corpus",
            "RAYJOB_NAMESPACE": "research",
            "SERVICE_ACCOUNT": str(tmp_path),
        }
        ended = subprocess.run([sys.executable, SCRIPT, *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stderr
    path = "/apis/ray.io/v1/namespaces/research/rayjobs/embed-corpus"
    assert requests == ([(path, "Bearer the account's token", {"spec": {"backoffLimit": 0}})] if called_off else [])


def test_an_api_that_refuses_does_not_change_the_end(tmp_path: Path) -> None:
    env = {**os.environ, "SERVICE_ACCOUNT": str(tmp_path), "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
    env |= {"RAYJOB_NAME": "embed-corpus", "RAYJOB_NAMESPACE": "research"}
    ended = subprocess.run([sys.executable, SCRIPT, "--inptu", "x"], env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "could not be called off" in ended.stderr
