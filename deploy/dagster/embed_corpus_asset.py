"""A Dagster asset whose materialization embeds what is new in a corpus: dagster dev -f deploy/dagster/embed_corpus_asset.py

Dagster's environment needs this package without its dependencies, and little else (docs/clusters.md); Ray's address and token come
from RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN of it.
"""

# No postponed annotations here: Dagster reads those of an asset's parameters as they stand.
import dagster as dg
from ray.job_submission import JobSubmissionClient

from embedding.run.submission import submit, watch


class EmbedCorpus(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Which cluster, and the options of the job."""

    arguments: list[str]
    address: str | None = None

    def run(self, context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        """The summary as metadata.

        Raises:
            dagster.Failure: with retries where they help: a crash is retried, and resumes; a wrong option, failed units, another run
                on the output and a `ray job stop` are not.
        """
        client = JobSubmissionClient(self.address)
        submission = submit(client, self.arguments)
        try:
            end = watch(client, submission, context.log.info)
        except BaseException:  # Dagster interrupts a step that is terminated
            client.stop_job(submission)
            raise
        if end.succeeded:
            return dg.MaterializeResult(metadata={"submission": submission, **end.summary})
        metadata = {"submission": submission, "summary": end.summary, "failed units": end.failures}
        raise dg.Failure(end.message, metadata=metadata, allow_retries=not end.final)


@dg.asset(retry_policy=dg.RetryPolicy(max_retries=3, delay=120), kinds={"ray", "parquet"})
def vectors(context: dg.AssetExecutionContext, embed_corpus: EmbedCorpus) -> dg.MaterializeResult[None]:
    """A vector for every row of the corpus."""
    return embed_corpus.run(context)


defs = dg.Definitions(
    assets=[vectors],
    resources={
        "embed_corpus": EmbedCorpus(
            arguments=[
                *("--input", "s3://bucket/corpus", "--output", "s3://bucket/vectors", "--id-column", "id"),
                *("--gpus-per-worker", "1", "--workers", "1:16", "--progress", "log"),
            ]
        )
    },
)
