"""Senders on the loopback interface for live streams: scripted TCP connections, chunked HTTP, pipes, growing files."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, BinaryIO

import pytest
from clips import number_in

from mmaccel.codecs.live import LiveFrame, LiveStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Script = "Callable[[socket.socket], None]"


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Every test leaves the threads and file descriptors that it found."""

    def running() -> set[threading.Thread]:
        # The timers are pytest's.
        return {worker for worker in threading.enumerate() if not isinstance(worker, threading.Timer)}

    threads = running()
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert running() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def number(frame: LiveFrame) -> int:
    """The number drawn into a frame of a rendered clip."""
    return number_in(frame.frame.permute(1, 2, 0).numpy())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Fail if it does not come true: for states that another thread is on its way to."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail(f"never happened: {what}")


def all_decoded(stream: LiveStream, count: int) -> None:
    wait_until(lambda: stream.stats().decoded >= count, f"{count} frames decoded, now {stream.stats()}")


@contextmanager
def thread(target: Callable[[], None]) -> Iterator[None]:
    worker = threading.Thread(target=target, name="sender")
    worker.start()
    try:
        yield
    finally:
        worker.join()


@contextmanager
def tcp_server(*scripts: Script) -> Iterator[str]:
    """The URL of a server that plays one script a connection, and is gone after the last one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def run() -> None:
            # A reader that has been left closes its end, or never comes for the scripts that remain.
            with server, suppress(OSError):
                for script in scripts:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        script(connection)

        with thread(run):
            try:
                yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
            finally:
                with suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)


def sends(data: bytes) -> Script:
    return lambda connection: connection.sendall(data)


def falls_silent(data: bytes) -> Script:
    """Sends, then keeps the connection open without another byte until the reader gives up."""

    def script(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.settimeout(20)
        while connection.recv(1024):
            pass

    return script


@contextmanager
def http_server(chunks: list[bytes], go_on: Callable[[int], object] = lambda _: None) -> Iterator[str]:
    """The URL of a response that grows chunk by chunk; go_on(k) is called before chunk k. Other paths are not found."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/live":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with suppress(OSError):
                for place, chunk in enumerate(chunks):
                    go_on(place)
                    self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    with thread(lambda: server.serve_forever(0.02)):
        try:
            yield f"http://127.0.0.1:{server.server_port}/live"
        finally:
            server.shutdown()
    server.server_close()


@contextmanager
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(reading end, writing end) of a pipe."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", buffering=0) as sink:
        yield source, sink


def pour(data: bytes, sink: BinaryIO, close: bool = True) -> Callable[[], None]:
    """Write all of it to a pipe, whose reader may have gone before the end."""

    def run() -> None:
        with suppress(BrokenPipeError):
            view = memoryview(data)
            while view:
                view = view[sink.write(view) :]
        if close:
            sink.close()

    return run


def grow(path: Path, data: bytes, parts: int) -> Callable[[], None]:
    """Append to a file in parts, with pauses that a reader notices."""

    def run() -> None:
        step = -(-len(data) // parts)
        for start in range(0, len(data), step):
            with path.open("ab") as file:
                file.write(data[start : start + step])
            time.sleep(0.07)

    return run
