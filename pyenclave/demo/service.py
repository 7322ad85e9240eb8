"""
The host of the demo: an ordinary service that embeds the enclave.

It relays ciphertext and gets scores and the metric. It is a program of its own
(``python -m pyenclave.demo.service``); its standard input is a socket of requests.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import Any

import numpy as np

from pyenclave._native import drop_capabilities
from pyenclave.demo.wire import Peer
from pyenclave.errors import EnclaveError
from pyenclave.host import Enclave

_log = logging.getLogger("service")


class _Service:
    def __init__(self, enclave: Enclave) -> None:
        self.enclave = enclave
        self.kept: list[np.ndarray[Any, Any]] = []  # results, as a real service would keep them

    def describe(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request, body
        info = self.enclave.info
        return {"worker": info.pid, "host": os.getpid(), "mrenclave": info.mrenclave.hex()}, b""

    def attest(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request
        return {}, self.enclave.attest(nonce=body).to_bytes()

    def keys(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request
        return {"keys": self.enclave.call("receive_keys", body)}, b""

    def model(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request
        return {"weights": self.enclave.call("load_model", body)}, b""

    def score(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        scores = self.enclave.call("score", body, int(request["chunk"]))
        self.kept.append(scores)
        _log.info("scored chunk %d: %d applicants", request["chunk"], len(scores))
        return {"rows": len(scores)}, scores.tobytes()

    def accuracy(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request, body
        return {"accuracy": self.enclave.call("accuracy")}, b""

    def memory(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request, body
        return {"sealed": self.enclave.call("memory")}, b""

    def remember(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request
        return {}, self.enclave.call("remember", body)

    def recall(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        del request
        return {"length": self.enclave.call("recall", body)}, b""


_OPERATIONS = frozenset(
    {"describe", "attest", "keys", "model", "score", "accuracy", "memory", "remember", "recall"}
)


def main(argv: list[str]) -> int:
    """Serve requests on standard input until it ends: ``service IMAGE LOG [debug]``."""
    image, log, *rest = argv
    if os.geteuid() == 0:
        drop_capabilities()
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    peer = Peer(socket.socket(fileno=os.dup(0)))
    try:
        enclave = Enclave(image, debug=True if "debug" in rest else None)
        enclave.start()
    except EnclaveError as error:
        peer.send({"error": {"code": error.code, "message": str(error)}})
        return 1
    with enclave:
        service = _Service(enclave)
        peer.send(service.describe({}, b"")[0])
        while True:
            try:
                request, body = peer.receive()
            except EnclaveError:
                return 0  # the other end is done
            operation = str(request.get("operation"))
            try:
                if operation not in _OPERATIONS:
                    raise EnclaveError(f"unknown operation {operation!r}")
                answer, data = getattr(service, operation)(request, body)
            except EnclaveError as error:
                _log.warning("%s was refused: %s", operation, error)
                answer, data = {"error": {"code": error.code, "message": str(error)}}, b""
            peer.send(answer, data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
