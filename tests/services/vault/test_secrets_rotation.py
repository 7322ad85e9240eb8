"""The key of a secrets file is replaced: everything opens at every moment, nothing stays behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update
from test_vault_keks import KekBackend, Killed, add, desk_on, macs_of

from pyenclave.cli import main
from pyenclave.errors import ServiceError, StorageError
from pyenclave.services import rotation
from pyenclave.services.attestation import tables as attestation_tables
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.state import Shared
from pyenclave.services.audit.reader import open_log
from pyenclave.services.identity import rbac
from pyenclave.services.identity.caller import Caller
from pyenclave.services.rotation import parts_of, rotate_secrets
from pyenclave.services.storage import Database, Secrets
from pyenclave.services.vault import keks
from pyenclave.services.vault import tables as vault_tables
from pyenclave.services.vault.release import tables as release_tables
from pyenclave.services.vault.tables import versions

PARTS = (rbac.PART, vault_tables.PART, release_tables.PART, attestation_tables.PART)
OPTIONS = Options(url="https://localhost:1", algorithm="ES256", legacy_algorithm="ES256")
OWNER = Caller("tenant", "owner", None, "app", "0" * 64, 0.0)
KEYS = 60  # more than a page


class Place:
    """A database with everything in it that a service protects."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "services.db"
        self.url = f"sqlite:///{self.file}"
        self.secrets = Path(f"{self.file}.secrets")
        self.kept: dict[bytes, bytes] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Database]:
        with Database.open(self.url, parts=PARTS, durability="normal") as db:
            yield db

    def fill(self) -> None:
        async def work(db: Database) -> None:
            desk = desk_on(db, KekBackend(self.kept))
            for number in range(KEYS):
                await add(desk, f"k{number}", f"{number:032x}")
            await Shared(db, OPTIONS).start()

        with self.opened() as db:
            asyncio.run(work(db))
            rights = rbac.Rbac()
            db.submit(lambda tx: rights.bootstrap(tx, ["tenant/owner"])).result()
            db.submit(lambda tx: keks.note(tx, b"\xab" * 16, "current")).result()

    def works(self, db: Database) -> dict[Any, bytes]:
        """Use everything that is protected; return what the keys say."""
        shared = Shared(db, OPTIONS)
        asyncio.run(shared.start())
        for row in shared.view.keys:
            shared.opened(row)
        action = "Microsoft.KeyVault/vaults/keys/read"
        db.submit(lambda tx: rbac.Rbac().check(tx, OWNER, action, "/keys/k1")).result()
        assert db.submit(keks.states).result() == {b"\xab" * 16: "current"}
        return asyncio.run(macs_of(desk_on(db, KekBackend(self.kept))))

    def under(self, name: bytes) -> list[str]:
        """Return the tables that have anything which names a key of the secrets."""
        blob = b"PYESEC1\0" + name
        marks = (blob, base64.b64encode(blob[:15]))
        found = []
        with contextlib.closing(sqlite3.connect(self.file)) as stranger:
            names = [row[0] for row in stranger.execute("SELECT name FROM sqlite_master")]
            for table in names:
                if table.startswith(("sqlite_", "ix_")):
                    continue
                with contextlib.suppress(sqlite3.OperationalError):  # an index
                    for row in stranger.execute(f"SELECT * FROM {table}"):
                        cells = [c.encode() if isinstance(c, str) else c for c in row]
                        if any(m in c for c in cells if isinstance(c, bytes) for m in marks):
                            found.append(table)
        return sorted(set(found))


EVERYWHERE = [
    "attestation_configuration", "attestation_keys", "attestation_secrets", "audit_keys",
    "role_assignments", "vault_kek_list", "vault_versions",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("secrets"))
    place.fill()
    return place


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    copy = Place(tmp_path)
    copy.file.write_bytes(made.file.read_bytes())
    copy.secrets.write_bytes(made.secrets.read_bytes())
    for file in (copy.file, copy.secrets):
        file.chmod(0o600)
    copy.kept = made.kept
    return copy


def test_everything_is_moved_and_the_old_key_is_gone(place: Place) -> None:
    """Also for an instance that ran all the time and was told nothing."""
    (old,) = Secrets(place.secrets).ids
    assert place.under(old) == EVERYWHERE  # a table that is new here needs a renewal, too
    assert [part.name for part in parts_of(place.url)] == [part.name for part in PARTS]
    with place.opened() as running, place.opened() as db:
        before = place.works(running)
        done = rotate_secrets(db, PARTS, caller="ada")
        assert (done.resumed, done.destroyed, done.kept) == (False, (), (old.hex(),))
        assert (done.moved >= KEYS + 6, done.damaged) == (True, ())
        assert place.under(old) == []
        assert place.under(bytes.fromhex(done.key)) == EVERYWHERE
        # What the other one writes now is under the new key, without a word to it.
        desk = desk_on(running, KekBackend(place.kept))
        asyncio.run(add(desk, "late", "f" * 32))
        assert place.under(old) == []
        assert place.works(running).items() >= before.items()
        again = rotate_secrets(db, PARTS, destroy=True, caller="ada")
        assert (len(again.destroyed), again.kept) == (2, ())
        assert place.works(running).items() >= before.items()
    assert [name.hex() for name in Secrets(place.secrets).ids] == [again.key]
    with place.opened() as db:
        assert place.works(db).items() >= before.items()
    with open_log(place.url) as log:
        bodies = [bytes(item.body).decode() for item in log.items if hasattr(item, "body")]
    verbs = [w for body in bodies for w in ("made", "moved", "destroyed") if f"secrets/{w}" in body]
    assert verbs == ["made", "moved", "made", "moved", "destroyed"]
    assert not any(secret in body for body in bodies for secret in _lines(place))


def _lines(place: Place) -> list[str]:
    return place.secrets.read_text().splitlines()[1:]


def test_a_rotation_that_was_killed_at_any_step_is_ended_by_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each page, and before and after each change of the file."""
    real = {
        (rotation, "_page"): rotation._page,
        (Secrets, "rotate"): Secrets.rotate,
        (Secrets, "forget"): Secrets.forget,
    }
    seen = 0
    kill_at = (0, False)

    def step(work: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if kill_at == (seen, False):
                raise Killed
            done = work(*arguments, **options)
            if kill_at == (seen, True):
                raise Killed
            return done

        return counted

    def rotated(at: int, *, after: bool) -> None:
        nonlocal seen, kill_at
        seen, kill_at = 0, (at, after)
        with monkeypatch.context() as patch:
            for (owner, name), work in real.items():
                patch.setattr(owner, name, step(work))
            with place.opened() as db:
                rotate_secrets(db, PARTS, destroy=True)

    with place.opened() as db:
        before = place.works(db)
    rotated(0, after=False)
    steps = seen
    assert steps > 15
    # Every one before it is done, and of those that write after it too.
    for at in range(1, steps + 1):
        with pytest.raises((Killed, Exception)) as caught:
            rotated(at, after=at % 2 == 0)
        assert isinstance(caught.value, Killed)
        with place.opened() as db:
            assert place.works(db) == before
            done = rotate_secrets(db, PARTS, destroy=True)
            assert place.works(db) == before
        assert [name.hex() for name in Secrets(place.secrets).ids] == [done.key]
        assert place.under(bytes.fromhex(done.key)) == EVERYWHERE


def test_what_was_begun_is_ended_and_no_other_key_made(place: Place) -> None:
    (old,) = Secrets(place.secrets).ids
    Secrets(place.secrets).rotate()
    newest = Secrets(place.secrets).ids[0]
    with place.opened() as db:
        done = rotate_secrets(db, PARTS)
    assert (done.resumed, done.key, done.kept) == (True, newest.hex(), (old.hex(),))
    assert place.under(old) == []


@pytest.mark.parametrize(
    "damage",
    [
        update(versions).where(versions.c.name == "k7").values(enabled=False),
        text("UPDATE role_assignments SET scope = '/keys/x'"),
        text("UPDATE role_assignments SET seal = 'x'"),
        text("UPDATE vault_kek_list SET sealed = x'00'"),
        text("UPDATE attestation_secrets SET protected = x'00'"),
    ],
    ids=str,
)
def test_a_row_that_does_not_open_is_named_and_keeps_the_old_key(place: Place, damage: Any) -> None:
    """Its copy in a backup may need it."""
    (old,) = Secrets(place.secrets).ids
    with place.opened() as db:
        db.submit(lambda tx: tx.connection.execute(damage)).result()
        with pytest.raises(ServiceError) as caught:
            rotate_secrets(db, PARTS, destroy=True)
        assert (caught.value.status, caught.value.inner) == (409, "DamagedRows")
        done = rotate_secrets(db, PARTS)
        assert str(caught.value.found) == ", ".join(done.damaged) != ""
        with pytest.raises(ServiceError):
            rotate_secrets(db, PARTS, destroy=True)
    assert old in Secrets(place.secrets).ids


def test_a_register_that_somebody_changed_stops_everything(place: Place) -> None:
    with place.opened() as db:
        change = text("UPDATE attestation_keys SET starts = '2020-01-01T00:00:00+00:00'")
        db.submit(lambda tx: tx.connection.execute(change)).result()
        with pytest.raises(ServiceError) as caught:
            rotate_secrets(db, PARTS, destroy=True)
        assert caught.value.inner == "StoredConfigurationChanged"
    assert len(Secrets(place.secrets).ids) == 1


def test_who_rotates_meanwhile_is_not_run_over(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the end another one put a key there: nothing is destroyed."""
    forget = Secrets.forget

    def late(self: Secrets, ids: Any, *, newest: bytes) -> None:
        Secrets(place.secrets).rotate()
        forget(self, ids, newest=newest)

    monkeypatch.setattr(Secrets, "forget", late)
    with place.opened() as db, pytest.raises(StorageError, match="another newest key"):
        rotate_secrets(db, PARTS, destroy=True)
    assert len(Secrets(place.secrets).ids) == 3
    monkeypatch.undo()
    with place.opened() as db:
        done = rotate_secrets(db, PARTS, destroy=True)
        assert (done.resumed, len(done.destroyed)) == (True, 2)
        assert len(place.works(db)) == KEYS


def test_a_signing_key_that_was_made_meanwhile_is_under_the_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is protected outside of any transaction, before it is written in one."""
    from pyenclave.services.attestation import state

    place = Place(tmp_path)
    make = state.make_key

    def slowly(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        Secrets(place.secrets).rotate()
        return made

    monkeypatch.setattr(state, "make_key", slowly)
    with place.opened() as db:
        asyncio.run(Shared(db, OPTIONS).start())
    *_, old = Secrets(place.secrets).ids
    assert "attestation_keys" not in place.under(old)


def test_an_operator_rotates_and_destroys(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = place.file.parent / "state"
    state.mkdir(mode=0o700)
    monkeypatch.setenv("PYENCLAVE_STATE", str(state))
    command = ["vault", "rotate-secrets", "--dev", "--database", place.url]
    (old,) = Secrets(place.secrets).ids
    assert main(command) == 0
    assert f"kept      {old.hex()}: it opens backups" in capsys.readouterr().out
    assert main([*command, "--destroy-old", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["resumed"], len(said["destroyed"]), said["kept"]) == (False, 2, [])
    assert [name.hex() for name in Secrets(place.secrets).ids] == [said["key"]]
    with place.opened() as db:
        db.submit(
            lambda tx: tx.connection.execute(text("UPDATE vault_versions SET enabled = 0"))
        ).result()
    assert main([*command, "--destroy-old"]) == 1
    assert "may need the older keys" in capsys.readouterr().err
    assert main(command) == 1
    assert capsys.readouterr().out.count("DAMAGED") == KEYS


def test_what_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    command = ["vault", "rotate-secrets", "--dev"]
    for more in ([], ["--database", f"sqlite:///{tmp_path}/none.db"], ["--config", "x"]):
        assert main([*command, *more]) == 2
    server = "postgresql://nobody@/none?host=/nonexistent"
    assert main([*command, "--database", server, "--destroy-old"]) == 2
    assert "--this-database-only" in capsys.readouterr().err
    assert main([*command, "--database", server]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert not list((tmp_path / "state").glob("*secrets*"))
