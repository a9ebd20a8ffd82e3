"""An Airflow DAG that embeds what is new in a corpus every night: submit, follow the log, return the summary.

Belongs in the DAG folder. The workers need this package without its dependencies, and little else (docs/clusters.md); Ray's address and
token come from RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN of their environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from ray.job_submission import JobSubmissionClient

from embedding.run.submission import submit, watch


class EmbedCorpusOperator(BaseOperator):
    """Run the job on a Ray cluster; its summary is the operator's return value.

    A crash is retried, and resumes. A wrong option, failed units, another run on the output and a `ray job stop` are not: Airflow
    fails at once, with the reason. Marking it failed or cleared in Airflow stops the run on the cluster.
    """

    template_fields: Sequence[str] = ("arguments",)

    def __init__(self, *, arguments: Sequence[str], address: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.arguments = list(arguments)
        self.address = address
        self._submission: str | None = None

    def execute(self, context: Any) -> dict[str, Any]:
        """The summary.

        Raises:
            AirflowFailException: running again would not help before a human has looked.
            AirflowException: anything else; a retry resumes.
        """
        del context
        client = JobSubmissionClient(self.address)
        self._submission = submit(client, self.arguments)
        self.log.info("Ray submission %s", self._submission)
        end = watch(client, self._submission, self.log.info)
        if end.succeeded:
            return end.summary
        for failure in end.failures:
            self.log.error("failed unit: %s", failure)
        raise (AirflowFailException if end.final else AirflowException)(end.message)

    def on_kill(self) -> None:
        """Stop the run on the cluster; it lets go of the output, and what it committed stays."""
        if self._submission is not None:
            JobSubmissionClient(self.address).stop_job(self._submission)


with DAG(
    dag_id="embed_corpus",
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["embeddings"],
) as dag:
    EmbedCorpusOperator(
        task_id="embed",
        arguments=[
            *("--input", "s3://bucket/corpus", "--output", "s3://bucket/vectors", "--id-column", "id"),
            *("--gpus-per-worker", "1", "--workers", "1:16", "--progress", "log"),
        ],
        retries=3,
        retry_delay=timedelta(minutes=2),
        execution_timeout=timedelta(days=2),
    )
