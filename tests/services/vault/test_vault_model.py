"""The life of keys against a small model of it: create, delete, recover, purge, restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from vault_parts import Running, running_vault

NAMES = st.sampled_from(["a", "b", "c-1"])


class KeyLife(RuleBasedStateMachine):
    """What the vault must say, kept in three dictionaries."""

    running: Running

    @initialize()
    def start(self) -> None:
        vault = self.running
        for name in ("a", "b", "c-1"):
            vault.request("DELETE", f"/keys/{name}")
            vault.request("DELETE", f"/deletedkeys/{name}")
        self.active: dict[str, list[str]] = {}
        self.deleted: dict[str, list[str]] = {}
        self.disabled: set[str] = set()
        self.backups: list[tuple[str, list[str], set[str], str]] = []

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = self.running.request(method, path, body)
        return answer.status_code, answer.json() if answer.content else None

    @rule(name=NAMES)
    def create(self, name: str) -> None:
        status, body = self.send("POST", f"/keys/{name}/create", {"kty": "EC"})
        if name in self.deleted:
            assert status == 409
            assert body["error"]["innererror"]["code"] == "ObjectIsDeletedButRecoverable"
        else:
            assert status == 200
            self.active.setdefault(name, []).append(body["key"]["kid"].rpartition("/")[2])

    @rule(name=NAMES)
    def rotate(self, name: str) -> None:
        status, body = self.send("POST", f"/keys/{name}/rotate")
        if name in self.active:
            assert status == 200
            self.active[name].append(body["key"]["kid"].rpartition("/")[2])
        else:
            assert status == (409 if name in self.deleted else 404)

    @rule(name=NAMES, data=st.data())
    def switch(self, name: str, data: st.DataObject) -> None:
        versions = self.active.get(name, ["0" * 32])
        version = data.draw(st.sampled_from(versions))
        enabled = data.draw(st.booleans())
        path = f"/keys/{name}/{version}"
        status, body = self.send("PATCH", path, {"attributes": {"enabled": enabled}})
        assert status == (200 if name in self.active else 404)
        if status == 200:
            assert body["attributes"]["enabled"] is enabled
            (self.disabled.discard if enabled else self.disabled.add)(version)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        status, body = self.send("DELETE", f"/keys/{name}")
        assert status == (200 if name in self.active else 404)
        if status == 200:
            versions = self.active.pop(name)
            assert body["key"]["kid"].endswith(versions[-1])
            self.deleted[name] = versions

    @rule(name=NAMES)
    def recover(self, name: str) -> None:
        status, _ = self.send("POST", f"/deletedkeys/{name}/recover")
        assert status == (200 if name in self.deleted else 404)
        if status == 200:
            self.active[name] = self.deleted.pop(name)

    @rule(name=NAMES)
    def purge(self, name: str) -> None:
        status, _ = self.send("DELETE", f"/deletedkeys/{name}")
        assert status == (204 if name in self.deleted else 404)
        self.deleted.pop(name, None)

    @rule(name=NAMES)
    def backup(self, name: str) -> None:
        status, body = self.send("POST", f"/keys/{name}/backup")
        assert status == (200 if name in self.active else 404)
        if status == 200:
            versions = list(self.active[name])
            self.backups.append((name, versions, self.disabled & set(versions), body["value"]))

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        if not self.backups:
            return
        name, versions, disabled, blob = data.draw(st.sampled_from(self.backups))
        status, _ = self.send("POST", "/keys/restore", {"value": blob})
        taken = name in self.active or name in self.deleted
        assert status == (409 if taken else 200)
        if status == 200:
            self.active[name] = list(versions)
            self.disabled = (self.disabled - set(versions)) | disabled

    @invariant()
    def what_is_shown_is_what_is_there(self) -> None:
        if not hasattr(self, "active"):
            return
        _, keys = self.send("GET", "/keys")
        assert {item["kid"].rpartition("/")[2] for item in keys["value"]} == set(self.active)
        _, gone = self.send("GET", "/deletedkeys")
        assert {item["kid"].rpartition("/")[2] for item in gone["value"]} == set(self.deleted)
        for name, versions in self.active.items():
            status, body = self.send("GET", f"/keys/{name}")
            assert status == 200
            assert body["key"]["kid"].endswith(f"/{name}/{versions[-1]}")
            assert body["attributes"]["enabled"] is (versions[-1] not in self.disabled)
            _, listed = self.send("GET", f"/keys/{name}/versions")
            found = [item["kid"].rpartition("/")[2] for item in listed["value"]]
            assert found == versions[:25]


def run(examples: int, steps: int, running: Running) -> None:
    KeyLife.running = running
    run_state_machine_as_test(
        KeyLife,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        yield stack.enter_context(running_vault(folder))


def test_keys_live_as_the_model_says(running: Running) -> None:
    """A few short lives; the long test has many."""
    run(8, 20, running)


@pytest.mark.long
def test_keys_live_as_the_model_says_for_long(running: Running) -> None:
    """Two hundred lives of fifty steps."""
    run(200, 50, running)
