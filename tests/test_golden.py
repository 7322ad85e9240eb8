"""
Files of the first release open for ever (docs/formats; tests/golden/make.py made them).

A failure here means that data which users hold no longer opens. Do not replace a golden file: read
the old form too, and add a new file for the new one.
"""

from __future__ import annotations

import datetime as dt
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
from pyenclave.formats.evidence import provision_info
from pyenclave.formats.image import Image
from pyenclave.formats.lock import Lock
from pyenclave.formats.record import ProtectionRecord
from pyenclave.measurement.image import measure_image
from pyenclave.sealed import blob
from pyenclave.sealed.provision import RuntimeKey

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


def test_a_lock_list_opens(make: Any) -> None:
    assert Lock.from_bytes(golden("lock.json")) == make.lock()


@pytest.mark.parametrize("name", ["unique.sealed", "signer.sealed"])
def test_a_sealed_blob_opens(make: Any, name: str) -> None:
    opened = blob.open_blob(
        golden(name), identity=make.identity(), key_provider=make.key_provider, aad=make.AAD
    )
    assert opened.data == make.PLAINTEXT
    assert (opened.header.counter_id, opened.header.counter_value) == (bytes(range(16)), 5)


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
