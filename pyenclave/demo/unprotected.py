"""
The same job without an enclave: what each attack must succeed against.

A program of its own (``python -m pyenclave.demo.unprotected``). It holds table, model and key
in an ordinary process, keeps its results in ordinary shared memory and believes its files.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys

import numpy as np

from pyenclave._native import drop_capabilities
from pyenclave.demo import data
from pyenclave.demo.wire import Peer


def main() -> int:
    """Load, score, tell the director what a thief would look for, and wait."""
    if os.geteuid() == 0:
        drop_capabilities()
    peer = Peer(socket.socket(fileno=os.dup(0)))
    table, planted = data.load()
    model = data.train(table)
    key = secrets.token_bytes(32)
    scores = model.score(table.features)
    # Its table lies in a descriptor, as an ordinary program's open file does.
    held = os.memfd_create("applicants")
    os.write(held, table.matrix().tobytes())
    peer.send(
        {
            "pid": os.getpid(),
            "patterns": [key.hex(), *(row.tobytes()[8:48].hex() for row in planted)],
            "fd": held,
            "mean": float(np.mean(scores)),
        }
    )
    while True:
        request, _ = peer.receive()
        if request.get("operation") == "end":
            return 0
        peer.send(json.loads(json.dumps({"rows": len(scores), "key_size": len(key)})))


if __name__ == "__main__":
    sys.exit(main())
