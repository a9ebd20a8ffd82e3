"""The tables of README and options.md that say what the code says: this module, run, writes them; tests/test_docs.py compares them.

Each stands between two comments that bear its name, `<!-- options: ... -->` and `<!-- /options -->`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cyclopts import Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from embedding import errors
from embedding.config import JobConfig
from embedding.run.proof.config import VerifyConfig

README = Path(__file__).resolve().parents[1] / "README.md"
OPTIONS = README.parent / "docs" / "options.md"


def option_table(kind: type[BaseModel] = JobConfig) -> str:
    """Every field of the configuration, in its groups: option, default, meaning."""
    lines = ["| Option | Default | Meaning |", "| --- | --- | --- |"]
    last = ""
    for name, field in kind.model_fields.items():
        if (group := _group(field)) != last:
            lines.append(f"| **{group}** | | |")
            last = group
        lines.append(f"| `--{name.replace('_', '-')}` | {_default(field)} | {field.description} |")
    return "\n".join(lines)


def exit_code_table() -> str:
    """Every ExitCode with the docstring below it."""
    lines = ["| Exit code | Meaning |", "| --- | --- |"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in _exit_codes()]
    return "\n".join(lines)


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"exit codes": exit_code_table},
    OPTIONS: {"options": option_table, "proof options": partial(option_table, VerifyConfig)},
}
"""By page and by the name that the comments bear."""


def with_tables(page: Path) -> str:
    """The text of a page with each table as it should be."""
    text = page.read_text()
    for name, table in TABLES[page].items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda match: match[1] + table() + "\n" + match[2], text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"{page.name} has {count} places for the table {name!r}"
    return text


def _group(field: FieldInfo) -> str:
    [group] = [data.group for data in field.metadata if isinstance(data, Parameter) and data.group]
    [member] = group if isinstance(group, tuple) else (group,)
    return str(member.name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is False:
        return "off"
    return "none" if field.default in (None, ()) else f"`{field.default}`"


def _exit_codes() -> Iterator[tuple[errors.ExitCode, str]]:
    """The members and the strings that follow them in the source, which the class itself does not keep."""
    [body] = [node.body for node in ast.parse(inspect.getsource(errors.ExitCode)).body if isinstance(node, ast.ClassDef)]
    meanings = [node.value.value for node in body[1:] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return zip(errors.ExitCode, map(str, meanings), strict=True)


if __name__ == "__main__":
    for each in TABLES:
        each.write_text(with_tables(each))
