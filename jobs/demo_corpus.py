"""Write a corpus that every machine has: the docstrings of Python's standard library, as Parquet files.

Taken are the public names of the library without its editor, its Python 2 converter, its build tool and its drawings: about 5,600
docstrings with 290,000 tokens, which two CPU cores embed in about a minute. The columns are `id` (json.loads), `text` (the
docstring) and `module` (json).
"""

from __future__ import annotations

import ast
import io
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import cyclopts
import pyarrow as pa
import pyarrow.parquet as pq
from rich import print as show

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

LEFT_OUT = frozenset({"distutils", "idlelib", "lib2to3", "turtledemo"})
ROW_GROUP_ROWS = (250, 500, 1000, 5000)
"""Row groups of the first file, of the second, ...: readers meet small ones and large ones."""
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "text", "module")])


def write_corpus(folder: Path) -> None:
    """Write the corpus to `folder`; a file that already holds the right bytes is not touched, so that the job finds no change."""
    rows = pa.Table.from_pylist(list(docstrings()), SCHEMA)
    cuts = [rows.num_rows * number // len(ROW_GROUP_ROWS) for number in range(len(ROW_GROUP_ROWS) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, ((start, end), row_group_rows) in enumerate(zip(pairwise(cuts), ROW_GROUP_ROWS, strict=True)):
        buffer = io.BytesIO()
        pq.write_table(rows.slice(start, end - start), buffer, row_group_size=row_group_rows, compression="zstd")
        path = folder / f"docstrings-{number}.parquet"
        if not path.exists() or path.read_bytes() != buffer.getvalue():
            path.write_bytes(buffer.getvalue())
    show(f"{folder} holds {rows.num_rows:,} docstrings of Python {platform.python_version()} in {len(ROW_GROUP_ROWS)} files")


def docstrings() -> Iterator[dict[str, str]]:
    """A row for each public docstring, in the order of module names and source lines; of two with one name, the first.

    The sources are parsed, not imported: the same files give the same rows, and none of their code runs.
    """
    seen: set[str] = set()
    for module, source in sorted(modules(Path(sysconfig.get_path("stdlib")))):
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of old sources, and no business of the reader's
            tree = ast.parse(source.read_bytes())
        for name, node in public(module, tree):
            text = ast.get_docstring(node)
            if text and name not in seen:
                seen.add(name)
                yield {"id": name, "text": text, "module": module}


def modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and source file of the library's modules; of its tests, none."""
    for name in sys.stdlib_module_names - LEFT_OUT:
        single_file = library / f"{name}.py"
        for source in [single_file] if single_file.exists() else (library / name).rglob("*.py"):
            path = source.relative_to(library).with_suffix("")
            if not {"test", "tests"}.intersection(path.parts):
                yield ".".join(path.parts).removesuffix(".__init__"), source


def public(name: str, node: ast.AST) -> Iterator[tuple[str, ast.Module | Definition]]:
    """`node` and all public classes and functions in it, by dotted name; those under `if` and `try` too."""
    if isinstance(node, ast.Module | Definition):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from public(name, child)
        elif isinstance(child, Definition) and not child.name.startswith("_"):
            yield from public(f"{name}.{child.name}", child)


if __name__ == "__main__":
    cyclopts.run(write_corpus)
