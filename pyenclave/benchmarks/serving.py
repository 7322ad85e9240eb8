"""The row of a web service: what an ecall in a route costs."""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import subprocess
import sys
import time
from typing import Any

from pyenclave.benchmarks.rows import spread

__all__ = ["fastapi_overhead"]

_CONNECTIONS = 8
_REQUESTS = 150  # of a connection, a round
_ROUNDS = 9


def fastapi_overhead() -> list[dict[str, Any]]:
    """
    Measure requests a second of a JSON route with an ecall against the same without one.

    Both routes are of one uvicorn process; rounds alternate. No row where FastAPI or uvicorn is
    not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        return []
    server = subprocess.Popen(
        [sys.executable, "-m", "pyenclave.benchmarks._service"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        ours, theirs = asyncio.run(_alternate(port))
        assert server.stdin is not None
        server.stdin.close()
    value, peer = statistics.median(ours), statistics.median(theirs)
    return [
        {
            "name": "fastapi_overhead",
            "value": value,
            "unit": "requests/s",
            "peer": "the same route in process",
            "peer_value": peer,
            # Of rounds that were run one after the other: a busy machine is not always as busy.
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            **spread(ours, theirs, more=True),
        }
    ]


async def _alternate(port: int) -> tuple[list[float], list[float]]:
    rates: dict[str, list[float]] = {"enclave": [], "local": []}
    for path in ("enclave", "local"):
        await _round(port, path)
    for _ in range(_ROUNDS):
        for path, found in rates.items():
            found.append(await _round(port, path))
    return rates["enclave"], rates["local"]


async def _round(port: int, path: str) -> float:
    request = f"GET /{path}?x=40&y=2.0 HTTP/1.1\r\nHost: bench\r\n\r\n".encode()

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(_REQUESTS):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(None, 1)[0])
            body = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200 ") or body != b'{"sum":42.0}':
                raise AssertionError(f"the service gave a wrong answer: {body[:80]!r}")
        writer.close()
        await writer.wait_closed()

    start = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(_CONNECTIONS)))
    return _CONNECTIONS * _REQUESTS / (time.perf_counter() - start)
