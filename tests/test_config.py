"""The configurations from Python: what is accepted, and that a wrong value is a ConfigError with the sentence of the command line."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import embedding
from embedding.config import JobConfig
from embedding.errors import ConfigError, EmbeddingJobError, ExitCode
from embedding.run.proof.config import VerifyConfig

NEEDED = {"input": ("in",), "output": "out"}


def test_lists_take_one_value_or_a_list_or_tuple() -> None:
    one: dict[str, Any] = {"input": "in", "output": "out", "keep_columns": "lang", "dimensions": 64}
    several: dict[str, Any] = {"input": ["in"], "output": "out", "keep_columns": ["lang"], "dimensions": [64]}
    config = JobConfig(**one)
    assert config == JobConfig(**several) == JobConfig(input=("in",), output="out", keep_columns=("lang",), dimensions=(64,))
    assert (config.input, config.keep_columns, config.dimensions) == (("in",), ("lang",), (64,))
    assert pickle.loads(pickle.dumps(config)) == config
    assert embedding.JobConfig is JobConfig


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "--input is missing; set it on the command line, in the --config file or as EMBED_INPUT"),
        ({"inptu": "in", "output": "out"}, "'inptu' is not an option; did you mean 'input'?"),
        ({**NEEDED, "xyz": 1}, "'xyz' is not an option; --help lists them all"),
        ({**NEEDED, "input": ()}, "--input has no value; give it at least one"),
        ({**NEEDED, "input": ["in", 5]}, "--input=5 is invalid: use a string"),
        ({**NEEDED, "keep_columns": {"a": "b"}}, "--keep-columns={'a': 'b'} is invalid: use a string"),
        ({**NEEDED, "unit_rows": 0}, "--unit-rows=0 is invalid: use auto or a number above 0"),
        ({**NEEDED, "max_tokens": 0.5}, "--max-tokens=0.5 is invalid: use a whole number"),
        ({**NEEDED, "dry_run": "perhaps"}, "--dry-run='perhaps' is invalid: use true or false"),
        ({**NEEDED, "workers": "4:2"}, "--workers='4:2' is invalid: the minimum 4 is above the maximum 2; swap them"),
        ({**NEEDED, "quiet": True, "verbose": True}, "--quiet and --verbose are both given; keep one of them"),
    ],
)
def test_a_wrong_value_is_the_sentence_of_the_command_line(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EmbeddingJobError) as refusal:
        JobConfig(**options)
    assert type(refusal.value) is ConfigError
    assert str(refusal.value) == sentence
    assert refusal.value.exit_code == ExitCode.USAGE
    assert refusal.value.__suppress_context__


def test_other_ways_to_a_configuration_refuse_with_the_same() -> None:
    for build in (JobConfig.build, lambda **options: JobConfig.model_validate(options)):
        with pytest.raises(ConfigError, match=r"^--limit-rows=0 is invalid: use a number above 0$"):
            build(**NEEDED, limit_rows=0)
    with pytest.raises(ConfigError, match=r"^--sample=-1 is invalid: use a number of 0 or more$"):
        VerifyConfig(output="out", sample=-1)
