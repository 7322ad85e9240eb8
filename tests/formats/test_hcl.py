"""Azure's HCL report and its runtime claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import hcl

AK = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": "gAAA" * 86}


def runtime(**members: object) -> bytes:
    values = {"keys": [AK], "vm-configuration": {"secure-boot": True}} | members
    return json.dumps(values).encode()


def made(**fields: object) -> hcl.HclReport:
    values = {"hardware_report": bytes(range(37)) * 32, "runtime_data": runtime()} | fields
    return hcl.HclReport(**values)  # type: ignore[arg-type]


def test_reader_and_writer_agree() -> None:
    for report in (made(), made(version=1), made(report_type=4, hardware_report=b"\x81" * 1024)):
        assert hcl.HclReport.from_bytes(report.to_bytes() + bytes(300)) == report


def test_reader_and_writer_agree_on_the_vectors(vectors: Path) -> None:
    found = sorted(vectors.glob("attestation/*azure-*/hcl-report.bin"))
    assert len(found) >= 11
    for path in found:
        data = path.read_bytes()
        report = hcl.HclReport.from_bytes(data)
        assert report.to_bytes() == data[: report.report_size]
        assert report.runtime_data == path.with_name("runtime-data.json").read_bytes()
        assert hcl.RuntimeClaims.from_bytes(report.runtime_data).ak is not None


def test_att_22_every_byte_of_the_headers_is_demanded() -> None:
    """Nobody signs the headers: there must be one form only."""
    data = made().to_bytes()
    version = {4}  # 1 and 2 are both read, and mean the same
    kinds = {1224}  # SNP and TDX differ in what follows
    hashes = {1228}  # the hash is then another one, and the binding fails
    for offset in (*range(32), *range(1216, 1236)):
        for bit in range(8):
            changed = bytearray(data)
            changed[offset] ^= 1 << bit
            if offset in version | kinds | hashes:
                continue
            with pytest.raises(EvidenceFormatError):
                hcl.HclReport.from_bytes(bytes(changed))


def test_bytes_behind_the_report_must_be_zero() -> None:
    data = made().to_bytes()
    for tail in (b"\x01", bytes(99) + b"\x01"):
        with pytest.raises(EvidenceFormatError, match="follows"):
            hcl.HclReport.from_bytes(data + tail)
    tdx = made(report_type=4, hardware_report=b"\x81" * 1024).to_bytes()
    for offset in range(32 + 1024, 1216):
        with pytest.raises(EvidenceFormatError, match="TDREPORT"):
            hcl.HclReport.from_bytes(tdx[:offset] + b"\x01" + tdx[offset + 1 :])


def test_every_cut_and_silly_sizes_are_refused() -> None:
    data = made().to_bytes()
    for size in (0, 4, 31, 1235, 1236, len(data) - 1):
        with pytest.raises(EvidenceFormatError):
            hcl.HclReport.from_bytes(data[:size])
    with pytest.raises(EvidenceFormatError, match="size"):
        hcl.HclReport.from_bytes(bytes(1 << 20))


def test_the_hash_of_the_claims_follows_from_its_type() -> None:
    report = made()
    assert len({replace(report, hash_type=n).expected_report_data for n in (1, 2, 3)}) == 3
    assert report.expected_report_data[32:] == bytes(32)


@pytest.mark.parametrize(
    "text",
    [
        runtime(keys=[AK, AK]),
        runtime(keys=[AK | {"kty": "EC"}]),
        runtime(keys=[AK | {"n": "AQAB"}]),
        runtime(keys=[AK | {"n": "A" * 5000}]),
        runtime(keys=[AK | {"n": AK["n"] + "!"}]),  # type: ignore[operator]
        runtime(keys=[AK | {"e": "AQ"}]),
        runtime(keys=[AK | {"e": 65537}]),
        runtime(keys=[1]),
        runtime(keys=[AK] * 17),
        runtime(keys={}),
        runtime(**{"vm-configuration": []}),
        runtime(**{"user-data": "00"}),
        runtime(**{"user-data": "g0" * 64}),
        runtime(**{"user-data": 5}),
        runtime()[:-1] + b',"keys":[]}',
        runtime() + b" x",
        b"[]",
        b"\xff",
    ],
)
def test_att_24_claims_that_could_be_understood_twice_are_refused(text: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        hcl.RuntimeClaims.from_bytes(text)


def test_claims_without_an_attestation_key_are_read() -> None:
    other = AK | {"kid": "HCLEkPub"}
    claims = hcl.RuntimeClaims.from_bytes(runtime(keys=[other], **{"user-data": "aB" * 64}))
    assert claims.ak is None
    assert claims.key_ids == ("HCLEkPub",)
    assert claims.user_data == b"\xab" * 64


@pytest.mark.parametrize(
    ("text", "value"), [("", b""), ("AA", b"\0"), ("AA==", b"\0"), ("-_8", b"\xfb\xff")]
)
def test_base64url_is_taken_with_and_without_padding(text: str, value: bytes) -> None:
    assert hcl.base64url(text, "n") == value


@pytest.mark.parametrize("text", ["A", "AA=", "AA===", "AB", "A+", "A A", "=", "é0", 7, None])
def test_base64url_has_one_form(text: object) -> None:
    with pytest.raises(EvidenceFormatError):
        hcl.base64url(text, "n")
