"""
A service of the standard library only: GET /score?income=4000&debt=1000, GET /healthz.

It ends at SIGTERM as an orchestrator asks: no new connections, running requests finish, then the
enclave goes.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pyenclave
from pyenclave.errors import BusyError, EnclaveError


def handler_for(enclave: pyenclave.Enclave) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds a slow client may take

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/healthz":
                return self.health()
            if url.path != "/score":
                return self.answer(404, {"error": "no such page"})
            query = parse_qs(url.query)
            try:
                income, debt = float(query["income"][0]), float(query["debt"][0])
            except (KeyError, ValueError):
                return self.answer(400, {"error": "income and debt are wanted, as numbers"})
            try:
                self.answer(200, {"score": enclave.options(timeout=2).score(income, debt)})
            except BusyError:
                self.answer(503, {"error": "busy"})
            except EnclaveError as error:
                self.answer(500, {"error": error.code})

        def health(self) -> None:
            try:
                enclave.ping(timeout=1)
                self.answer(200, {"status": "ok"})
            except EnclaveError as error:
                self.answer(503, {"error": error.code})

        def answer(self, status: int, content: dict[str, object]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    with pyenclave.Enclave(sys.argv[1]) as enclave:
        port = int(sys.argv[2]) if len(sys.argv) > 2 else 8080
        server = ThreadingHTTPServer(("0.0.0.0", port), handler_for(enclave))
        server.daemon_threads = False  # server_close waits for running requests
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"listening on {server.server_address[1]}", flush=True)
        server.serve_forever(poll_interval=0.1)
        server.server_close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        print(f"usage: python {sys.argv[0]} IMAGE [PORT]", file=sys.stderr)
        sys.exit(2)
    main()
