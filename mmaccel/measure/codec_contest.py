"""Contestants of the codec benchmarks, each in a process that lives as long as the benchmark, run in turn."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmaccel
from mmaccel.measure.codec_peers import READERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Crew", "Entry", "Outcome", "contest"]


@dataclass(frozen=True)
class Entry:
    """A contestant: a reader, how it goes about several files ("loop", "pool", "list"), its threads, 0 for its choice.

    A pool has `workers` threads, each with a reader of `threads` threads.
    """

    reader: str
    how: str = "loop"
    threads: int = 0
    workers: int = 1


@dataclass
class Outcome:
    """What a contestant did: its answers in the order of the rounds, the first one before they are timed.

    missing: why there are none; version: of the library.
    """

    missing: str | None = None
    version: str | None = None
    warm_up: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)


class _Failed(Exception):  # noqa: N818 - a result, not an error of ours
    """A contestant that cannot go on; the message is the reason."""


class _Process:
    """One reader in its own interpreter, asked by lines of JSON."""

    def __init__(self, reader: str, python: str, patience: float) -> None:
        self._patience = patience
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # Another interpreter has no mmaccel; what is imported of it there needs nothing but numpy.
        path = os.pathsep.join(filter(None, (str(Path(mmaccel.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        self._popen = subprocess.Popen(
            [python, "-m", "mmaccel.measure.codec_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, bufsize=0, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        self.send(reader=reader)

    def send(self, **message: Any) -> None:
        try:
            self._popen.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
        except BrokenPipeError as error:
            raise _Failed(self._end()) from error

    def answer(self) -> dict[str, Any]:
        """The next answer; _Failed where it is an error, or does not come."""
        out: Any = self._popen.stdout
        if not select.select([out], [], [], self._patience)[0]:
            self.close()
            raise _Failed(f"no answer within {self._patience:g} s")
        line = out.readline()
        if not line:
            raise _Failed(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise _Failed(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def _end(self) -> str:
        code = self._popen.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"its process ended with {code}: {last}"[:300]

    def close(self) -> None:
        """End it and what it has forked."""
        if self.alive:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout, self._errors):
            if pipe is not None:
                pipe.close()


class Crew:
    """The process of each contestant of a benchmark, started when first wanted.

    python: an interpreter for readers whose library this one lacks, "" for none; patience: seconds that an answer may
    take. Use as a context manager.
    """

    def __init__(self, python: str, patience: float) -> None:
        self._python, self._patience = python, patience
        self._stack = ExitStack()
        self._processes: dict[str, tuple[_Process, str]] = {}
        self._missing: dict[str, str] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str, reader: str) -> tuple[_Process, str]:
        """A contestant's process, ready for a job, and the version of its library; _Failed if it cannot be had."""
        if reader in self._missing:
            raise _Failed(self._missing[reader])
        process, version = self._processes.get(name, (None, ""))
        if process is None or not process.alive:
            try:
                process = _Process(reader, self._interpreter(READERS[reader][0]), self._patience)
                self._stack.callback(process.close)
                version = process.answer()["version"]
            except _Failed as reason:
                self._missing[reader] = str(reason)
                raise
            self._processes[name] = process, version
        return process, version

    def _interpreter(self, module: str) -> str:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is not None:
            return sys.executable
        if not self._python:
            raise _Failed(f"no package {package} here; name an interpreter that has it with peers_python")
        return self._python


@contextmanager
def _job(crew: Crew, name: str, entry: Entry, job: Mapping[str, Any], outcome: Outcome) -> Iterator[Callable[[], Any]]:
    """A job made ready; yields what runs it once and gives the answer."""
    process, outcome.version = crew.get(name, entry.reader)
    process.send(do="job", how=entry.how, threads=entry.threads, workers=entry.workers, **job)
    try:
        process.answer()

        def run() -> dict[str, Any]:
            process.send(do="run")
            return process.answer()

        yield run
    finally:
        # Its answers are there already; who has died since is started anew for the next job.
        with suppress(_Failed):
            if process.alive:
                process.send(do="end")


@contextmanager
def _noted(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except _Failed as reason:
        outcome.missing = str(reason)


def contest(
    crew: Crew, entries: Mapping[str, Entry], job: Mapping[str, Any], rounds: int, progress: Callable[[int], None]
) -> dict[str, Outcome]:
    """Let all contestants do the same job: once to warm up, then `rounds` times in turn, each round begun by another.

    job: {"paths": files, "wanted": frame numbers, rising, "size": [height, width] or None}. `progress(done)` is called
    after each round. Who fails is out, and says why.
    """
    outcomes = {name: Outcome() for name in entries}
    with ExitStack() as stack:
        runs: dict[str, Callable[[], dict[str, Any]]] = {}
        for name, entry in entries.items():
            with _noted(outcomes[name]):
                run = stack.enter_context(_job(crew, name, entry, job, outcomes[name]))
                outcomes[name].warm_up = run()
                runs[name] = run
        for number in range(rounds):
            names = [name for name in runs if outcomes[name].missing is None]
            first = number % max(1, len(names))
            for name in names[first:] + names[:first]:
                with _noted(outcomes[name]):
                    outcomes[name].rounds.append(runs[name]())
            progress(number + 1)
    return outcomes
