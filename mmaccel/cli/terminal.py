"""Where a command writes: its result to stdout, progress and warnings to stderr, and with --json one document only."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Terminal", "one_line", "say_what_can_be_said"]


def one_line(text: object) -> str:
    """Any message as a single line."""
    return " ".join(str(text).split())


def say_what_can_be_said() -> None:
    """Let stdout and stderr write a question mark for what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class Terminal:
    """A context manager around the work of one command.

    `show` prints for people and is silent under `as_json`; `finish` prints the document and is silent otherwise.
    Inside the block stdout is stderr under `as_json`, so that what a library prints cannot spoil the document; warnings
    of mmaccel come as one line each.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout: TextIO = sys.stdout
        # Tables are meant to be read whole: what is piped into a file is not cut to 80 columns.
        self._out = Console(file=self._stdout, width=None if self._stdout.isatty() else 140)
        self.stderr = Console(stderr=True, highlight=False)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Terminal:
        if self.as_json:
            self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._stack.enter_context(warnings.catch_warnings())
        # Only what mmaccel itself has to say; the deprecations of libraries are not the user's business.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="mmaccel")
        warnings.showwarning = self._warn
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def _warn(self, message: Warning | str, *_where: Any) -> None:
        self.stderr.print(f"warning: {one_line(message)}", markup=False, soft_wrap=True)

    def show(self, *things: Any) -> None:
        """Print for people."""
        if not self.as_json:
            for thing in things:
                self._out.print(thing, highlight=False, soft_wrap=isinstance(thing, str))

    def finish(self, document: dict[str, Any]) -> None:
        """Print the machine-readable document."""
        if self.as_json:
            self._stdout.write(json.dumps(document, default=_plain, allow_nan=False) + "\n")
            self._stdout.flush()

    def progress(self) -> Progress:
        """A progress bar on stderr that leaves nothing behind; invisible where stderr is no terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.stderr, transient=True, disable=not self.stderr.is_terminal)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be said in JSON.")
