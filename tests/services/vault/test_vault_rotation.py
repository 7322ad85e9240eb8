"""Durations, rotation policies, and the caretaker that follows them by a clock that tests move."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vault_parts import Clock, MemoryBackend, Running, Table, running_vault

from pyenclave.errors import ServiceError
from pyenclave.services.storage import Database, Secrets
from pyenclave.services.vault.durations import Duration
from pyenclave.services.vault.rotation_policy import RotationPolicy
from pyenclave.services.vault.service import Vault
from pyenclave.services.vault.tables import PART


@pytest.mark.parametrize(
    "text",
    [
        *("", "P", "PT", "P1", "1D", "P1DT", "P-1D", "P1.5D", "p1d", "P1D ", "P0D", "PT0S"),
        *("P1M1Y", "P1D1W", "PT1D", "P100Y1D9999M", "P99999D", "P１D", "P" + "1" * 80 + "D"),
        "P1D\n",
    ],
)
def test_a_duration_of_another_form_is_refused(text: str) -> None:
    """Also of other digits, of zero, and of a hundred years and more."""
    with pytest.raises(ValueError, match="duration"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("P90D", "2026-01-01T00:00:00", "2026-04-01T00:00:00"),
        ("P1M", "2026-01-31T12:00:00", "2026-02-28T12:00:00"),
        ("P1M", "2024-01-31T12:00:00", "2024-02-29T12:00:00"),
        ("P1Y", "2024-02-29T00:00:00", "2025-02-28T00:00:00"),
        ("P1Y2M3W4DT5H6M7S", "2026-01-01T00:00:00", "2027-03-26T05:06:07"),
        ("PT48H", "2026-12-31T00:00:00", "2027-01-02T00:00:00"),
        ("P2W", "2026-02-20T00:00:00", "2026-03-06T00:00:00"),
    ],
)
def test_months_are_calendar_months(text: str, start: str, end: str) -> None:
    """A month after 31 January is the end of February."""
    first = int(dt.datetime.fromisoformat(start + "+00:00").timestamp())
    last = int(dt.datetime.fromisoformat(end + "+00:00").timestamp())
    assert Duration.parse(text).after(first) == last


@given(
    st.integers(0, 4_000_000_000),
    st.integers(0, 1200),
    st.integers(0, 36_000),
    st.integers(0, 100_000),
)
def test_a_duration_goes_forth_and_back(start: int, months: int, days: int, hours: int) -> None:
    """Forward is later, backward earlier, and without months they undo each other."""
    if months + days + hours == 0:
        return
    try:
        duration = Duration.parse(f"P{months}M{days}DT{hours}H")
    except ValueError:
        return
    assert duration.after(start) > start
    assert duration.before(start) < start or duration.before(start) == 0
    if months == 0:
        assert duration.after(start) == start + days * 86400 + hours * 3600


def action(kind: str, **trigger: Any) -> dict[str, Any]:
    return {"action": {"type": kind}, "trigger": trigger}


@pytest.mark.parametrize(
    "body",
    [
        {"lifetimeActions": "x"},
        {"lifetimeActions": [1]},
        {"lifetimeActions": [{}]},
        {"lifetimeActions": [action("Delete", timeAfterCreate="P30D")]},
        {"lifetimeActions": [action("Rotate")]},
        {"lifetimeActions": [{"action": {"type": "Rotate"}}]},
        {"lifetimeActions": [action("Rotate", timeAfterCreate="P6D")]},
        {"lifetimeActions": [action("Rotate", timeAfterCreate="soon")]},
        {"lifetimeActions": [action("Rotate", timeAfterCreate=30)]},
        {"lifetimeActions": [action("Rotate", timeAfterCreate="P30D", timeBeforeExpiry="P8D")]},
        {"lifetimeActions": [action("Rotate", timeBeforeExpiry="P30D")]},
        {"lifetimeActions": [action("Notify", timeAfterCreate="P30D")]},
        {"lifetimeActions": [action("Rotate", timeAfterCreate="P30D")] * 2},
        {"lifetimeActions": [action("Rotate", timeAfterCreate="P30D")] * 3},
        {"attributes": {"expiryTime": "P27D"}},
        {"attributes": {"expiryTime": 90}},
        {
            "attributes": {"expiryTime": "P30D"},
            "lifetimeActions": [action("Rotate", timeAfterCreate="P30D")],
        },
        {
            "attributes": {"expiryTime": "P30D"},
            "lifetimeActions": [action("Rotate", timeBeforeExpiry="P31D")],
        },
    ],
)
def test_a_rotation_policy_that_cannot_be_followed_is_refused(body: dict[str, Any]) -> None:
    """400, with the member."""
    with pytest.raises(ServiceError) as caught:
        RotationPolicy.read(body)
    assert caught.value.status == 400


def test_actions_are_read_in_any_case_and_written_in_azures() -> None:
    """The value is compared without case, as the interface's description says."""
    body = {
        "lifetimeActions": [action("rotate", timeAfterCreate="P30D")],
        "attributes": {"expiryTime": "P90D"},
    }
    policy = RotationPolicy.read(body)
    assert policy.shown()["lifetimeActions"][0]["action"] == {"type": "Rotate"}
    assert RotationPolicy.from_json(policy.to_json()) == policy


def rounds(vault: Running) -> None:
    """Let the caretaker do what is due, from another thread than the server's."""
    asyncio.run(vault.vault.caretaker.round())


def versions(vault: Running, name: str) -> int:
    return len(vault.request("GET", f"/keys/{name}/versions").json()["value"])


def test_keys_are_rotated_and_announced_on_time(tmp_path: Path) -> None:
    """Not before, once, with a new life; a disabled key is left alone."""
    with running_vault(tmp_path, interval=3600.0) as vault:
        policy = {
            "lifetimeActions": [
                action("Rotate", timeBeforeExpiry="P10D"),
                action("Notify", timeBeforeExpiry="P20D"),
            ],
            "attributes": {"expiryTime": "P40D"},
        }
        for name in ("one", "off", "by-hand"):
            vault.request("POST", f"/keys/{name}/create", {"kty": "EC"})
        for name in ("one", "off"):
            assert vault.request("PUT", f"/keys/{name}/rotationpolicy", policy).status_code == 200
            vault.request("POST", f"/keys/{name}/rotate")
        vault.request("PATCH", "/keys/off/", {"attributes": {"enabled": False}})
        start = vault.request("GET", "/keys/one").json()
        for days, wanted, notices in ((19, 2, 0), (21, 2, 1), (29, 2, 1), (31, 3, 1), (32, 3, 1)):
            vault.clock.ahead = dt.timedelta(days=days)
            for _ in range(2):
                rounds(vault)
            assert versions(vault, "one") == wanted
            told = [row for row in vault.rows() if row["action"] == "keys/nearexpiry"]
            assert len([row for row in told if row["resource"] == "/keys/one"]) == notices
        assert versions(vault, "off") == 2
        assert versions(vault, "by-hand") == 1
        newest = vault.request("GET", "/keys/one").json()
        assert newest["key"]["kid"] != start["key"]["kid"]
        lived = newest["attributes"]["exp"] - newest["attributes"]["created"]
        assert lived == 40 * 86400
        row = next(row for row in reversed(vault.rows()) if row["action"] == "keys/rotate")
        assert (row["caller"], row["rule"]) == ("pyenclave/vault", "the rotation policy")


def test_two_instances_rotate_a_key_once(tmp_path: Path) -> None:
    """Each looks, both make a key, one of them keeps it."""
    clock = Clock()
    with running_vault(tmp_path, interval=3600.0, clock=clock) as first:
        first.request("POST", "/keys/one/create", {"kty": "EC"})
        policy = {"lifetimeActions": [action("Rotate", timeAfterCreate="P10D")]}
        first.request("PUT", "/keys/one/rotationpolicy", policy)
        with Database.open(
            f"sqlite:///{tmp_path / 'vault.db'}", parts=[PART], durability="normal", clock=clock
        ) as db:
            second = Vault(
                db,
                backend=MemoryBackend(b"k" * 32),
                rights=Table(),
                authenticator=first.vault.service.authenticator,  # type: ignore[arg-type]
            )
            clock.ahead = dt.timedelta(days=11)

            async def both() -> None:
                await asyncio.gather(first.vault.caretaker.round(), second.caretaker.round())

            asyncio.run(both())
            asyncio.run(both())
        assert versions(first, "one") == 2


def test_nothing_is_left_of_a_deleted_key_whose_time_is_over(tmp_path: Path) -> None:
    """Even before the caretaker comes, it is not shown and its name is free."""
    with running_vault(tmp_path, interval=3600.0) as vault:
        for name in ("gone", "again", "kept"):
            vault.request("POST", f"/keys/{name}/create", {"kty": "EC"})
            vault.request("DELETE", f"/keys/{name}")
        vault.clock.ahead = dt.timedelta(days=89)
        rounds(vault)
        assert vault.request("POST", "/keys/again/create", {"kty": "EC"}).status_code == 409
        assert vault.request("POST", "/deletedkeys/kept/recover").status_code == 200
        vault.clock.ahead = dt.timedelta(days=91)
        assert vault.request("GET", "/deletedkeys/gone").status_code == 404
        assert vault.request("POST", "/deletedkeys/gone/recover").status_code == 404
        assert vault.request("GET", "/deletedkeys").json()["value"] == []
        assert vault.request("POST", "/keys/again/create", {"kty": "EC"}).status_code == 200
        assert versions(vault, "again") == 1
        rounds(vault)

        def left(tx: Any) -> int:
            return int(
                tx.connection.exec_driver_sql(
                    "SELECT count(*) FROM vault_versions WHERE name = 'gone'"
                ).scalar_one()
            )

        assert vault.db.submit(left).result() == 0
        assert vault.request("GET", "/keys/kept").status_code == 200
        purged = [row for row in vault.rows() if row["action"] == "keys/purge"]
        assert [row["resource"] for row in purged] == ["/keys/gone"]


def test_purge_protection_keeps_deleted_keys(tmp_path: Path) -> None:
    """403 until their time; the level of recovery says so."""
    from pyenclave.services.vault.records import Retention

    retention = Retention(days=7, purge_protection=True)
    with running_vault(tmp_path, retention=retention) as vault:
        made = vault.request("POST", "/keys/one/create", {"kty": "EC"}).json()
        assert made["attributes"]["recoveryLevel"] == "CustomizedRecoverable"
        assert made["attributes"]["recoverableDays"] == 7
        vault.request("DELETE", "/keys/one")
        assert vault.request("DELETE", "/deletedkeys/one").status_code == 403
        assert vault.request("POST", "/deletedkeys/one/recover").status_code == 200
    with pytest.raises(ValueError, match="7 to 90"):
        Retention(days=6)


def test_another_service_key_opens_nothing(tmp_path: Path) -> None:
    """Rows, too: an instance with other secrets fails closed instead of believing them."""
    with running_vault(tmp_path) as vault:
        assert vault.request("POST", "/keys/one/create", {"kty": "EC"}).status_code == 200
    with running_vault(tmp_path, secrets=Secrets.ephemeral()) as vault:
        answer = vault.request("GET", "/keys/one")
        assert answer.status_code == 500
        assert "damaged" in answer.json()["error"]["message"]
