"""A program on a real pseudo-terminal, and the screen as a person sees it."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyte

from tests.support.processes import end
from tests.support.waiting import wait_until

_LINES = 50


class Terminal:
    """The screen of a program that has it as input, output and controlling terminal, so that Ctrl-C is a key."""

    def __init__(self, process: subprocess.Popen[bytes], master: int, columns: int) -> None:
        self.process = process
        self._master = master
        self._screen = pyte.Screen(columns, _LINES)
        self._stream = pyte.ByteStream(self._screen)

    def lines(self) -> list[str]:
        """The screen by now, without blanks at the ends of lines and empty lines at its own end."""
        while select.select([self._master], [], [], 0)[0]:
            try:
                self._stream.feed(os.read(self._master, 1 << 16))
            except OSError:  # nobody has the other end open any more
                break
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip("\n").split("\n")

    def wait_for(self, found: Callable[[list[str]], object], *, what: str, seconds: float = 120) -> list[str]:
        """The screen, when it first is as wanted."""
        seen: list[str] = []

        def look() -> bool:
            seen[:] = self.lines()
            assert self.process.poll() is None or found(seen), f"the program ended before {what}:\n" + "\n".join(seen)
            return bool(found(seen))

        try:
            wait_until(look, seconds=seconds, what=what)
        except TimeoutError as waited:
            raise TimeoutError(f"{waited}; the screen:\n" + "\n".join(seen)) from None
        return seen

    def wait(self, seconds: float = 120) -> list[str]:
        """The screen when the program has ended, whose output is read meanwhile."""
        wait_until(lambda: self.lines() and self.process.poll() is not None, seconds=seconds, what="the program to end")
        return self.lines()

    def colour(self, line: int, column: int) -> str:
        """In which the character there is written; `default` where the program said nothing."""
        return str(self._screen.buffer[line][column].fg)

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._master, keys)

    @property
    def cursor_hidden(self) -> bool:
        """Whether the program left the cursor so."""
        return bool(self._screen.cursor.hidden)


@contextmanager
def on_terminal(command: Sequence[str | Path], env: Mapping[str, str], columns: int = 120) -> Iterator[Terminal]:
    """Start `command`, with `env` added to this process's variables; when the block is left, nothing of it runs any more."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, columns, 0, 0))
    variables = {**os.environ, "TERM": "xterm-256color", **env}
    process = subprocess.Popen(["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    try:
        yield Terminal(process, master, columns)
    finally:
        end(process)
        os.close(master)
