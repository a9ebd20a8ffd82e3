"""What the configurations of the commands have in common: how they are put together, and the sentence for a value that breaks a rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_USER_AND_PASSWORD = re.compile(r"[^/]*:.*@")
"""user:password@host; the password may hold a slash. container@account, as Azure's URLs have it, is no secret."""
_SIGNATURE = re.compile(r"(^|&)[^=]*(sig|signature|token|secret|password|credential|key|keyid)=", re.IGNORECASE)
"""Options of presigned URLs and shared access signatures, such as X-Amz-Signature=, sig= and AWSAccessKeyId=."""

_WHOLE_NUMBER, _NUMBER = "a whole number", "a number"
_YES_OR_NO = "true or false"
_RULES = {
    "int_parsing": _WHOLE_NUMBER,
    "int_type": _WHOLE_NUMBER,
    "int_from_float": _WHOLE_NUMBER,
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of {ge:g} or more",
    "less_than_equal": "a number of {le:g} or less",
    "bool_parsing": _YES_OR_NO,
    "bool_type": _YES_OR_NO,
    "string_type": "a string",
    "string_too_short": "a value that is not empty, and look for a shell variable that is not set",
}
"""What to use instead, by pydantic's type of the error."""


class Config(BaseModel):
    """Options that are checked when they are put together, and then stay; unknown ones are refused.

    Raises:
        ConfigError: an option is unknown or its value is wrong, in the sentence of the command line. The constructor raises it too, in
            place of pydantic's ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self).model_fields)) from None

    @classmethod
    def build(cls, **values: Any) -> Self:
        """The constructor, for options that a type checker cannot look at."""
        return cls(**values)


def no_option(name: str, known: Iterable[str]) -> str:
    """What is said of a name that is no option, with the one that may have been meant."""
    close = get_close_matches(name, list(known), n=1)
    return f"{name!r} is not an option{f'; did you mean {close[0]!r}?' if close else '; --help lists them all'}"


def missing(field: str) -> str:
    """The sentence for an option that has no default and was not given."""
    return f"--{field.replace('_', '-')} is missing; set it on the command line, in the --config file or as EMBED_{field.upper()}"


def _explain(error: ValidationError, known: Iterable[str]) -> str:
    """One sentence for the first field that pydantic refused: option, value, rule; a name that is no option comes before all values."""
    details = error.errors(include_url=False)
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    if not first["loc"]:
        return _rule([first])
    field = str(first["loc"][0])
    option = f"--{field.replace('_', '-')}"
    match first["type"]:
        case "extra_forbidden":
            return no_option(field, known)
        case "missing":
            return missing(field)
        case "too_short":
            return f"{option} has no value; give it at least one"
    of_value = [detail for detail in details if detail["loc"][:1] == (field,) and detail["input"] == first["input"]]
    return f"{option}={first['input']!r} is invalid: {_rule(of_value)}"


def _rule(details: Sequence[ErrorDetails]) -> str:
    """What a value has to be; a union (auto or a number) yields an error per member, which are one rule to the user."""
    choices: list[str] = []
    for detail in details:
        context = detail.get("ctx", {})
        if "error" in context:  # a validator of ours, whose sentence has the remedy
            return str(context["error"])
        if detail["type"] == "literal_error":
            choices += re.findall(r"'([^']*)'", context["expected"])
        elif detail["type"] in _RULES:
            choices.append(_RULES[detail["type"]].format(**context))
        else:
            return detail["msg"]
    *others, last = dict.fromkeys(choices)
    return f"use {', '.join(others)} or {last}" if others else f"use {last}"


def refuse_secrets(option: str, url: str) -> None:
    """A URL ends up in records, shards and logs, so it may not carry what opens a store.

    Raises:
        ValueError: it does; the sentence does not repeat it.
    """
    _, is_url, rest = url.partition("://")
    place, _, query = rest.partition("?")
    if is_url and (_USER_AND_PASSWORD.match(place) or _SIGNATURE.search(query)):
        raise ValueError(
            f"--{option} is a URL that contains a password, key or signature, which would be written to records and logs; "
            "remove it, and provide it where the store's library looks for it (for S3: AWS_* variables or a profile)"
        )
