"""A server on 127.0.0.1 that serves one file, well or badly."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """What the server does; ``asked`` collects the Range header of every request.

    Attributes:
        content: the file.
        ranges: whether it understands Range.
        cuts: after how many bytes of the body it drops the connection, one entry a connection.
        length: whether it says how long the body is.
        status: a status to answer with instead.
        headers: more headers.
        stall: an event to wait for where a cut would be, instead of dropping the connection.
        shift: an error in the ranges that it sends.
    """

    content: bytes
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    length: bool = True
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    stall: threading.Event | None = None
    shift: int = 0
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        todo: Behaviour = self.server.behaviour  # type: ignore[attr-defined]
        asked = self.headers.get("Range")
        todo.asked.append(asked)
        total = len(todo.content)
        start = 0
        if todo.status is not None:
            self.send_error(todo.status)
            return
        if asked and todo.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + todo.shift
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if todo.length:
            self.send_header("Content-Length", str(total - start))
        for name, value in todo.headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = todo.content[start:]
        cut = todo.cuts.pop(0) if todo.cuts else len(body)
        with contextlib.suppress(OSError):
            self.wfile.write(body[:cut])
            self.wfile.flush()
            if todo.stall is not None and cut < len(body):
                todo.stall.wait(60)


@contextlib.contextmanager
def serve(behaviour: Behaviour) -> Iterator[Behaviour]:
    """Runs the server; the behaviour learns its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.behaviour = behaviour  # type: ignore[attr-defined]
        behaviour.url = f"http://127.0.0.1:{server.server_address[1]}/file.bin"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield behaviour
        finally:
            if behaviour.stall is not None:
                behaviour.stall.set()
            server.shutdown()
            thread.join()
