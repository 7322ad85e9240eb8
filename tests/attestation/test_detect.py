"""The kind is told from the bytes; what fits none is refused with what was seen."""

from __future__ import annotations

import base64
import hashlib
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.attestation import detect as d
from pyenclave.attestation import kind_of, kinds
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.evidence import MAGIC
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.certificates import pem

# Role of the file that is the evidence, where it is not the first of a case.
ROLES = {"tdx-ccel": "ccel", "sgx-collateral": "qe_identity"}
TEXTS = ("jwt", "jwks", "policy", "claims")
INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")


def cases(vectors):
    for path in sorted((vectors / "attestation").glob("*/case.json")):
        case = json.loads(path.read_text("utf-8"))
        role = ROLES.get(case["kind"], next(iter(case["files"])))
        yield path.parent.name, case["kind"], (path.parent / case["files"][role]).read_bytes()


def test_every_vector_is_of_its_kind(vectors):
    seen = set()
    for name, kind, data in cases(vectors):
        assert kind_of(data) == kind, name
        seen.add(kind)
    assert seen == set(kinds.KINDS) - {"pyenclave", "ra-tls-cert", "maa-cert"}


def test_one_flipped_bit_never_makes_another_kind(vectors):
    """A kind that flips could send evidence past the checks that it needs."""
    done = set()
    for _, kind, data in cases(vectors):
        if kind in done or kind.endswith(TEXTS):
            continue
        done.add(kind)
        for position in range(min(len(data), 1300)):
            changed = bytearray(data)
            changed[position] ^= 1 << position % 8
            try:
                found = kind_of(bytes(changed))
            except EvidenceFormatError:
                continue
            related = (
                {kind, "tcg-eventlog", "tdx-ccel"} if "log" in kind or "ccel" in kind else {kind}
            )
            if kind == "tdx-quote":
                related |= {"sgx-quote"}  # version 3: the checks of an SGX quote refuse it
            assert found in related, position


def quote(version: int, key_type: int = 2, tee: int = 0, vendor: bytes = INTEL) -> bytes:
    return struct.pack("<HHI4x16s", version, key_type, tee, vendor) + bytes(600)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (MAGIC, "pyenclave"),
        (quote(3), "sgx-quote"),
        (quote(3, vendor=bytes(16)), "sgx-quote"),
        (quote(3, key_type=3), "sgx-quote"),
        (quote(4), "sgx-quote"),
        (quote(4, tee=0x81), "tdx-quote"),
        (quote(5, tee=0x81) + b"\0" * 5000, "tdx-quote"),
        (struct.pack("<I", 2) + bytes(1180), "sev-snp-report"),
        (struct.pack("<I", 2) + bytes(0x30) + b"\1\0\0\0" + bytes(4000), "sev-snp-report"),
        (b"\xd2\x84\x44\xa1\x01\x38\x22\xa0\x4b\xa1\x69module_id", "nitro-document"),
        (b"\xd9\x01\x8f\xa2\x19\xac\xca", "arm-cca-token"),
        (b"\xd9\x03\x8b\xa2\x19\xac\xd1", "arm-cca-token"),
        (b"\x11\xe0" + bytes(35) + b"\x11\x60", "nvidia-gpu-report"),
        (b'{"version": "1.0.0", "anyOf": []}', "akv-release-policy"),
        (b'{"key": {}, "claims": []}', "akv-release-policy"),
        (b' {"alg": "RS256"}\n\n{"x-ms-ver": "1.0"}\n', "maa-claims"),
        (b'{"iss": "https://a.b.attest.azure.net"}', "maa-claims"),
        (b'{"keys": []}', "maa-jwks"),
        (b' {"tcbInfo": {}, "signature": ""}', "sgx-collateral"),
    ],
)
def test_what_distinguishes_a_kind_is_enough(data, kind):
    assert kind_of(data) == kind


def jwt(header: object, claims: object, signature: bytes = b"AA") -> bytes:
    parts = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in (header, claims)
    )
    return b".".join((*parts, signature))


@pytest.mark.parametrize(
    ("claims", "kind"),
    [
        ({"iss": "https://x.eus.attest.azure.net"}, "maa-jwt"),
        ({"iss": "https://mine", "x-ms-attestation-type": "sgx"}, "maa-jwt"),
        (
            {"iss": "https://confidentialcomputing.googleapis.com", "eat_profile": "x"},
            "google-confidential-space-jwt",
        ),
        ({"eat_profile": "tag:github.com,2023:veraison/ear"}, "attestation-result-jwt"),
        ({"ear.verifier-id": {}}, "attestation-result-jwt"),
    ],
)
def test_tokens_are_told_by_their_claims(claims, kind):
    assert kind_of(jwt({"alg": "RS256"}, claims)) == kind
    assert kind_of(jwt({"alg": "none"}, claims, b"") + b"\n") == kind
    assert kind_of(jwt({"alg": "RS256", "x5c": []}, claims)) == kind


def test_a_token_with_certificates_and_no_issuer_is_an_x5c_token():
    assert kind_of(jwt({"x5c": []}, {})) == "x5c-jwt"


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "nothing"),
        (b"\0" * 100, "100 bytes"),
        (quote(2), "version 2"),
        (quote(4, tee=7), "TEE type 0x7"),
        (b"HCLA" + bytes(100), "cut off"),
        (b"HCLA" + bytes(1220) + b"\1\0\0\0", "VBS"),
        (b"HCLA" + bytes(1220) + b"\x09\0\0\0", "unknown"),
        (b"\x84\x41\xa0\xa0\x41\xa0", "COSE_Sign1"),
        (b"\xd9\x01\x8f\xa2", "Arm CCA"),
        (b"\xd9\x03\x8b\xa1\x01\x41\0", "Arm CCA"),
        (b'{"alg": "RS256"} {"iss": "https://nobody"}', "https://nobody"),
        (b'{"alg": "RS256"} {} {}', "JSON"),
        (b"\xffTCG\x80\x18", "TPM quote"),
        (b"\x11\xe0\x01\xff", "SPDM"),
        (b"\x01\0\0\0\x02\0\0\0" + bytes(8) + quote(3), "Open Enclave"),
        (b"\x81" + bytes(1023), "TDREPORT"),
        (quote(3).hex().encode(), "hexadecimal"),
        (base64.b64encode(quote(3)), "base64"),
        (jwt({}, {"iss": "https://nobody"}), "https://nobody"),
        (jwt({}, []), "object"),
        (b"....", "4 bytes"),
        (b"a.b.c", "base64url"),
        (b'{"token": "x"}', "token itself|around a token"),
        (b'{"vcekCert": ""}', "endorsements|AMD"),
        (b'{"a": 1}', "JSON object with a"),
        (b"{", "JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 100_000, "bytes that begin"),
        (b"{" * 100_000, "JSON"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no evidence"),
        (b"-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n", "damaged"),
    ],
)
def test_what_is_no_evidence_is_named(data, seen):
    with pytest.raises(EvidenceFormatError, match=seen):
        kind_of(data)


def test_vendors_certificates_are_no_evidence(vectors):
    for path in sorted((vectors / "attestation" / "roots").glob("*.pem")):
        with pytest.raises(EvidenceFormatError, match="carries no evidence"):
            kind_of(path.read_bytes())


@pytest.mark.parametrize(
    "oid",
    [
        "0606678105050409",
        "060b06092a864886f84d8a3906",
        "06092a864886f84d8a3906",
        "06092a864886f7140a0101",
        "06092b06010401823769" + "01",
    ],
)
def test_certificates_that_carry_evidence_are_told_by_their_extension(oid):
    body = bytes.fromhex(oid)
    assert kind_of(b"\x30\x82\x01\x00\x30\x00" + body + bytes(40)) == "ra-tls-cert"


def sha1_record(index, event, data):
    digest = hashlib.sha1(data, usedforsecurity=False).digest()
    return struct.pack("<II20sI", index, event, digest, len(data)) + data


def test_logs_of_sha1_digests_need_no_record_that_names_the_specification():
    first, second = sha1_record(0, 8, b"version"), sha1_record(7, 0x80000001, b"variable")
    for log in (first, first + second, first + second[:9], first + second + bytes(40)):
        assert kind_of(log) == "tcg-eventlog"
    for other in (
        sha1_record(1, 8, b"version") + second,
        sha1_record(0, 0x80000001, b"variable") + second,
        first[:8] + bytes(20) + first[28:],
        first[:-1],
        first + b"\x40\0\0\0" + second[4:],
        first[:28] + bytes(4),
    ):
        with pytest.raises(EvidenceFormatError):
            kind_of(other)


def test_the_answer_of_a_device_is_told_from_the_report_in_it():
    report = AmdChip().report()
    answer = struct.pack("<II24x", 0, len(report)) + report
    for padded in (answer, answer.ljust(4000, b"\0")):
        with pytest.raises(EvidenceFormatError, match="header of 32 bytes"):
            kind_of(padded)
    assert kind_of(answer[32:]) == "sev-snp-report"


def test_certificates_inside_other_bytes_are_no_certificate():
    vek = pem(AmdChip().vek)
    for text in (vek, b"\n" + vek, b"subject=CN = SEV-VCEK\n" + vek, vek + vek):
        assert kind_of(text) == "sev-snp-vek-cert"
    for head in (b"\xd2\x84\x58\x26\xa4\x01\x38\x22", b"\xff\xfe"):
        with pytest.raises(EvidenceFormatError, match="of a known kind"):
            kind_of(head + vek)


def test_evidence_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(d, "MAX_EVIDENCE", 100)
    with pytest.raises(EvidenceFormatError, match="too large"):
        kind_of(MAGIC + bytes(100))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=1300))
def test_arbitrary_bytes_have_a_kind_or_are_refused(data):
    for head in (b"", b"\x84\x44", b"HCLA", b"{", b"eyJ.", b"\x30\x82", b"-----BEGIN"):
        try:
            assert kind_of(head + data) in kinds.KINDS
        except EvidenceFormatError:
            continue


def test_a_kind_without_a_verifier_is_refused(monkeypatch):
    with pytest.raises(EvidenceFormatError, match="cannot be verified"):
        kinds.load("no-such-kind")
    monkeypatch.setattr(kinds, "KINDS", {"sgx-quote": "verify_nowhere"})
    with pytest.raises(EvidenceFormatError, match="cannot be verified"):
        kinds.load("sgx-quote")
    assert kinds.available() == ()
