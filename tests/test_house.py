"""The shape of the code, as docs/architecture.md draws it, is kept by tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import embedding

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("embedding", "jobs") for path in (REPOSITORY / folder).rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))

MAY_IMPORT = {
    "jobs": {"embedding", "embedding.config", "embedding.errors", "embedding.model", "embedding.run"},
    "embedding": {"embedding.config", "embedding.errors", "embedding.run"},
    "embedding.run": {
        "embedding",
        "embedding.config",
        "embedding.rules",
        "embedding.names",
        "embedding.errors",
        "embedding.model",
        "embedding.corpus",
        "embedding.run",
    },
    "embedding.model": {"embedding.config", "embedding.names", "embedding.errors", "embedding.model"},
    "embedding.corpus": {"embedding.names", "embedding.errors", "embedding.corpus"},
    "embedding.config": {"embedding.names", "embedding.rules"},
    "embedding.rules": {"embedding.errors"},
    "embedding.names": set[str](),
    "embedding.errors": set[str](),
}
"""jobs -> run -> {model, corpus} -> {config -> rules, names, errors}. `embedding` itself is the front door, which run takes the version
from.
"""

USES_RAY = {f"embedding/run/{name}.py" for name in ("cluster", "metrics", "pipeline", "remote_attempts", "submission")}
"""Who connects the cluster; the pipeline and the counter, on it; the metrics, which leave through it; the client of its job server, which
is never there."""
FOREIGN_TO = {
    "embedding.corpus": {"ray", "tokenizers", "torch", "transformers"},
    "embedding.model": {"fsspec", "pyarrow", "ray", "s3fs"},
}

FILE_LINES = 350
FUNCTION_LINES = 60

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), name_of(path))


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: `embedding.run.pipeline` to `embedding.run`."""
    return ".".join(module.split(".")[: 1 if module.startswith("jobs") else 2])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} has a relative import; write the whole name"
            assert node.module is not None
            yield from (f"embedding.{alias.name}" for alias in node.names) if node.module == "embedding" else [node.module]


def scopes(node: ast.AST, name: str = "") -> Iterator[tuple[str, Scope]]:
    """Modules, classes and functions by dotted name, nested ones too."""
    if isinstance(node, Scope):
        yield name, node
    for child in ast.iter_child_nodes(node):
        yield from scopes(
            child, f"{name}.{child.name}".lstrip(".") if isinstance(child, Scope) and not isinstance(child, ast.Module) else name
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(module_of(path))
    used = {part_of(module) for module in imports(path) if module.split(".")[0] in ("embedding", "jobs")}
    assert used <= MAY_IMPORT[part]
    assert not {module.split(".")[0] for module in imports(path)} & FOREIGN_TO.get(part, set())


def test_no_modules_import_each_other() -> None:
    """Not in a circle of several either: TopologicalSorter raises CycleError, which names it."""
    modules = {module_of(path): path for path in SOURCES if module_of(path) != "embedding"}
    order = list(TopologicalSorter({module: modules.keys() & set(imports(path)) for module, path in modules.items()}).static_order())
    assert order.index("embedding.errors") < order.index("embedding.corpus.plan") < order.index("embedding.run.pipeline")


def test_ray_is_imported_in_few_places() -> None:
    assert {name_of(path) for path in SOURCES if any(module.split(".")[0] == "ray" for module in imports(path))} == USES_RAY


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES
    functions = ((name, node) for name, node in scopes(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_public_is_documented(path: Path) -> None:
    public = ((name, node) for name, node in scopes(parsed(path)) if not any(part.startswith("_") for part in name.split(".")))
    own_scope = {name for name, node in scopes(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    undocumented = [name or "the module" for name, node in public if ast.get_docstring(node) is None]
    assert [name for name in undocumented if name.rpartition(".")[0] not in own_scope] == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_no_error_is_swallowed(path: Path) -> None:
    handlers = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if all(isinstance(line, ast.Pass) for line in handler.body)] == []


def test_the_front_door_names_what_exists() -> None:
    assert {"JobConfig", "embed_corpus"} <= set(embedding.__all__)
    assert list(embedding.__all__) == sorted(embedding.__all__)
    assert [name for name in embedding.__all__ if not hasattr(embedding, name)] == []
