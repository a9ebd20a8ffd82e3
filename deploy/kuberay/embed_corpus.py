"""The job as a RayJob's entrypoint: an end that running again would not change calls off the RayJob's retries.

KubeRay retries a RayJob whatever its exit code was, each time on a new cluster. An end with one of FINAL sets the RayJob's `backoffLimit`
to 0 first, so that it stays failed, with its reason in the log.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from embedding.errors import ExitCode
from embedding.run.cli import run

FINAL = {ExitCode.USAGE, ExitCode.FAILED_UNITS, ExitCode.OUTPUT_BUSY}
"""Ends that a human has to look at: a wrong option, units set aside after several tries, another run on the output."""

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
TIMEOUT_SECONDS = 30


def call_off_retries() -> None:
    """Set the backoffLimit of the RayJob that RAYJOB_NAME and RAYJOB_NAMESPACE name to 0, as the pod's service account.

    Raises:
        OSError: the Kubernetes API cannot be reached or refuses.
        KeyError: a variable is not set.
    """
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    url = f"{server}/apis/ray.io/v1/namespaces/{os.environ['RAYJOB_NAMESPACE']}/rayjobs/{os.environ['RAYJOB_NAME']}"
    headers = {
        "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
        "Content-Type": "application/merge-patch+json",
    }
    request = Request(url, json.dumps({"spec": {"backoffLimit": 0}}).encode(), headers, method="PATCH")
    urlopen(request, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context(cafile=ACCOUNT / "ca.crt")).close()


def main() -> int:
    """The job's exit code, after the retries are called off where it is final."""
    code = run(sys.argv[1:])
    if code in FINAL:
        try:
            call_off_retries()
        except (OSError, HTTPException, KeyError) as error:
            print(f"the retries could not be called off ({error!r}); see the Role in deploy/kuberay/rayjob.yaml", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
