"""``pyenclave audit``: as an auditor uses it, on a log that somebody may have changed."""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import create_engine, text

from pyenclave.cli import main
from pyenclave.errors import ServiceError
from pyenclave.formats.audit_log import Checkpoint, Row
from pyenclave.services.audit import Event
from pyenclave.services.audit.reader import open_log
from pyenclave.services.storage import Database, Refused, Secrets, Transaction
from pyenclave.services.storage.engines import parse_url

RELEASE = "Microsoft.KeyVault/vaults/keys/release/action"
BEGIN = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC)


class Clock:
    """A second for every group."""

    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> dt.datetime:
        self.now += dt.timedelta(seconds=1)
        return self.now


def fill(url: str, secrets: Path, *, rows: int = 50, clock: Clock | None = None) -> str:
    """Write a log; return the reference of its refusal, row 20."""
    reference = ""

    def refuse(_tx: Transaction) -> None:
        raise Refused(
            ServiceError("no", status=403, error_code="Forbidden"),
            Event(
                RELEASE, "refused", caller="tenant/eve", resource="/keys/model/1", rule="policy",
                condition="x-ms-sgx-is-debuggable", expected=False, found=True,
                claims={"evil": "\x1b[31m\nallowed"},
            ),
        )  # fmt: skip

    with Database.open(
        url, parts=[], secrets=Secrets(secrets), clock=clock or Clock(), checkpoint_rows=10
    ) as db:
        for number in range(1, rows + 1):
            if number == 20:
                with pytest.raises(ServiceError) as caught:
                    db.submit(refuse).result()
                reference = caught.value.reference or ""
            else:
                event = Event("Microsoft.KeyVault/vaults/keys/read", "allowed", caller="bob",
                              resource=f"/keys/key{number}/1")  # fmt: skip
                db.submit(lambda tx, event=event: tx.audit(event)).result()
    return reference


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vault.db"


@pytest.fixture
def reference(file: Path) -> str:
    return fill(f"sqlite:///{file}", file.with_name("vault.db.secrets"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["audit", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def change(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_an_untouched_log_verifies_wherever_it_lies(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = fill(database_url, tmp_path / "secrets")
    code, found = as_json(capsys, "verify", "--database", database_url)
    assert (code, found["intact"], found["rows"], found["signed"]) == (0, True, 50, 50)
    assert found["pinned"] is False
    export = tmp_path / "log.jsonl"
    assert as_json(capsys, "export", "--database", database_url, "-o", export) == (
        0,
        {"file": str(export), "first": 1, "last": 50},
    )
    assert stat.S_IMODE(export.stat().st_mode) == 0o600
    code, again = as_json(capsys, "verify", "--database", export)
    assert (code, again) == (0, found)
    code, shown = as_json(capsys, "show", reference, "--database", export)
    assert code == 0
    ((row),) = shown["rows"]
    assert (row["seq"], row["expected"], row["found"]) == (20, False, True)


def test_a_refusal_is_explained_by_its_reference(
    file: Path, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "show", reference, "--database", file)
    assert code == 0
    assert "condition    x-ms-sgx-is-debuggable\nexpected     false\nfound        true\n" in out
    assert "\x1b" not in out
    assert "claims.evil  \\x1b[31m\\nallowed" in out
    code, out, err = run(capsys, "show", "nothing", "--database", file)
    assert (out, len(err.splitlines())) == ("", 1)
    assert (code, err) == (1, "pyenclave: no row nothing\n")


@pytest.mark.usefixtures("reference")
def test_the_timeline_is_filtered_and_aligned(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(
        capsys, "show", "--database", file, "--since", "2026-07-01T12:00:19Z", "--last", 40
    )
    lines = out.splitlines()
    assert lines[0].split() == [
        "time",
        "(UTC)",
        "decision",
        "action",
        "resource",
        "caller",
        "reference",
    ]
    (refused,) = (n for n, line in enumerate(lines) if "refused" in line)
    assert lines[refused].index("eve") == lines[0].index("caller")
    assert lines[refused + 1 : refused + 5] == [
        "    rule: policy",
        "    condition: x-ms-sgx-is-debuggable",
        "    expected: false",
        "    found: true",
    ]

    def seqs(*options: object) -> list[int]:
        _, found = as_json(capsys, "show", "--database", file, *options)
        return [row["seq"] for row in found["rows"]]

    assert seqs("--decision", "refused") == seqs("--caller", "eve") == [20]
    assert seqs("--caller", "tenant/eve") == seqs("--caller", "tenant") == [20]
    assert seqs("--caller", "e") == []
    assert seqs("--key-name", "model") == seqs("--operation", "release") == [20]
    assert seqs("--key-name", "key7") == [7]
    assert seqs("--key-name", "key") == []
    assert seqs("--key-name", "https://vault.example/keys/key7") == [7]
    assert seqs("--key-name", f"key7/{'1' * 32}") == []
    assert seqs("--last", 3) == [48, 49, 50]
    whole = seqs()
    early = seqs("--until", "2026-07-01T14:00:20+02:00")
    late = seqs("--since", "2026-07-01T12:00:20Z")
    assert early + late == whole == list(range(1, 51))
    assert early
    assert late


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(
    ("statements", "kind", "first", "last"),
    [
        (["UPDATE audit SET body = replace(body, 'bob', 'eve') WHERE seq = 7"], "changed", 7, 7),
        (["UPDATE audit SET decision = 'refused' WHERE seq = 7"], "changed", 7, 7),
        (["UPDATE audit SET body = x'ff00' WHERE seq = 7"], "changed", 7, 7),
        (["UPDATE audit SET hash = 'text' WHERE seq = 7"], "changed", 7, 7),
        (["UPDATE audit SET body = x'7b227265666572656e6365223a22ff227d' WHERE seq = 7"],
         "changed", 7, 7),
        (["DELETE FROM audit WHERE seq BETWEEN 7 AND 9"], "removed", 7, 9),
        (
            [
                "UPDATE audit SET seq = 99 WHERE seq = 7",
                "UPDATE audit SET seq = 7 WHERE seq = 8",
                "UPDATE audit SET seq = 8 WHERE seq = 99",
            ],
            "reordered", 7, 8,
        ),
        (["DELETE FROM audit WHERE seq > 40"], "cut", 41, 50),
        (
            [
                "DELETE FROM audit WHERE seq > 45",
                "UPDATE audit_head SET seq = 45, hash = (SELECT hash FROM audit WHERE seq = 45)",
            ],
            "cut", 46, 50,
        ),
        (
            [
                "INSERT INTO audit SELECT 51, reference, decision, body, hash FROM audit"
                " WHERE seq = 1"
            ],
            "changed", 51, 51,
        ),
        (["INSERT INTO audit SELECT -1, reference, decision, body, hash FROM audit WHERE seq = 1"],
         "inserted", 0, 0),
        (["UPDATE audit_checkpoints SET signed = 'x' WHERE seq = 20"], "checkpoint", 20, 20),
        (["UPDATE audit_checkpoints SET seq = 21 WHERE seq = 20"], "checkpoint", 21, 21),
        (["DELETE FROM audit_keys"], "checkpoint", 10, 10),
    ],
)  # fmt: skip
def test_what_was_done_to_the_table_is_named(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    statements: list[str],
    kind: str,
    first: int,
    last: int,
) -> None:
    change(file, *statements)
    code, found = as_json(capsys, "verify", "--database", file)
    assert code == 1
    finding = found["findings"][0]
    assert (finding["kind"], finding["first"], finding["last"]) == (kind, first, last)
    code, out, _ = run(capsys, "verify", "--database", file)
    assert code == 1
    assert finding["message"] in out
    assert "NOT intact" in out
    code, _, err = run(capsys, "show", "--database", file)
    assert code == 1
    assert finding["message"] in err


@pytest.mark.usefixtures("reference")
def test_a_log_written_anew_is_named_by_key_or_checkpoint_kept_elsewhere(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who owns the database makes a whole new log with a key of his own: only a pin tells."""
    key, kept = tmp_path / "key.pem", tmp_path / "kept"
    key.write_text(run(capsys, "key", "--database", file)[1])
    kept.write_text(run(capsys, "checkpoint", "--database", file)[1])
    assert as_json(capsys, "verify", "--database", file, "--key", key)[1]["pinned"] is True
    assert run(capsys, "verify", "--database", file, "--checkpoint", kept)[0] == 0
    file.unlink()
    fill(f"sqlite:///{file}", tmp_path / "others", rows=60)
    assert run(capsys, "verify", "--database", file)[0] == 0
    code, found = as_json(capsys, "verify", "--database", file, "--key", key)
    assert (code, found["findings"][0]["kind"]) == (1, "checkpoint")
    code, found = as_json(capsys, "verify", "--database", file, "--checkpoint", kept)
    assert code == 1
    assert found["findings"][0]["message"] == "the checkpoint of row 50 is of another log"


@pytest.mark.usefixtures("reference")
def test_a_part_of_a_log_is_exported_and_covered_by_its_checkpoints(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    assert run(capsys, "export", "--database", file, "--after", 33, "-o", part)[0] == 0
    code, found = as_json(capsys, "verify", "--database", part)
    assert (code, found["first"], found["last"], found["signed"]) == (0, 34, 50, 50)
    content = part.read_bytes()
    part.write_bytes(content.replace(b"key40", b"key41"))
    code, found = as_json(capsys, "verify", "--database", part)
    assert (code, found["findings"][0]["kind"], found["findings"][0]["first"]) == (1, "changed", 40)
    lines = content.split(b"\n")
    part.write_bytes(b"\n".join(line for line in lines if b"checkpoint" not in line))
    code, found = as_json(capsys, "verify", "--database", part)
    assert (code, found["findings"][0]["message"]) == (
        1,
        "rows 1 to 33 are not here, and no checkpoint says what they were",
    )
    code, found = as_json(capsys, "export", "--database", file, "-o", part)
    assert (code, found["error"]["code"]) == (2, "unreadable")  # it is there already


@pytest.mark.usefixtures("reference")
def test_a_log_is_cut_off_at_a_checkpoint_once_it_was_exported(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets, old = tmp_path / "their.secrets", tmp_path / "old.jsonl"
    fill(database_url, secrets)
    before = ("prune", "--database", database_url, "--secrets", secrets, "-o", old, "--before")
    code, found = as_json(capsys, *before, "2026-07-01T12:00:01Z")
    assert (code, found["error"]["code"], old.exists()) == (2, "storage.audit", False)
    code, found = as_json(capsys, *before, "2026-07-01T12:00:35Z")
    assert code == 0
    assert (found["through"], found["rows"]) == (30, 30)
    code, found = as_json(capsys, "verify", "--database", old)
    assert (code, found["first"], found["last"], found["signed"]) == (0, 1, 30, 30)
    code, found = as_json(capsys, "verify", "--database", database_url)
    assert (code, found["first"], found["last"], found["signed"]) == (0, 31, 51, 51)
    _, found = as_json(capsys, "show", "--database", database_url, "--operation", "audit/prune")
    assert found["rows"][0]["details"]["through"] == 30
    engine = create_engine(parse_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM audit_checkpoints WHERE seq = 30"))
        connection.execute(text("UPDATE audit_head SET base_seq = 29"))
    engine.dispose()
    code, found = as_json(capsys, "verify", "--database", database_url)
    assert code == 1


def test_pruning_with_other_secrets_changes_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(f"sqlite:///{file}", tmp_path / "theirs")
    code, found = as_json(
        capsys, "prune", "--database", file, "-o", tmp_path / "old",
        "--before", "2027-01-01T00:00:00Z",
    )  # fmt: skip
    assert (code, found["error"]["code"]) == (2, "storage")
    assert as_json(capsys, "verify", "--database", file)[1]["rows"] == 50


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"SQLite format 3\0" + bytes(100), b"\x00" * 5_000]
)
def test_what_is_no_log_is_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    for action in ("verify", "show", "export", "checkpoint", "key"):
        code, _, err = run(capsys, action, "--database", file)
        assert code == 2
        assert "Traceback" not in err
        assert "[storage.audit]" in err


def test_wrong_usage_is_told(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path))
    for arguments in (
        ["verify"],
        ["verify", "--database", "mysql://x"],
        ["verify", "--database", str(file)],
        ["show", "--database", str(file), "--since", "yesterday"],
        ["export", "--json"],
    ):
        assert run(capsys, *arguments)[0] == 2, arguments
    other = tmp_path / "rsa.pem"
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    other.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    fill(f"sqlite:///{file}", tmp_path / "s", rows=1)
    code, _, err = run(capsys, "verify", "--database", file, "--key", other)
    assert code == 2
    assert "another kind of key" in err


def test_checkpoints_of_a_long_life_are_not_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a minute makes half a million a year; they are read as the rows are."""
    monkeypatch.setattr("pyenclave.services.audit.reader._PAGE", 50)
    url = f"sqlite:///{tmp_path}/vault.db"
    with Database.open(url, parts=[], durability="normal", checkpoint_rows=1) as db:
        for _ in range(160):
            db.submit(lambda tx: tx.audit(Event("keys/read", "allowed"))).result()
    held = most = rows = 0
    with open_log(str(tmp_path / "vault.db")) as log:
        for item in log.items:
            if isinstance(item, Row):
                rows += 1
            elif isinstance(item, Checkpoint):
                held += 1
            most = max(most, held - rows)
    assert (rows, held) == (160, 160)
    assert most <= 100
    assert main(["audit", "verify", "--database", str(tmp_path / "vault.db")]) == 0
