"""Options from the command line, the environment and a YAML file to one configuration; a mistake in any of them to one sentence."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar

import cyclopts.config
import yaml
from cyclopts import App, Group, Parameter
from cyclopts.exceptions import CycloptsError, MissingArgumentError, UnusedCliTokensError
from pydantic import BaseModel

import embedding
from embedding.config import JobConfig
from embedding.errors import ConfigError
from embedding.rules import missing, no_option
from embedding.run.proof.config import VerifyConfig

_FILE_GROUP, _HELP_GROUP = Group("Configuration", sort_key=10), Group("Help", sort_key=11)
_PREFIX = "EMBED_"
_NO_OPTIONS = {"EMBED_CACHE", "EMBED_STORE_SECONDS"}
"""Variables that are no options: `run/models.py` and `corpus/requests.py` read them."""
Config = TypeVar("Config", bound=BaseModel)
Shell: TypeAlias = Literal["zsh", "bash", "fish", "powershell"]


class _App(App):
    def generate_completion(self, *, prog_name: str | None = None, shell: Shell | None = None) -> str:
        """Options whose values nobody can list are offered files: input, output and model are folders more often than not.

        The condition of fish's lines, that no word has been a command yet, would end completion at the first value of an option.
        """
        script: str = super().generate_completion(prog_name=prog_name, shell=shell)
        script = re.sub(r"^complete -F ", "complete -o default -F ", script, flags=re.MULTILINE)  # bash
        script = script.replace(" -n __fish_use_subcommand", "")
        return re.sub(r"(\]:[\w-]+)' \\$", r"\1:_files' \\", script, flags=re.MULTILINE)  # zsh


def parse_as(kind: type[Config], argv: list[str], *, name: str, usage: str, description: str, positional: bool = False) -> Config | None:
    """The configuration of that kind; None where --help or --version was all that was asked.

    `positional`: fields that are not keyword-only can also be given without their option's name.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    parsed: list[Config] = []
    installed = name.removesuffix(".py").replace("_", "-")
    is_installed = Path(sys.argv[0]).name == installed
    app = _App(
        name=installed if is_installed else name,
        usage=f"Usage: {installed if is_installed else name} {usage}",
        help=description,
        version=embedding.__version__,
        help_format="plaintext",
        result_action="return_value",
        group_commands=_HELP_GROUP,
    )
    if is_installed:  # shells complete the names of programs, not those of scripts that python is given
        app.register_install_completion_command(help="Install completion of the options for bash, zsh or fish.")

    def command(*, config: Config) -> None:
        parsed.append(config)

    def with_arguments(config: Config) -> None:
        command(config=config)

    chosen = with_arguments if positional else command
    chosen.__annotations__["config"] = Annotated[kind, Parameter(name="*")]
    app.default(chosen)

    @app.meta.default
    def configured(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(help="YAML file with any of these options.", group=_FILE_GROUP, metavar="PATH")] = None,
    ) -> None:
        require_known_variables(os.environ)
        from_file = [] if config is None else [cyclopts.config.Dict(read_options(config, kind.model_fields), source=str(config))]
        app.config = [cyclopts.config.Env(_PREFIX, command=False), *from_file]
        app(tokens, exit_on_error=False, print_error=False)

    try:
        app.meta(argv, exit_on_error=False, print_error=False)
    except (MissingArgumentError, ConfigError) as error:  # not the cause where another option has its name wrong
        raise ConfigError(_mistyped(argv, kind.model_fields) or _sentence(error)) from error
    except CycloptsError as error:
        raise ConfigError(_sentence(error)) from error
    return parsed[0] if parsed else None


def read_options(file: Path, known: Iterable[str] = tuple(JobConfig.model_fields)) -> dict[str, object]:
    """The options of a YAML file, every value as it is written there: YAML's own types would make 63 of `workers: 1:3`.

    A key without a value, or with null, counts as not given.

    Raises:
        ConfigError: there is no such file, it is no YAML mapping, or a key is no option.
    """
    try:
        content = yaml.load(file.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigError(f"--config {file} {reason}; check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} must contain one option per line, such as `batch_tokens: 4096`")
    for key in content.keys() - set(known):
        raise ConfigError(f"--config {file}: {no_option(key, known)}")
    return {key: value for key, value in content.items() if value not in ("", "null", "~")}


def _mistyped(argv: Iterable[str], fields: Iterable[str]) -> str:
    """The sentence for the first argument that looks like an option and is none, else empty."""
    known = ["--config", *(f"--{field.replace('_', '-')}" for field in fields)]
    for name in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if name not in known:
            close = get_close_matches(name, known, n=1)
            return f"Unknown option: {name}." + (f" Did you mean {close[0]}?" if close else " --help lists them all.")
    return ""


def require_known_variables(names: Iterable[str]) -> None:
    """Check that each EMBED_* variable is read by one of the commands: they share an environment, so each takes the other's options.

    Raises:
        ConfigError: one is not, such as a mistyped option, whose value would be ignored.
    """
    ours = sorted(name for name in names if name.startswith(_PREFIX))
    known = _NO_OPTIONS.union(_PREFIX + field.upper() for kind in (JobConfig, VerifyConfig) for field in kind.model_fields)
    for name in ours:
        if name in known or _is_of_kubernetes(name, ours):
            continue
        close = get_close_matches(name.removeprefix(_PREFIX).upper(), [each.removeprefix(_PREFIX) for each in sorted(known)], n=1)
        remedy = f"did you mean {_PREFIX}{close[0]}? Else unset it" if close else "unset it, or see --help for the options"
        if name == "EMBED_CONFIG":
            remedy = "give --config on the command line, and unset it"
        raise ConfigError(f"the variable {name} is set, but it is not an option; {remedy}")


def _is_of_kubernetes(name: str, names: Iterable[str]) -> bool:
    """Whether it is one of those that a pod has for each service of its namespace; KubeRay makes one named embed-corpus-...-head-svc."""
    services = (each.removesuffix("_SERVICE_HOST") for each in names if each.endswith("_SERVICE_HOST"))
    return name.startswith(tuple(f"{service}_{end}" for service in services for end in ("SERVICE_", "PORT")))


def _sentence(error: CycloptsError | ConfigError) -> str:
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.keyword is None:
            return missing(error.argument.name.removeprefix("--").replace("-", "_"))
        return f"{error.keyword} has no value; write it after the option, or as {error.keyword}=VALUE if it begins with a hyphen"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        extra = error.unused_tokens[0]
        return f"{extra!r} is not the value of an option; write the option before it, and quote a glob so that the shell leaves it alone"
    return " ".join(str(error).split())
