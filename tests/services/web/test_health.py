"""``/health``: one word for whoever asks, and what it is worth."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra 'services' is not installed")

from pyenclave.errors import ServiceError
from pyenclave.services.identity.issuer import DevIssuer
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.secrets import Secrets
from pyenclave.services.web import health
from pyenclave.services.web.health import add_health
from pyenclave.services.web.kit import Service
from pyenclave.services.web.limits import Limits
from pyenclave.services.web.run import Server


def made(probe: Callable[[], Awaitable[object]] | None = None) -> Service:
    nobody: Any = object()
    service = Service("some", api_versions=("1",), authenticator=nobody)
    add_health(service, probe)
    return service


def client(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=service), base_url="https://service.test"
    )


def away() -> ServiceError:
    return ServiceError("the database is away", status=503, error_code="ServiceUnavailable")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question is looked at anew."""
    monkeypatch.setattr(health, "_KEPT_SECONDS", 0.0)


@pytest.mark.usefixtures("fresh")
def test_ready_is_told_to_anybody_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """Neither token nor version; what is wrong stays in the log, once."""
    wrong: list[ServiceError] = []

    async def probe() -> None:
        if wrong:
            raise wrong[0]

    async def run() -> None:
        async with client(made(probe)) as asks:
            for error in (None, away(), None):
                wrong[:] = [] if error is None else [error]
                for _ in range(3):
                    answer = await asks.get("/health")
                    assert answer.status_code == (200 if error is None else 503)
                    assert answer.json() == {"status": "ready" if error is None else "not ready"}
                    head = await asks.head("/health")
                    assert head.status_code == answer.status_code
                    assert head.headers["content-length"] == str(len(answer.content))
                # The process is well, whatever its database does: nobody is to start it anew.
                assert (await asks.get("/health/live")).json() == {"status": "live"}
                assert (await asks.head("/health/live")).status_code == 200

    with caplog.at_level(logging.INFO, logger="pyenclave"):
        asyncio.run(run())
    said = [record.message for record in caplog.records if "ready" in record.message]
    assert said == ["some is not ready: the database is away", "some is ready again"]


def test_many_questions_are_one_look() -> None:
    """Who asks without a token makes no work for the database."""
    looks = 0

    async def probe() -> None:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0)

    async def run() -> None:
        async with client(made(probe)) as asks:
            answers = await asyncio.gather(*(asks.get("/health") for _ in range(50)))
            assert {answer.status_code for answer in answers} == {200}
            assert (await asks.get("/health")).status_code == 200

    asyncio.run(run())
    assert looks == 1


def test_a_probe_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PROBE_SECONDS", 0.01)

    async def run() -> None:
        async with client(made(asyncio.Event().wait)) as asks:
            assert (await asks.get("/health")).status_code == 503

    asyncio.run(run())


def test_other_methods_and_bodies_are_refused() -> None:
    async def run() -> None:
        async with client(made()) as asks:
            assert (await asks.post("/health")).headers["allow"] == "GET, HEAD"
            assert (await asks.request("GET", "/health", content=b"x")).status_code == 400

    asyncio.run(run())


@pytest.mark.usefixtures("fresh")
def test_a_database_that_is_away_is_not_ready(database_url: str) -> None:
    """SQLite and PostgreSQL, with the question that the vault asks."""
    lite = database_url.startswith("sqlite")
    with Database.open(database_url, parts=[], secrets=None if lite else Secrets.ephemeral()) as db:

        async def run() -> None:
            async with client(made(lambda: db.run(lambda _: None))) as asks:
                assert (await asks.get("/health")).status_code == 200
                if lite:
                    await asyncio.to_thread(db.close)
                else:
                    import psycopg

                    name = urlsplit(database_url).path[1:]
                    server = database_url.replace(f"/{name}?", "/postgres?")
                    with psycopg.connect(server, autocommit=True) as other:
                        other.execute(f"DROP DATABASE {name} WITH (FORCE)")
                assert (await asks.get("/health")).status_code == 503
                assert (await asks.get("/health/live")).status_code == 200

        asyncio.run(run())


def test_the_issuer_of_development_has_it_too(tmp_path: Path) -> None:
    issuer = DevIssuer(tmp_path)
    with Server(issuer.service()) as server:
        ca = ssl.create_default_context(cadata=(server.ca_pem or b"").decode())
        assert httpx.get(f"{server.url}/health", verify=ca).json() == {"status": "ready"}
        answer = httpx.head(f"{server.url}/health", verify=ca)
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n", 413, "Entity"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 40_000 + b"\r\n\r\n", 431, "Header"),
        (b"POST / HTTP/1.1\r\nhost: x\r\n", 408, "Timeout"),
    ],
)
def test_what_the_server_itself_refuses_has_the_form_of_all_errors(
    request_: bytes, status: int, code: str
) -> None:
    """Before there is a request: too large by its own word, too long, too late."""
    limits = Limits(header_seconds=0.1)
    with (
        Server(made(), dangerous_no_tls=True, limits=limits) as server,
        contextlib.closing(
            socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        ) as peer,
    ):
        peer.settimeout(20)
        peer.sendall(request_)
        told = b""
        while part := peer.recv(65536):
            told += part
    response = httpx.Response(
        int(told[9:12]),
        headers=[
            tuple(line.split(b": ")) for line in told.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]
        ],
        content=told.partition(b"\r\n\r\n")[2],
    )
    assert response.status_code == status
    assert response.headers["content-type"].startswith("application/json")
    assert code in response.json()["error"]["code"]
    assert int(response.headers["content-length"]) == len(response.content)
