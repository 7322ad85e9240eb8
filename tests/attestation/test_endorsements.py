"""Endorsements: known names, regular files, and limits."""

from __future__ import annotations

import os

import pytest

from pyenclave.attestation import Endorsements
from pyenclave.attestation import endorsements as e
from pyenclave.errors import CollateralError


def test_a_folder_gives_its_known_files_and_names_the_rest(tmp_path):
    for name in (
        "tcb-info.json",
        "tcb-info-issuer-chain.pem",
        "vek.der",
        "case.json",
        "report.bin",
    ):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "crl.der").mkdir()
    found = Endorsements.from_dir(tmp_path)
    assert sorted(found) == ["tcb-info-issuer-chain.pem", "tcb-info.json", "vek.der"]
    assert found.get("vek.der") == b"vek.der"
    assert found.get("ask.pem") is None
    assert found.ignored == ("case.json", "crl.der", "report.bin")


def test_one_of_the_vendors_files_is_no_bundle(tmp_path):
    (tmp_path / "vek.der").write_bytes(b"\x30\x82\x05\x4d")
    with pytest.raises(CollateralError, match=r"vek\.der is no bundle.*Give the folder"):
        Endorsements.from_path(tmp_path / "vek.der")


def test_a_fifo_under_a_known_name_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "vek.der")
    assert Endorsements.from_dir(tmp_path).ignored == ("vek.der",)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "..data").write_bytes(b"x")
    (tmp_path / "vek.der").symlink_to(tmp_path / "..data")
    assert Endorsements.from_dir(tmp_path).get("vek.der") == b"x"


def test_files_that_are_too_large_are_refused_before_they_are_read(tmp_path):
    with open(tmp_path / "crl.der", "wb") as file:
        file.truncate(e.MAX_FILE + 1)
    with pytest.raises(CollateralError, match=r"crl\.der is too large"):
        Endorsements.from_dir(tmp_path)
    (tmp_path / "crl.der").write_bytes(bytes(e.MAX_FILE))
    assert len(Endorsements.from_dir(tmp_path)) == 1


def test_the_sum_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(e, "MAX_TOTAL", 100)
    for name in ("vek.der", "crl.der"):
        (tmp_path / name).write_bytes(bytes(60))
    with pytest.raises(CollateralError, match="too large"):
        Endorsements.from_dir(tmp_path)
    with pytest.raises(CollateralError, match="too large"):
        Endorsements.of({"vek.der": bytes(60), "crl.der": bytes(60)})


def test_a_folder_with_far_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(e, "_MAX_ENTRIES", 3)
    for number in range(4):
        (tmp_path / str(number)).touch()
    with pytest.raises(CollateralError, match="too many"):
        Endorsements.from_dir(tmp_path)


def test_a_misspelt_name_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"did you mean tcb-info\.json"):
        Endorsements.of({"tcbinfo.json": b"{}"})
    with pytest.raises(TypeError):
        Endorsements.of({"vek.der": "text"})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        Endorsements.of([("vek.der", b"")])  # type: ignore[arg-type]


def test_endorsements_cannot_be_changed_and_do_not_follow_their_source():
    source = {"vek.der": bytearray(b"one")}
    held = Endorsements.of(source)
    source["vek.der"][0:3] = b"two"
    source["crl.der"] = bytearray()
    assert dict(held.files) == {"vek.der": b"one"}
    with pytest.raises(TypeError):
        held.files["crl.der"] = b""  # type: ignore[index]


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Endorsements.from_dir(tmp_path / "missing")
