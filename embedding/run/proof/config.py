"""The options of a proof, fed like the job's by the command line, a YAML file or the environment."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from cyclopts import Group, Parameter
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from embedding.rules import Config, refuse_secrets

_OUTPUT = Parameter(group=Group("Output", sort_key=1))
_SAMPLE = Parameter(group=Group("Sample", sort_key=2))
_RUN = Parameter(group=Group("Run", sort_key=3))
_AUTO_OR_NUMBER = Parameter(metavar="auto|N", show_choices=False)
_FLAG = Parameter(negative="", show_default=False)
_NUMBER = Parameter(metavar="N")
_PLACE = Parameter(metavar="PATH|URL")


class VerifyConfig(Config):
    """Everything a user can say about a proof.

    Raises:
        ConfigError: an option is unknown or a value is out of its range; not pydantic's ValidationError.
    """

    output: Annotated[str, _OUTPUT, _PLACE] = Field(min_length=1, description="Folder that the job wrote; a local path or an fsspec URL.")
    repair: Annotated[bool, _OUTPUT, _FLAG] = Field(
        False, kw_only=True, description="Delete what is proved wrong, so that the job's next run rebuilds only that."
    )

    sample: Annotated[NonNegativeInt, _SAMPLE, _NUMBER] = Field(
        100, kw_only=True, description="Number of random rows to embed again in fp32 and compare; with 0, no model is needed."
    )
    seed: Annotated[NonNegativeInt | None, _SAMPLE, _NUMBER] = Field(
        None, kw_only=True, description="Seed of an earlier verification, to choose the same rows; default: different rows each time."
    )
    model: Annotated[str | None, _SAMPLE, Parameter(metavar="PATH|URL|ID")] = Field(
        None, min_length=1, kw_only=True, description="Folder, URL or hub id of the model; default: where the job's last run found it."
    )
    trust_remote_code: Annotated[bool, _SAMPLE, _FLAG] = Field(False, kw_only=True, description="Run Python code from the model folder.")

    workers: Annotated[Literal["auto"] | PositiveInt, _RUN, _AUTO_OR_NUMBER] = Field(
        "auto", kw_only=True, description="Shards checked at once; auto: one per CPU core of the cluster."
    )
    json_summary: Annotated[str | None, _RUN, _PLACE] = Field(
        None, min_length=1, kw_only=True, description="Also write the JSON summary, with every finding, to this path or URL."
    )
    progress: Annotated[Literal["log", "none"], _RUN] = Field("log", kw_only=True, description="Progress display: log lines or none.")

    @model_validator(mode="after")
    def _carries_no_secret(self) -> Self:
        for option, url in {"output": self.output, "json-summary": self.json_summary, "model": self.model}.items():
            refuse_secrets(option, url or "")
        return self
