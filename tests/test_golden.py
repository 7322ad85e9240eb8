"""
Files of the first release open for ever (docs/formats; tests/golden/make.py made them).

A failure here means that data which users hold no longer opens. Do not replace a golden file: read
the old form too, and add a new file for the new one.
"""

from __future__ import annotations

import datetime as dt
import io
import os
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyenclave._platform.counters import CounterStore
from pyenclave._platform.state import State
from pyenclave.attestation import AppraisalPolicy, verify
from pyenclave.cli import _headers, _tool_enclave
from pyenclave.cli._listing import parse_list
from pyenclave.cli._sealers import KeySealer
from pyenclave.errors import RollbackError, UnsealError
from pyenclave.formats import wrapped
from pyenclave.formats.audit_chain import verify_chain
from pyenclave.formats.audit_log import read_export
from pyenclave.formats.evidence import provision_info
from pyenclave.formats.image import Image
from pyenclave.formats.lock import Lock
from pyenclave.formats.machine import MachineEvidence
from pyenclave.formats.record import ProtectionRecord
from pyenclave.measurement.image import measure_image
from pyenclave.sealed import blob, parts
from pyenclave.sealed._held import HeldKey
from pyenclave.sealed.envelope import open_envelope
from pyenclave.sealed.file import Rebinding, open_sealed
from pyenclave.sealed.file_commits import counter_name
from pyenclave.sealed.provision import RuntimeKey
from pyenclave.sealed.stream import open_stream
from pyenclave.services.vault.backup import unpack

GOLDEN = Path(__file__).resolve().parent / "golden"
MRENCLAVE = "5856dc1d380f2547802e40d3d36fd904c39f3557251745da67efcb1617b2a3e8"
AT = dt.datetime(2026, 7, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def make() -> Any:
    """The program that made the files: their inputs."""
    return SimpleNamespace(**runpy.run_path(str(GOLDEN / "make.py")))


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def test_an_image_opens_and_has_its_measurement(make: Any) -> None:
    image = Image.parse(golden("image.bin"))
    assert measure_image(image).hex() == MRENCLAVE
    assert image.info.name == "golden"
    assert image.lock == make.lock()
    assert bytes(image.files["entry/golden.py"]) == make.ENTRY
    assert bytes(image.files["files/model.bin"]) == make.MODEL


def test_an_image_with_encrypted_parts_opens(make: Any) -> None:
    found = Image.parse(golden("encrypted-image.bin"))
    assert found.info.encrypted is not None
    root = parts.root_of(make.ROOT_SECRET)
    assert found.info.encrypted.check == parts.check_value(root).hex()
    for name, content in {"code/algo.py": make.ENTRY, "files/model.bin": make.MODEL}.items():
        assert parts.decrypt(root, name, found.files[name]) == content


def test_a_lock_list_opens(make: Any) -> None:
    assert Lock.from_bytes(golden("lock.json")) == make.lock()


@pytest.mark.parametrize("name", ["unique.sealed", "signer.sealed"])
def test_a_sealed_blob_opens(make: Any, name: str) -> None:
    opened = blob.open_blob(
        golden(name), identity=make.identity(), key_provider=make.key_provider, aad=make.AAD
    )
    assert opened.data == make.PLAINTEXT
    assert (opened.header.counter_id, opened.header.counter_value) == (bytes(range(16)), 5)


def test_a_sealed_file_and_a_sealed_stream_open(make: Any) -> None:
    with open_sealed(GOLDEN / "data.sealed-file", key=make.ROOT_SECRET, name=b"golden") as file:
        assert file.read() == make.file_content()
        assert (file.generation, file.page_size) == (2, 4096)
    with (
        (GOLDEN / "data.sealed-stream").open("rb") as source,
        open_stream(source, key=make.ROOT_SECRET, name=b"golden") as stream,
    ):
        assert stream.read() == make.PLAINTEXT


def test_an_encrypted_file_opens(make: Any) -> None:
    with open_sealed(GOLDEN / "data.encrypted-file", key=make.VAULT_KEY, name=b"golden") as file:
        assert file.read() == make.PLAINTEXT
    head = golden("key.envelope") + bytes(4096)
    data_key, found = open_envelope(head, make.VAULT_KEY)
    assert (data_key, found.file_id) == (bytes(range(32)), bytes(range(16)))
    assert found.algorithm == "A256KW"


def test_a_file_that_an_enclave_has_the_key_of_opens(make: Any) -> None:
    """The envelope opens for the enclave with the additional data that the tool gives it."""
    data = golden("data.wrapped-file")
    envelope = wrapped.newest(data)
    assert (envelope.generation, envelope.of_vault) == (2, False)
    opened = blob.open_blob(
        envelope.blob,
        identity=make.identity(),
        key_provider=make.key_provider,
        aad=_tool_enclave._bound(make.AAD, True, False),
    )
    assert opened.data == bytes(range(32))
    place = io.BytesIO(data[wrapped.HEAD_SIZE :])
    with open_sealed(place, key=opened.data) as file:
        assert file.read() == make.PLAINTEXT


def test_the_list_of_a_folder_opens(make: Any) -> None:
    assert parse_list(golden("folder-list.json")) == make.listing()
    sealer = KeySealer(HeldKey(make.ROOT_SECRET), b"golden")
    text = []
    with (GOLDEN / "folder.list").open("rb") as file:
        sealer.open(file.fileno(), text.append, listing=True)
        assert parse_list(b"".join(text)) == make.listing()
        with pytest.raises(UnsealError, match="name"):  # it stands in for no file
            sealer.open(file.fileno(), text.append)


def test_a_file_that_was_bound_to_another_counter_opens(make: Any) -> None:
    path, found = GOLDEN / "moved.sealed-file", {"key": make.ROOT_SECRET, "name": b"golden"}
    with open_sealed(path, **found, counter=make.GoldenCounter(b"after", 6)) as file:
        assert file.read() == make.PLAINTEXT
    for counter in (make.GoldenCounter(b"after", 5), make.GoldenCounter(b"before", 4)):
        with pytest.raises(RollbackError):
            open_sealed(path, **found, counter=counter)
    both = Rebinding(make.GoldenCounter(b"before", 3), make.GoldenCounter(b"after", 5))
    with open_sealed(path, **found, counter=both) as file:
        assert (both.old.read(), both.new.read()) == (4, 6)
    said = _headers.describe(str(path))["counter"]
    assert said["value"] == 6
    assert (said["id"], said["before"]) == (counter_name(both.new), counter_name(both.old))


def test_an_audit_log_verifies(make: Any) -> None:
    with (GOLDEN / "audit-log.jsonl").open("rb") as file:
        exported = read_export(file)
        report = verify_chain(exported.items, start=exported.start)
    assert report.intact
    assert (report.last, report.signed) == (3, 3)
    today, then = make.audit_log().splitlines(), golden("audit-log.jsonl").splitlines()
    assert today[:-1] == then[:-1]  # all but the signature


def test_an_encrypted_part_of_an_image_opens(make: Any) -> None:
    root = parts.root_of(make.ROOT_SECRET)
    assert parts.decrypt(root, "code/algo.py", golden("algo.part")) == make.PLAINTEXT


def test_evidence_verifies_against_its_root(make: Any) -> None:
    policy = AppraisalPolicy(
        mrenclave=bytes.fromhex(MRENCLAVE), product_id=7, dangerous_allow_software=True
    )
    result = verify(
        golden("evidence.bin"),
        policy=policy,
        nonce=make.NONCE,
        roots=[golden("platform-root.pem")],
        at=AT,
    )
    assert (result.genuine, result.accepted, result.identified, result.fresh) == (True,) * 4


def test_what_a_machine_said_opens(make: Any) -> None:
    machine = MachineEvidence.from_bytes(golden("machine.bin"))
    assert machine.evidence == bytes(range(256)) * 4
    assert sorted(machine.files) == ["ark.pem", "vek.der"]
    assert machine.to_bytes() == make.machine()


def test_a_record_opens(make: Any) -> None:
    record = ProtectionRecord.from_bytes(golden("record.bin"))
    assert record.enclave_id == make.ENCLAVE_ID
    assert record.holds("seccomp")
    assert not record.holds("mdwe")


def test_a_secret_sent_by_an_older_relying_party_opens(make: Any) -> None:
    key = RuntimeKey()
    key._key, public = make.runtime_key()
    info = provision_info(report_body=make.body().to_bytes(), runtime_key=public, info=b"golden")
    assert key.decrypt(golden("secret.hpke"), info=info) == make.SECRET


def test_a_state_directory_opens(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    for name in ("root", "counters", "counters.mark"):
        shutil.copyfile(GOLDEN / name, folder / name)
        (folder / name).chmod(0o600)
    with State.open(str(folder)) as state:
        secret, ephemeral = state.load_root()
        assert bytes(secret) == make.ROOT_SECRET
        assert ephemeral is False
        store = CounterStore(state, make.root().derive("counters", 32), os.urandom)
        assert store.read(bytes(range(32)), bytes(range(16))) == (2, make.COUNTER_MARK)
        assert store.increment(bytes(range(32)), bytes(range(16))) == 3


def test_what_is_written_today_is_what_was_written_then(make: Any) -> None:
    """A format that changes unnoticed shows here: a new one gets a version and new files."""
    today = make.everything()
    assert {path.name for path in GOLDEN.iterdir()} - {"__pycache__"} == {
        *today,
        "README.md",
        "make.py",
    }
    for name, data in today.items():
        if name not in make.NOT_REPEATABLE:
            assert data == golden(name), name
        assert len(data) < 40_000, name


def test_a_backup_of_a_vaults_key_opens(make: Any, tmp_path: Path) -> None:
    records, rotation = unpack(make.vault_secrets(tmp_path), golden("vault-key.backup"))
    assert records == make.vault_records()
    assert rotation is not None
    assert rotation.shown()["attributes"] == {"expiryTime": "P90D"}
