"""Pages of README and docs, taken apart: their blocks of code, the commands in them, their sections."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def fenced(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


def unfenced(text: str) -> str:
    """The text without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its blocks."""
    return unfenced(page.read_text())


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a bash block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def sections(page: Path) -> dict[str, list[Block]]:
    """The blocks of a page by the heading of second level that they stand under."""
    text = page.read_text()
    starts = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in re.finditer(r"^## (.*)$", text, flags=re.MULTILINE)]
    ends = [line for line, _ in starts[1:]] + [len(text)]
    return {
        heading: [block for block in fenced(page) if start < block.line < end] for (start, heading), end in zip(starts, ends, strict=True)
    }


def section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no {heading!r}"
    return found[1]
