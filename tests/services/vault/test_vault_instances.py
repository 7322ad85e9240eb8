"""Several instances on one database, and the end of a process at any moment."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from vault_parts import MemoryBackend, Running, b64, running_vault

from pyenclave.formats.audit_chain import verify_chain
from pyenclave.services.audit.reader import open_log
from pyenclave.services.storage import Secrets

HERE = Path(__file__).parent


@contextmanager
def two(tmp_path: Path, url: str) -> Iterator[tuple[Running, Running]]:
    """Serve two instances that share database, secrets and the key of the backend."""
    with ExitStack() as stack:
        found = []
        for name in ("first", "second"):
            folder = tmp_path / name
            folder.mkdir()
            secrets = Secrets(tmp_path / "secrets")
            found.append(stack.enter_context(running_vault(folder, url=url, secrets=secrets)))
        yield found[0], found[1]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def test_what_one_instance_did_the_other_knows(tmp_path: Path, database_url: str) -> None:
    """At once: made, changed, deleted, recovered, purged; pages go from one to the other."""
    with two(tmp_path, database_url) as (first, second):
        made = first.request("POST", "/keys/one/create", {"kty": "EC"}).json()
        version = made["key"]["kid"].rpartition("/")[2]
        assert second.request("GET", "/keys/one").json()["key"]["x"] == made["key"]["x"]
        signed = second.request(
            "POST", f"/keys/one/{version}/sign", {"alg": "ES256", "value": b64(bytes(32))}
        ).json()
        check = {"alg": "ES256", "digest": b64(bytes(32)), "value": signed["value"]}
        assert first.request("POST", "/keys/one//verify", check).json() == {"value": True}
        second.request("PATCH", "/keys/one/", {"attributes": {"enabled": False}})
        assert first.request("GET", "/keys/one").json()["attributes"]["enabled"] is False
        assert first.request("POST", "/keys/one//verify", check).status_code == 403
        first.request("DELETE", "/keys/one")
        assert second.request("GET", "/keys/one").status_code == 404
        second.request("POST", "/deletedkeys/one/recover")
        assert first.request("GET", "/keys/one").status_code == 200
        blob = first.request("POST", "/keys/one/backup").json()
        first.request("DELETE", "/keys/one")
        second.request("DELETE", "/deletedkeys/one")
        assert first.request("GET", "/deletedkeys/one").status_code == 404
        assert second.request("POST", "/keys/restore", blob).status_code == 200
        for number in range(4):
            first.request("POST", f"/keys/n{number}/create", {"kty": "EC"})
        link = first.request("GET", "/keys?maxresults=3").json()["nextLink"]
        rest = second.request("GET", link.removeprefix(first.url)).json()
        assert len(rest["value"]) == 2


def test_changes_at_once_are_all_kept(tmp_path: Path, database_url: str) -> None:
    """No update is lost, and of two versions made at once one is the newest everywhere."""
    with two(tmp_path, database_url) as (first, second):
        first.request("POST", "/keys/one/create", {"kty": "EC"})
        changes: list[dict[str, Any]] = [
            {"attributes": {"exp": 4_000_000_000}},
            {"attributes": {"nbf": 1_000}},
            {"tags": {"a": "b"}},
            {"key_ops": ["sign"]},
        ]

        def change(vault: Running, body: dict[str, Any]) -> Callable[[], int]:
            def send() -> int:
                with vault.client() as client:
                    return client.patch(
                        "/keys/one/?api-version=7.4",
                        json=body,
                        headers={"authorization": "Bearer admin"},
                    ).status_code

            return send

        works = [
            change(vault, body)
            for vault, body in zip((first, second, first, second), changes, strict=True)
        ]
        assert at_once(*works) == [200] * 4
        found = second.request("GET", "/keys/one").json()
        assert found["attributes"]["exp"] == 4_000_000_000
        assert found["attributes"]["nbf"] == 1_000
        assert found["tags"] == {"a": "b"}
        assert found["key"]["key_ops"] == ["sign"]

        def create(vault: Running) -> Callable[[], int]:
            return lambda: vault.request("POST", "/keys/two/create", {"kty": "EC"}).status_code

        assert at_once(create(first), create(second)) == [200, 200]
        ids = {
            vault.request("GET", "/keys/two").json()["key"]["kid"].rpartition("/")[2]
            for vault in (first, second)
        }
        assert len(ids) == 1
        listed = first.request("GET", "/keys/two/versions").json()["value"]
        assert len(listed) == 2


@contextmanager
def process(
    folder: Path, url: str, secrets: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Serve a vault in a process of its own."""
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(HERE), str(HERE.parents[2])])
    server = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "vault_process.py"),
            str(folder),
            url,
            str(secrets or folder / "secrets"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        headers = {"authorization": "Bearer admin"}
        with httpx.Client(base_url=url, verify=context, headers=headers, timeout=20) as client:
            yield server, client
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def make_keys(
    client: httpx.Client, prefix: str, kept: dict[str, str], enough: threading.Event, least: int
) -> list[threading.Thread]:
    """Make keys from four threads until the vault is gone; *kept* has what it acknowledged."""

    def make(thread: int) -> None:
        for number in range(10_000):
            name = f"{prefix}{thread}-{number}"
            try:
                answer = client.post(f"/keys/{name}/create?api-version=7.4", json={"kty": "EC"})
            except httpx.HTTPError:
                return
            assert answer.status_code == 200, answer.text
            kept[name] = answer.json()["key"]["x"]
            if len(kept) >= least:
                enough.set()

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    return threads


def kill_one(folder: Path, url: str, prefix: str, *, least: int = 60) -> dict[str, str]:
    """Serve a vault, kill it while it makes keys, return those that it acknowledged."""
    kept: dict[str, str] = {}
    enough = threading.Event()
    with process(folder, url) as (server, client):
        threads = make_keys(client, prefix, kept, enough, least)
        assert enough.wait(120)
        server.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert len(kept) >= least
    return kept


def check_kept(folder: Path, url: str, kept: dict[str, str]) -> None:
    """Every key is there, with its audit row, and usable; the chain of the log is whole."""
    backend = MemoryBackend(b"k" * 32)
    secrets = Secrets(folder / "secrets")
    with running_vault(folder, url=url, secrets=secrets, backend=backend) as vault:
        for name, x in kept.items():
            answer = vault.request("GET", f"/keys/{name}")
            assert answer.status_code == 200
            assert answer.json()["key"]["x"] == x
            body = {"alg": "ES256", "value": b64(bytes(32))}
            assert vault.request("POST", f"/keys/{name}//sign", body).status_code == 200
        created = [
            row["resource"].split("/")[2] for row in vault.rows() if row["action"] == "keys/create"
        ]
        assert len(created) == len(set(created))
        assert set(kept) <= set(created)
    with open_log(url) as log:
        report = verify_chain(log.items, start=log.start, head=log.head)
    assert report.intact, report.findings


def test_a_killed_vault_has_every_key_that_it_acknowledged(
    tmp_path: Path, database_url: str
) -> None:
    """With its audit row, and usable; the chain of the log is whole."""
    check_kept(tmp_path, database_url, kill_one(tmp_path, database_url, "k"))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_vault_that_is_killed_again_and_again_loses_nothing(
    tmp_path: Path, database_url: str
) -> None:
    """Twenty times over on one database, with all keys of before."""
    kept: dict[str, str] = {}
    for number in range(20):
        kept |= kill_one(tmp_path, database_url, f"k{number}-", least=5 + 7 * number % 60)
    check_kept(tmp_path, database_url, kept)
    kind = database_url.partition(":")[0]
    print(f"vault on {kind}: 20 kills, {len(kept)} keys acknowledged, 0 lost")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_vaults_on_one_database_are_killed_in_turns(tmp_path: Path, database_url: str) -> None:
    """One goes on while the other dies; neither loses what it said."""
    kept: dict[str, str] = {}
    kills = 0
    for number in range(10):
        pieces: tuple[dict[str, str], dict[str, str]] = ({}, {})
        enough = [threading.Event(), threading.Event()]
        with ExitStack() as stack:
            servers = []
            threads: list[list[threading.Thread]] = []
            for at, name in enumerate("ab"):
                server, client = stack.enter_context(
                    process(tmp_path / name, database_url, tmp_path / "secrets")
                )
                servers.append(server)
                threads.append(
                    make_keys(client, f"{name}{number}-", pieces[at], enough[at], 10 + 5 * at)
                )
            first = number % 2
            for at in (first, 1 - first):
                assert enough[at].wait(120)
                servers[at].send_signal(signal.SIGKILL)
                kills += 1
                for thread in threads[at]:
                    thread.join()
                # The other one is still there, and is asked for more.
                enough[1 - at].clear()
        kept |= pieces[0] | pieces[1]
    check_kept(tmp_path, database_url, kept)
    kind = database_url.partition(":")[0]
    print(f"two vaults on {kind}: {kills} kills, {len(kept)} keys acknowledged, 0 lost")
