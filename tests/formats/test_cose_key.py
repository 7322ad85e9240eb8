"""COSE_Key: what is no public key that signs is refused."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor
from pyenclave.formats.cose_key import algorithms_of, read_key, write_key

KEYS = {
    "ES256": ec.derive_private_key(7, ec.SECP256R1()).public_key(),
    "ES384": ec.derive_private_key(7, ec.SECP384R1()).public_key(),
    "ES512": ec.derive_private_key(7, ec.SECP521R1()).public_key(),
    "EdDSA": ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key(),
}
P256 = cbor.loads(write_key(KEYS["ES256"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({-4: bytes(32)}, "public"),
        ({1: 1}, "EC2"),
        ({1: 4}, "EC2"),
        ({1: "EC2"}, "kty"),
        ({1: True}, "kty"),
        ({-1: 2}, "48 bytes"),
        ({-1: 8}, "EC2"),
        ({-1: None}, "kty"),
        ({-2: P256[-2][:-1]}, "32 bytes as x"),
        ({-2: P256[-2] + b"\0"}, "32 bytes as x"),
        ({-3: True}, "32 bytes as y"),
        ({-3: P256[-2]}, "point"),
        ({3: -35}, "ES256"),
        ({3: "ES256"}, "ES256"),
        ({3: True}, "ES256"),
        ({3: [-7]}, "ES256"),
        ({4: []}, "verify"),
        ({4: [1]}, "verify"),
        ({4: 2}, "verify"),
        ({4: ["verify"]}, "verify"),
    ],
)
def test_a_key_with_one_thing_wrong_is_refused(changes: dict[int, Any], says: str) -> None:
    with pytest.raises(EvidenceFormatError, match="usable") as caught:
        read_key(cbor.dumps(P256 | changes))
    assert says in str(caught.value.expected)


@pytest.mark.parametrize("label", P256)
def test_a_key_with_something_missing_is_refused(label: int) -> None:
    with pytest.raises(EvidenceFormatError, match="usable"):
        read_key(cbor.dumps({name: value for name, value in P256.items() if name != label}))


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x40", b"\xa0", b"\xa2\x01\x02\x01\x02", b"\xbf\xff"]
)
def test_what_is_no_map_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        read_key(data)


def test_a_huge_key_is_refused_before_it_is_read() -> None:
    with pytest.raises(EvidenceFormatError, match="too large"):
        read_key(cbor.dumps(P256 | {2: bytes(2000)}))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_no_key(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        read_key(b"\xa4" + data)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_read_as_it_was_written(name: str) -> None:
    key, algorithms = read_key(write_key(KEYS[name]))
    assert key == KEYS[name]
    assert algorithms == {name}


def test_what_narrows_a_key_without_excluding_it_is_taken() -> None:
    assert read_key(cbor.dumps(P256 | {3: -7, 4: [1, 2], 2: b"name"}))[1] == {"ES256"}


def test_other_keys_have_no_algorithm_and_no_form() -> None:
    assert not algorithms_of(x25519.X25519PrivateKey.generate().public_key())
    with pytest.raises(ValueError, match="secp256k1"):
        write_key(ec.derive_private_key(7, ec.SECP256K1()).public_key())
