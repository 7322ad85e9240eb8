"""A loopback double of collateral services: what it answers, how slowly and how wrongly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Answer:
    """What one path answers; `statuses` come first, one for each request."""

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    statuses: list[int] = field(default_factory=list)
    length: int | None = None
    drip: float | None = None  # seconds between bytes
    silent: bool = False


class Double:
    """The service; `asked` has the paths, in order."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                double.asked.append((self.path, dict(self.headers)))
                double._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.stop = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def server(self) -> ThreadingHTTPServer:
        return self._server

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        answer = self.answers.get(handler.path) or self.answers.get(handler.path.split("?")[0])
        if answer is None:
            answer = Answer(status=404)
        if answer.silent:
            self.stop.wait(20)
            return
        status = answer.statuses.pop(0) if answer.statuses else answer.status
        handler.send_response(status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        length = len(answer.body) if answer.length is None else answer.length
        if length >= 0:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if status != 200:
            return
        try:
            if answer.drip is None:
                handler.wfile.write(answer.body)
            else:
                for byte in answer.body:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                    time.sleep(answer.drip)
        except OSError:
            pass  # the client has gone, as it should
        handler.close_connection = True

    def close(self) -> None:
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def double() -> Iterator[Double]:
    """A fresh double."""
    made = Double()
    yield made
    made.close()


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """Make an answer."""
    return Answer
