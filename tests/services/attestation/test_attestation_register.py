"""Who writes to the database sets no policy, gives no signer and puts no old row back."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")

from sqlalchemy import select

from pyenclave.errors import ServiceError, StorageError
from pyenclave.formats.x509 import Certificate
from pyenclave.services.attestation import tables
from pyenclave.services.attestation.defaults import DEFAULT_POLICIES
from pyenclave.services.attestation.options import Options
from pyenclave.services.attestation.state import Shared
from pyenclave.services.attestation.uploads import unsecured_policy
from pyenclave.services.storage import tables as storage_tables
from pyenclave.services.storage.database import Database
from pyenclave.services.web import health

POLICY = DEFAULT_POLICIES["SgxEnclave"] + "\n"
LISTED = (tables.policies, tables.signers, tables.keys, tables.used_uploads)
ALL = (*LISTED, tables.configuration)
# One algorithm: RSA keys are slow to make, and the rows are of one form.
OPTIONS = Options(url="https://localhost:1", algorithm="ES256", legacy_algorithm="ES256")


def _certificate(name: str) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    said = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(said).issuer_name(said)
    builder = builder.public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
    made = builder.not_valid_after(datetime(2036, 1, 1, tzinfo=UTC)).sign(key, hashes.SHA256())
    return Certificate.from_der(made.public_bytes(Encoding.DER))


SIGNERS = [_certificate("one"), _certificate("two")]


@contextmanager
def instance(folder: Path) -> Iterator[tuple[Database, Shared]]:
    """Start an instance on the database in *folder*."""
    with Database.open(f"sqlite:///{folder / 'db'}", parts=[tables.PART]) as db:
        shared = Shared(db, OPTIONS)
        asyncio.run(shared.start())
        yield db, shared


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a database that has two rows of everything."""
    folder = tmp_path_factory.mktemp("register")

    def fill(tx: Any) -> None:
        for place, (kind, signer) in enumerate(zip(("SgxEnclave", "TdxVm"), SIGNERS, strict=True)):
            shared.add_signer(tx, signer)
            shared.set_policy(tx, kind, text=POLICY, upload=unsecured_policy(POLICY), signer=signer)
            assert shared.use_upload(tx, bytes([place]) * 32, f"policies/set {kind}")
        key = tx.connection.execute(select(tables.keys)).one()._mapping
        # Never opened, and different in every column, so that exchanging one changes something.
        other = {name: str(value)[:-1] for name, value in key.items()}
        times = dict.fromkeys(("created", "starts", "expires"), "2020-01-01T00:00:00+00:00")
        other |= {"kid": "another", "algorithm": "PS256", "private": "AAAA", **times}
        shared._registry.put(tx, tables.keys, other)

    with instance(folder) as (db, shared):
        db.submit(fill).result()
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Return a folder with a copy of that database."""
    for file in made.iterdir():
        shutil.copy2(file, tmp_path / file.name)
    return tmp_path


def _sql(place: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    with closing(sqlite3.connect(place / "db")) as stranger, stranger:
        for statement, values in statements:
            stranger.execute(statement, values)
        # He wants to be believed at once.
        stranger.execute("UPDATE audit_head SET generation = generation + 1")


def _rows(place: Path, name: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(place / "db")) as stranger:
        return stranger.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()


def _put_back(name: str, rows: list[tuple[Any, ...]]) -> list[tuple[str, tuple[Any, ...]]]:
    marks = ", ".join("?" * len(rows[0]))
    return [
        (f"DELETE FROM {name}", ()),
        *((f"INSERT INTO {name} VALUES ({marks})", row) for row in rows),
    ]


def _refused(place: Path) -> ServiceError:
    """Demand that no instance starts on it, and that the log says why."""
    with pytest.raises(ServiceError) as caught, instance(place):
        pass
    assert caught.value.inner == "StoredConfigurationChanged"
    (body,) = [row for (row,) in _audit(place) if "configuration/read" in row]
    assert json.loads(body)["decision"] == "failed"
    return caught.value


def _audit(place: Path) -> list[tuple[str]]:
    with closing(sqlite3.connect(place / "db")) as reader:
        return reader.execute("SELECT body FROM audit ORDER BY seq").fetchall()


def test_what_was_written_is_read(place: Path) -> None:
    """The rest of this file changes something in it."""
    with instance(place) as (_, shared):
        assert {signer.der for signer in shared.view.signers} == {item.der for item in SIGNERS}
        assert shared.view.policies["TdxVm"].text == POLICY
        assert len(shared.view.keys) == 2


@pytest.mark.parametrize(
    ("table", "column"),
    [(table.name, column.name) for table in ALL for column in table.columns],
)
@pytest.mark.parametrize("how", ["altered", "of another type", "exchanged"])
def test_an_altered_column_is_refused(place: Path, table: str, column: str, how: str) -> None:
    """Every column of every row that decides something."""
    rows = _rows(place, table)
    first = rows[0]
    at = next(item for item in ALL if item.name == table).columns.keys().index(column)
    value = first[at]
    changed: Any
    if how == "exchanged":
        if len(rows) == 1 or rows[1][at] == value:
            pytest.skip("nothing to exchange it with")
        rows[0] = (*first[:at], rows[1][at], *first[at + 1 :])
        rows[1] = (*rows[1][:at], value, *rows[1][at + 1 :])
        _sql(place, *_put_back(table, rows))
    else:
        if isinstance(value, int):
            changed = value + 7 if how == "altered" else "x"
            if how == "of another type" and at == 0:
                pytest.skip("SQLite gives a number as primary key no other type")
        elif how == "altered":
            changed = value + "A"
        else:
            changed = value.encode()
        rows[0] = (*first[:at], changed, *first[at + 1 :])
        _sql(place, *_put_back(table, rows))
    _refused(place)


@pytest.mark.parametrize("table", [table.name for table in ALL])
def test_a_removed_row_is_missed(place: Path, table: str) -> None:
    rows = _rows(place, table)
    _sql(place, (f"DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})", ()))
    assert len(_rows(place, table)) == len(rows) - 1
    _refused(place)


@pytest.mark.parametrize("table", [table.name for table in ALL])
def test_all_rows_removed_are_missed(place: Path, table: str) -> None:
    """Also the register itself: a database without one is new only if it is empty."""
    _sql(place, (f"DELETE FROM {table}", ()))
    _refused(place)


@pytest.mark.parametrize("table", [table.name for table in LISTED])
def test_an_added_row_is_refused(place: Path, table: str) -> None:
    """A copy of a row under another name: everything in it was written by the service."""
    row = list(_rows(place, table)[0])
    row[0] = 3 if table == tables.used_uploads.name else "AzureGuest"
    if table == tables.used_uploads.name:
        row[1] = "cc" * 32
    marks = ", ".join("?" * len(row))
    _sql(place, (f"INSERT INTO {table} VALUES ({marks})", tuple(row)))
    _refused(place)


def test_text_that_is_no_text_is_refused(place: Path) -> None:
    """What SQLite's driver cannot read ends in a refusal as well."""
    _sql(place, ("UPDATE attestation_policies SET text = CAST(x'ff' AS TEXT)", ()))
    _refused(place)


@pytest.mark.parametrize("table", [table.name for table in ALL])
def test_rows_from_before_are_refused(place: Path, table: str) -> None:
    """What the service wrote once and then changed; also if only the register is put back."""
    before = _rows(place, table)

    def change(tx: Any) -> None:
        shared.set_policy(tx, "SgxEnclave", text=POLICY + "\n", upload="x", signer=None)
        shared.reset_policy(tx, "TdxVm")
        shared.remove_signer(tx, SIGNERS[0])
        shared.use_upload(tx, bytes(32), "certificates/remove")
        shared._registry.remove(tx, tables.keys, "another")

    with instance(place) as (db, shared):
        assert shared.view.register is not None
        db.submit(lambda tx: shared.use_upload(tx, b"\7" * 32, "again")).result()
        db.submit(change).result()
    assert before != _rows(place, table)
    _sql(place, *_put_back(table, before))
    _refused(place)


def test_a_running_instance_knows_the_whole_of_a_moment_before(place: Path) -> None:
    """All rows and their register put back: who has seen a later serial number refuses."""
    before = {table.name: _rows(place, table.name) for table in ALL}
    with instance(place) as (db, shared):
        db.submit(lambda tx: shared.reset_policy(tx, "SgxEnclave")).result()
        view = db.submit(shared.renewed).result()
        assert view.register is not None
        _sql(place, *(part for name, rows in before.items() for part in _put_back(name, rows)))
        with pytest.raises(ServiceError) as caught:
            db.submit(shared.renewed).result()
        assert caught.value.inner == "StoredConfigurationChanged"
        assert "an old one" in str(caught.value.found)
        assert shared.view.register == view.register
        with pytest.raises(ServiceError):  # nor is anything written on top of it
            db.submit(lambda tx: shared.reset_policy(tx, "TdxVm")).result()


def test_the_audit_log_shows_a_moment_before_to_the_auditor(place: Path) -> None:
    """What a fresh instance cannot know: its start has an older serial than a change before it."""
    before = {table.name: _rows(place, table.name) for table in ALL}
    with instance(place) as (db, shared):
        register = db.submit(lambda tx: shared.reset_policy(tx, "SgxEnclave")).result()
    _sql(place, *(part for name, rows in before.items() for part in _put_back(name, rows)))
    with instance(place):
        pass
    starts = [json.loads(row) for (row,) in _audit(place) if '"attestation/start"' in row]
    shown = [row["details"]["register"] for row in starts]
    assert shown[-1] == shown[-2]
    assert shown[-1]["serial"] < register.shown["serial"]


def test_a_change_that_was_undone_is_not_remembered(place: Path) -> None:
    """A serial number counts once it is committed."""

    def undone(tx: Any) -> None:
        shared.reset_policy(tx, "SgxEnclave")
        shared.renewed(tx)
        raise KeyError("undone")

    with instance(place) as (db, shared):
        register = db.submit(shared.renewed).result().register
        with pytest.raises(KeyError):
            db.submit(undone).result()
        assert db.submit(shared.renewed).result().register == register
        db.submit(lambda tx: shared.reset_policy(tx, "SgxEnclave")).result()


def test_another_instance_sees_each_change(place: Path) -> None:
    """Serial numbers go on from each other's."""
    with instance(place) as (db, one), instance(place) as (other_db, other):
        for place_, kind in enumerate(("SgxEnclave", "TdxVm", "PyEnclave", "AzureGuest")):
            writer, shared = ((db, one), (other_db, other))[place_ % 2]
            text = f"{POLICY}{chr(10) * place_}"
            writer.submit(
                lambda tx, shared=shared, kind=kind, text=text: shared.set_policy(
                    tx, kind, text=text, upload="x", signer=None
                )
            ).result()
            views = [db.submit(one.renewed).result(), other_db.submit(other.renewed).result()]
            assert [view.policies[kind].text for view in views] == [text, text]
            assert views[0].register == views[1].register


def test_rows_from_before_there_was_a_register_are_not_sealed_unseen(tmp_path: Path) -> None:
    """A schema of before: with policies it is refused by name, without it begins anew."""
    (tmp_path / "db").touch(mode=0o600)
    with closing(sqlite3.connect(tmp_path / "db")) as old, old:
        old.execute("CREATE TABLE storage_parts (name TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        old.execute("INSERT INTO storage_parts VALUES ('attestation', 2)")
        for table in (*LISTED, tables.secrets, tables.used_nonces):
            old.execute(f"CREATE TABLE {table.name} (type TEXT, text TEXT)")
        old.execute("INSERT INTO attestation_policies VALUES ('SgxEnclave', 'x')")
    with pytest.raises(StorageError, match="before they were sealed"), instance(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "db")) as old, old:
        old.execute("DELETE FROM attestation_policies")
    with instance(tmp_path) as (_, shared):
        assert len(shared.view.keys) == 1


def test_a_database_without_its_secrets_is_refused(place: Path) -> None:
    """Another service's secrets open no register."""
    (place / "db.secrets").unlink()
    with pytest.raises(ServiceError) as caught, instance(place):
        pass
    assert caught.value.inner == "StoredConfigurationChanged"


def test_a_request_is_refused_while_the_rows_are_not_the_services(
    make_site: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither tokens nor policies nor keys; with the rows as they were it goes on."""
    monkeypatch.setattr(health, "_KEPT_SECONDS", 0.0)
    site = make_site(database=f"sqlite:///{tmp_path / 'db'}")
    body = {"quote": helpers.b64(site.quote())}
    assert site.post("/attest/SgxEnclave", body).status_code == 200
    before = _rows(tmp_path, "attestation_keys")
    _sql(tmp_path, ("UPDATE attestation_keys SET chain = chain || 'x'", ()))
    for answer in (
        site.post("/attest/SgxEnclave", body),
        site.client.get("/certs"),
        site.client.get(
            "/policies/SgxEnclave",
            params={"api-version": "2025-06-01"},
            headers={"authorization": "Bearer admin"},
        ),
    ):
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["innererror"] == {"code": "StoredConfigurationChanged"}
    assert site.client.get("/health").json() == {"status": "not ready"}
    assert site.audit()[-1]["action"] == "attestation/configuration/read"
    _sql(tmp_path, *_put_back("attestation_keys", before))
    assert site.client.get("/health").json() == {"status": "ready"}
    assert site.post("/attest/SgxEnclave", body).status_code == 200


def test_the_audit_tables_are_named_as_here() -> None:
    """The statements above are SQL by hand."""
    assert storage_tables.audit_head.name == "audit_head"
    assert storage_tables.audit.name == "audit"
