"""Decoded tokens: one JSON object or two, and nothing that two readers could take differently."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.decoded_token import MAX_SIZE, DecodedToken


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"[] {}",
        b"{} []",
        b"{} {} {}",
        b"{}.{}",
        b"{},{}",
        b"} {}",
        b'{"a": 1, "a": 2}',
        b'{} {"a": 1, "a": 2}',
        b'{"a": 1, "a": 2} {}',
        b'{"a": NaN}',
        b'"{}" {}',
        b'{"a": "} {}',
        b"\xff{}",
        b"{}\0",
        b"[" * 100_000,
        b" " * (MAX_SIZE + 1),
    ],
)
def test_what_is_neither_one_object_nor_two_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        DecodedToken.from_bytes(data)


def test_brackets_in_strings_do_not_end_an_object() -> None:
    read = DecodedToken.from_bytes(b'{"a": "}\\"}{", "b": [{"c": "]"}]}\n{"d": 1}')
    assert read.header == {"a": '}"}{', "b": [{"c": "]"}]}
    assert read.claims == {"d": 1}


def test_one_object_is_the_claims() -> None:
    read = DecodedToken.from_bytes(b' {"iss": "https://a.b.attest.azure.net"}\n')
    assert read.header is None
    assert read.is_maa
    assert read.issuer == "https://a.b.attest.azure.net"


@pytest.mark.parametrize(
    ("claims", "maa"),
    [
        (b'{"iss": "https://x.attest.azure.net"}', True),
        (b'{"iss": 5, "x-ms-ver": "1.0"}', True),
        (b'{"maa-policyHash": ""}', True),
        (b'{"iss": "https://else"}', False),
        (b"{}", False),
    ],
)
def test_azures_claims_are_told(claims: bytes, maa: bool) -> None:
    assert DecodedToken.from_bytes(claims).is_maa is maa


def test_hostile_text_costs_one_pass() -> None:
    start = time.process_time()
    for data in (b'{"' + b"\\" * 1_000_000, b'"' * 1_000_000, b"{" * 1_000_000, b"}" * 1_000_000):
        with pytest.raises(EvidenceFormatError):
            DecodedToken.from_bytes(data)
    assert (
        time.process_time() - start < 60
    )  # once over; what goes over it again and again takes hours


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, b"{}" + data, data + b"{}"):
        try:
            assert isinstance(DecodedToken.from_bytes(text).claims, dict)
        except EvidenceFormatError:
            continue


def test_the_vector_is_read(vectors: Path) -> None:
    path = vectors / "attestation/maa-sgx-claims-sample/decoded-token.json.txt"
    read = DecodedToken.from_bytes(path.read_bytes())
    assert read.header is not None
    assert read.header["alg"] == "RS256"
    assert read.claims["tee"] == "sgx"
