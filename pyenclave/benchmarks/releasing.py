"""
The rows of services: tokens, released keys and keys a second, of one processor over loopback.

The server runs on one processor and its clients on another, over TLS, with audit on. The goals are
rates, so each row's peer is its goal.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from pyenclave.benchmarks.rows import spread

__all__ = ["attest", "key_get", "release"]

_CONNECTIONS: Final = 16
_ROUNDS: Final = 7
_SECONDS: Final = 1.0  # of a round
_HALF_SECONDS: Final = 3.0
# Requests a second that one processor shall answer.
_WANTED: Final = {"attest": 1000, "release": 300, "key_get": 4000}


def attest() -> list[dict[str, Any]]:
    """Measure tokens a second: an SGX quote each, ES256, collateral at hand."""
    return _rows("attest")


def release() -> list[dict[str, Any]]:
    """Measure released keys a second: an RSA-2048 key to an RSA-2048 transfer key."""
    return _rows("release")


def key_get() -> list[dict[str, Any]]:
    """Measure keys read a second."""
    return _rows("key_get")


@contextlib.contextmanager
def _server() -> Iterator[dict[str, str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pyenclave.benchmarks._services"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        if process.stdin is None or process.stdout is None:
            raise AssertionError("there are pipes")
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()


def _request(name: str, told: dict[str, str]) -> tuple[str, bytes, bytes]:
    """Return the service, the bytes of the request, and what a right answer begins with."""
    method, service, path, body = {
        "attest": ("POST", "attestation", "/attest/SgxEnclave?api-version=2022-08-01", "attest"),
        "release": ("POST", "vault", "/keys/bench//release?api-version=7.4", "release"),
        "key_get": ("GET", "vault", "/keys/bench/?api-version=7.4", ""),
    }[name]
    content = told[body].encode() if body else b""
    host = urlsplit(told[service]).netloc
    head = [f"{method} {path} HTTP/1.1", f"host: {host}"]
    if service == "vault":
        head.append(f"authorization: Bearer {told['token']}")
    if content:
        head += ["content-type: application/json", f"content-length: {len(content)}"]
    begins = {"attest": b'{"token":"ey', "release": b'{"value":"ey', "key_get": b'{"key":{'}[name]
    return told[service], "\r\n".join([*head, "", ""]).encode() + content, begins


def _rows(name: str) -> list[dict[str, Any]]:
    if any(importlib.util.find_spec(module) is None for module in ("sqlalchemy", "uvicorn")):
        return []
    from pyenclave.services.web.run import settled

    before = os.sched_getaffinity(0)
    # What this process collects meanwhile would count as the server's time.
    with _server() as told, settled():
        os.sched_setaffinity(0, {max(before)})
        try:
            rates, latencies = asyncio.run(_measure(*_request(name, told), ca=told["ca"]))
        finally:
            os.sched_setaffinity(0, before)
    rate, wanted = statistics.median(rates), _WANTED[name]
    half, worst = (statistics.quantiles(latencies, n=100)[index] for index in (49, 98))
    return [
        {
            "name": name,
            "value": rate,
            "unit": "requests/s",
            "peer": "the goal",
            "peer_value": float(wanted),
            "ratio": rate / wanted,
            **spread(rates, [float(wanted)] * len(rates), more=True),
        },
        {
            "name": f"{name}/p99",
            "value": worst * 1e6,
            "unit": "us",
            "peer": "half of them take, at half load",
            "peer_value": half * 1e6,
            "ratio": half / worst,
        },
    ]


async def _measure(
    url: str, request: bytes, begins: bytes, *, ca: str
) -> tuple[list[float], list[float]]:
    """Return rates at full load, and latencies (seconds) at half of it."""
    clients = [_Client(url, request, begins, ca) for _ in range(_CONNECTIONS)]
    for client in clients:
        await client.open()
    await _round(clients, 0.5)
    rates = [await _round(clients, _SECONDS) for _ in range(_ROUNDS)]
    gap = 2 * len(clients) / statistics.median(rates)
    latencies = await _paced(clients, gap)
    for client in clients:
        client.close()
    return rates, latencies


async def _round(clients: list[_Client], seconds: float) -> float:
    end = time.perf_counter() + seconds

    async def work(client: _Client) -> int:
        count = 0
        while time.perf_counter() < end:
            await client.ask()
            count += 1
        return count

    start = time.perf_counter()
    counts = await asyncio.gather(*map(work, clients))
    return sum(counts) / (time.perf_counter() - start)


async def _paced(clients: list[_Client], gap: float) -> list[float]:
    """Ask at half load: each connection every *gap* seconds, one after the other."""
    found: list[float] = []
    start = time.perf_counter()

    async def work(index: int, client: _Client) -> None:
        due = start + gap * index / len(clients)
        while due < start + _HALF_SECONDS:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            # From when it was due: a late answer holds up those behind it.
            await client.ask()
            found.append(time.perf_counter() - due)
            due += gap

    await asyncio.gather(*(work(index, client) for index, client in enumerate(clients)))
    return found


class _Client:
    """One connection that asks the same again and again."""

    def __init__(self, url: str, request: bytes, begins: bytes, ca: str) -> None:
        self._where = urlsplit(url)
        self._request = request
        self._begins = begins
        self._tls = ssl.create_default_context(cadata=ca)

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            self._where.hostname, self._where.port, ssl=self._tls
        )

    async def ask(self) -> None:
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(None, 1)[0])
        body = await self._reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200 ") or not body.startswith(self._begins):
            raise AssertionError(f"the service gave a wrong answer: {body[:200]!r}")

    def close(self) -> None:
        self._writer.close()
