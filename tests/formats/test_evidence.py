"""The evidence container: one way to write it, everything else refused."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import evidence as fmt

BOUND = fmt.Evidence(
    quote=b"Q" * 700,
    record=b"R" * 90,
    runtime_key=bytes(fmt.RUNTIME_KEY_SIZE),
    user_data=b"",
    nonce=b"n" * 32,
)
RAW = fmt.Evidence(quote=b"Q" * 700, record=b"R" * 90)


def field(kind: int, value: bytes) -> bytes:
    return struct.pack("<HI", kind, len(value)) + value


@pytest.mark.parametrize("evidence", [BOUND, RAW])
def test_containers_cut_or_extended_anywhere_are_refused(evidence: fmt.Evidence):
    data = evidence.to_bytes()
    raw_end = len(RAW.to_bytes())  # bound evidence cut there is whole raw evidence
    for size in range(len(data)):
        if evidence is BOUND and size == raw_end:
            continue
        with pytest.raises(EvidenceFormatError):
            fmt.Evidence.from_bytes(data[:size])
    with pytest.raises(EvidenceFormatError):
        fmt.Evidence.from_bytes(data + b"\x00")


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [(1, b"q")],
        [(2, b"r"), (1, b"q")],
        [(1, b"q"), (1, b"q"), (2, b"r")],
        [(1, b"q"), (2, b"r"), (3, bytes(1216))],
        [(1, b"q"), (2, b"r"), (4, b"u"), (5, b"n")],
        [(1, b"q"), (2, b"r"), (3, bytes(1215)), (4, b""), (5, b"")],
        [(1, b"q"), (2, b"r"), (3, bytes(1216)), (4, b""), (5, bytes(1025))],
        [(1, b"q"), (2, b"r"), (3, bytes(1216)), (4, b""), (5, b""), (6, b"")],
        [(1, b""), (2, b"r")],
        [(0, b""), (1, b"q"), (2, b"r")],
    ],
)
def test_another_set_order_or_length_of_fields_is_refused(fields):
    data = fmt.MAGIC + b"".join(field(kind, value) for kind, value in fields)
    with pytest.raises(EvidenceFormatError):
        fmt.Evidence.from_bytes(data)


@pytest.mark.parametrize("length", [0, 699, 701, 2**31, 2**32 - 1])
def test_att_22_length_fields_that_lie_are_refused(length: int):
    data = bytearray(BOUND.to_bytes())
    struct.pack_into("<I", data, 10, length)
    with pytest.raises(EvidenceFormatError):
        fmt.Evidence.from_bytes(bytes(data))


def test_an_endless_container_is_refused():
    with pytest.raises(EvidenceFormatError, match="too long"):
        fmt.Evidence.from_bytes(fmt.MAGIC + bytes(fmt.MAX_EVIDENCE))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_typed_error(data: bytes):
    for candidate in (data, fmt.MAGIC + data):
        with pytest.raises(EvidenceFormatError):
            fmt.Evidence.from_bytes(candidate)


def test_impossible_evidence_is_not_written():
    for broken in (
        fmt.Evidence(quote=b"", record=b"r"),
        fmt.Evidence(quote=b"q", record=b"r", nonce=b"n"),
        fmt.Evidence(quote=b"q", record=b"r", runtime_key=b"", user_data=b"", nonce=b""),
    ):
        with pytest.raises(ValueError, match=r"evidence"):
            broken.to_bytes()


@pytest.mark.parametrize("evidence", [BOUND, RAW])
def test_evidence_goes_there_and_back(evidence: fmt.Evidence):
    assert fmt.Evidence.from_bytes(evidence.to_bytes()) == evidence


def test_report_data_is_the_hash_of_length_prefixed_fields():
    data = fmt.bound_report_data(nonce=b"nn", runtime_key=b"kkk", user_data=b"")
    written = b"\x13\0\0\0pyenclave-attest-v1\x02\0\0\0nn\x03\0\0\0kkk\0\0\0\0"
    assert data == hashlib.sha512(written).digest()


def test_fields_of_report_data_cannot_flow_into_each_other():
    splits = [(b"ab", b"c", b""), (b"a", b"bc", b""), (b"", b"ab", b"c"), (b"abc", b"", b"")]
    digests = {fmt.bound_report_data(nonce=a, runtime_key=b, user_data=c) for a, b, c in splits}
    assert len(digests) == len(splits)


def test_the_provisioning_context_ignores_report_data_and_binds_the_rest():
    body = bytes(range(256)) + bytes(128)
    base = fmt.provision_info(report_body=body, runtime_key=b"k", info=b"")
    assert base == fmt.provision_info(
        report_body=body[:320] + b"\xff" * 64, runtime_key=b"k", info=b""
    )
    for position in range(320):
        other = bytearray(body)
        other[position] ^= 1
        assert base != fmt.provision_info(report_body=bytes(other), runtime_key=b"k", info=b"")
    assert base != fmt.provision_info(report_body=body, runtime_key=b"", info=b"k")
    with pytest.raises(ValueError, match="384"):
        fmt.provision_info(report_body=body[:-1], runtime_key=b"k", info=b"")
