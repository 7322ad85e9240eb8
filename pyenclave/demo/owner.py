"""
The owner of the demo: the lender, somewhere else.

It trains, encrypts, verifies and compares. Its secrets (table, model, keys) leave it only as
ciphertext, and the keys only to an enclave that proved itself. It is a program of its own
(``python -m pyenclave.demo.owner``): standard input is its line to the demo's director, a second
descriptor its line to the host.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import pyenclave
from pyenclave._native import drop_capabilities
from pyenclave.demo import data
from pyenclave.demo.wire import Peer

_CHUNK = 50_000  # applicants a call


def _encrypt(key: bytes, label: bytes, plain: bytes) -> bytes:
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, plain, label)


def _patterns(planted: data.Floats, scored: data.Table, model: data.Model) -> list[bytes]:
    """Return what a scanner must never find: rows, weights."""
    rows = [row.tobytes()[8:48] for row in planted]
    sample = scored.matrix()[:: max(1, len(scored.labels) // 8)]
    rows += [row.tobytes()[:80] for row in sample]
    return [*rows, model.matrix().tobytes()[:64]]


def main(argv: list[str]) -> int:
    """Play the owner: ``owner IMAGE ROWS DESCRIPTOR``."""
    image, wanted = argv[0], int(argv[1])
    if os.geteuid() == 0:
        drop_capabilities()
    director = Peer(socket.socket(fileno=os.dup(0)))
    host = Peer(socket.socket(fileno=int(argv[2])))

    # 1. The owner's own part of the table trains the model; the rest is to be scored.
    table, planted = data.load()
    own = len(table.labels) // 2
    model = data.train(
        data.Table(features=table.features[:own], labels=table.labels[:own], columns=table.columns)
    )
    rest = data.Table(
        features=table.features[own:], labels=table.labels[own:], columns=table.columns
    )
    scored = data.enlarge(rest, wanted) if wanted else rest
    table_key, model_key = secrets.token_bytes(32), secrets.token_bytes(32)
    director.send(
        {
            "step": "trained",
            "trained_on": own,
            "rows": len(scored.labels),
            "columns": len(table.columns),
        }
    )

    ready, _ = host.receive()
    director.send({"step": "host", **ready})

    # 2. The platform's root comes from the director, never from the host: an out-of-band step.
    _, certificate = director.receive()
    root = x509.load_der_x509_certificate(certificate)

    # 3. Evidence, against a policy made from the image that the owner itself signed.
    policy = pyenclave.AppraisalPolicy.from_image(image, dangerous_allow_software=True)
    nonce = secrets.token_bytes(32)
    _, evidence = host.ask({"operation": "attest"}, nonce)
    result = pyenclave.verify(evidence, policy=policy, nonce=nonce, roots=[root])
    director.send(
        {
            "step": "verified",
            "checks": [[check.name, check.outcome] for check in result.checks],
            "nonce": nonce.hex(),
            "mrenclave": result.claims["mrenclave"],
        },
        evidence,
    )

    # 4. Only now the keys, and only to that enclave; then ciphertext.
    host.ask({"operation": "keys"}, result.encrypt(table_key + model_key))
    host.ask({"operation": "model"}, _encrypt(model_key, b"model", model.matrix().tobytes()))
    matrix = scored.matrix()
    chunks = [matrix[start : start + _CHUNK] for start in range(0, len(matrix), _CHUNK)]
    blobs = [
        _encrypt(table_key, b"table %d" % number, chunk.tobytes())
        for number, chunk in enumerate(chunks)
    ]
    secret = [table_key, model_key, *_patterns(planted, scored, model)]
    director.send({"step": "keys", "patterns": [pattern.hex() for pattern in secret]})
    director.receive()  # the director says go: its scanner runs meanwhile
    same, started = True, time.perf_counter()
    answers = []
    for number, blob in enumerate(blobs):
        _, raw = host.ask({"operation": "score", "chunk": number}, blob)
        answers.append(np.frombuffer(raw, dtype=np.float64))
    seconds = time.perf_counter() - started
    answer, _ = host.ask({"operation": "accuracy"})
    memory, _ = host.ask({"operation": "memory"})

    # 5. The same computation here, for comparison; the figures must be equal, bit for bit.
    started = time.perf_counter()
    expected = [model.score(np.ascontiguousarray(chunk)[:, 1:]) for chunk in chunks]
    outside = time.perf_counter() - started
    same = all(np.array_equal(a, b) for a, b in zip(answers, expected, strict=True))
    right = sum(
        int(((score > 0.5) == (chunk[:, 0] > 0.5)).sum())
        for score, chunk in zip(expected, chunks, strict=True)
    )
    director.send(
        {
            "step": "scored",
            "rows": len(matrix),
            "equal": same and right / len(matrix) == answer["accuracy"],
            "accuracy": answer["accuracy"],
            "sealed": memory["sealed"],
            "seconds": seconds,
            "outside_seconds": outside,
        }
    )
    director.receive()  # the director says that the owner may go
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
