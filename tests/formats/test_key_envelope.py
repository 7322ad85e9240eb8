"""Key envelopes: bytes ↔ fields, and every other form refused."""

from __future__ import annotations

import hashlib
import struct

import pytest

from pyenclave.errors import UnsealError
from pyenclave.formats import wrapped
from pyenclave.formats.key_envelope import ALGORITHMS, MAX_KID, MAX_WRAPPED, KeyEnvelope
from pyenclave.formats.wrapped import HEAD_SIZE, PLACE_SIZE, Envelope

KID = "https://vault.example/keys/model/0123456789abcdef0123456789abcdef"
ENVELOPE = KeyEnvelope(
    kid=KID, algorithm="A256KW", wrapped=b"w" * 40, file_id=bytes(range(16)), mac=b"m" * 32
)


def test_an_envelope_is_written_exactly_so():
    """docs/formats/key-envelope.md, byte by byte."""
    fixed = b"PYEKENV\x01" + struct.pack("<HHH", 4, len(KID), 40) + bytes(2)
    assert ENVELOPE.to_bytes() == fixed + bytes(range(16)) + b"m" * 32 + KID.encode() + b"w" * 40
    assert KeyEnvelope.from_bytes(ENVELOPE.to_bytes()) == ENVELOPE
    assert ENVELOPE.unsigned() == ENVELOPE.to_bytes().replace(b"m" * 32, bytes(32))
    assert ALGORITHMS == {"RSA-OAEP-256": 1, "A128KW": 2, "A192KW": 3, "A256KW": 4}


def test_what_is_cut_off_or_longer_is_refused():
    data = ENVELOPE.to_bytes()
    for size in range(len(data)):
        with pytest.raises(UnsealError):
            KeyEnvelope.from_bytes(data[:size])
    with pytest.raises(UnsealError, match="length"):
        KeyEnvelope.from_bytes(data + b"\0")


def test_every_changed_bit_of_what_names_the_form_is_refused():
    for at in (*range(8), 8, 9, 10, 11, 12, 13, 14, 15):
        for bit in range(8):
            data = bytearray(ENVELOPE.to_bytes())
            data[at] ^= 1 << bit
            if at == 8 and data[8] in ALGORITHMS.values():
                continue  # another algorithm that there is: the MAC finds that
            with pytest.raises(UnsealError):
                KeyEnvelope.from_bytes(bytes(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"kid": ""},
        {"kid": "k" * (MAX_KID + 1)},
        {"kid": "https://vault/keys/a\r\nHost: other"},
        {"kid": "https://vault/keys/a b"},
        {"kid": "https://vault/keys/ä"},
        {"kid": "a\x1b[2J"},
        {"algorithm": "RSA1_5"},
        {"algorithm": "RSA-OAEP"},
        {"algorithm": "none"},
        {"wrapped": b""},
        {"wrapped": bytes(MAX_WRAPPED + 1)},
        {"file_id": bytes(15)},
        {"mac": bytes(31)},
    ],
)
def test_what_no_envelope_may_say_is_refused(changes):
    values = {name: getattr(ENVELOPE, name) for name in KeyEnvelope.__slots__}
    with pytest.raises(UnsealError):
        KeyEnvelope(**(values | changes))
    if "kid" in changes and len(changes["kid"]) <= MAX_KID:
        kid = changes["kid"].encode()
        data = bytearray(ENVELOPE.to_bytes())
        data[10:12] = struct.pack("<H", len(kid))
        data[64 : 64 + len(KID)] = kid
        with pytest.raises(UnsealError, match="identifier"):
            KeyEnvelope.from_bytes(bytes(data))


def test_it_stands_in_a_place_of_a_wrapped_file():
    place = Envelope(2, ENVELOPE.to_bytes())
    head = place.to_bytes() + bytes(PLACE_SIZE)
    found = wrapped.newest(head)
    assert found == place
    assert found.of_vault
    assert found.key_envelope == ENVELOPE
    with pytest.raises(UnsealError):
        found.header  # noqa: B018 - it is no sealed blob


def test_a_place_with_a_malformed_envelope_holds_none():
    for blob in (ENVELOPE.to_bytes()[:-1], b"PYEKENV\x02" + ENVELOPE.to_bytes()[8:]):
        fixed = struct.Struct("<8sQII32s8x")
        lead = fixed.pack(wrapped.MAGIC, 2, len(blob), 0, bytes(32)) + blob
        digest = hashlib.sha256(lead).digest()
        place = (fixed.pack(wrapped.MAGIC, 2, len(blob), 0, digest) + blob).ljust(PLACE_SIZE, b"\0")
        with pytest.raises(UnsealError, match="no whole envelope"):
            wrapped.newest(place + bytes(HEAD_SIZE - PLACE_SIZE))


def test_the_largest_envelope_fits_its_place():
    largest = KeyEnvelope(
        kid="k" * MAX_KID,
        algorithm="RSA-OAEP-256",
        wrapped=bytes(MAX_WRAPPED),
        file_id=bytes(16),
    )
    assert len(Envelope(2, largest.to_bytes()).to_bytes()) == PLACE_SIZE
