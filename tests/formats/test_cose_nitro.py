"""COSE_Sign1 and the documents of Nitro: shapes, headers and bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor
from pyenclave.formats.cose import Sign1
from pyenclave.formats.nitro import NitroDocument, NitroPayload

P256 = ec.derive_private_key(7, ec.SECP256R1())
P384 = ec.derive_private_key(7, ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
NAMES = ("ES256", "ES384", "EdDSA")


def message(*parts: Any, tag: int | None = None) -> bytes:
    good = [b"\xa1\x01\x26", {}, b"payload", bytes(64)]
    value: Any = list(parts) + good[len(parts) :]
    return cbor.dumps(value if tag is None else cbor.Tag(tag, value))


HOSTILE = {
    "another tag": message(tag=98),
    "three parts": cbor.dumps([b"\xa1\x01\x26", {}, b""]),
    "five parts": cbor.dumps([b"\xa1\x01\x26", {}, b"", b"", b""]),
    "a map": cbor.dumps({}),
    "a detached payload": message(b"\xa1\x01\x26", {}, None),
    "a header that is text": message("x"),
    "a header that is no map": message(b"\x80"),
    "a header with trailing bytes": message(b"\xa1\x01\x26\x00"),
    "an empty header that is written out": message(b"\xa0"),
    "a critical header": message(cbor.dumps({1: -7, 2: [1]})),
    "a critical header that is not protected": message(b"\xa1\x01\x26", {2: [4]}),
    "an algorithm that is not protected": message(b"", {1: -7}),
    "an algorithm given twice": message(b"\xa1\x01\x26", {1: -7}),
    "a name in both headers": message(cbor.dumps({1: -7, 4: b"a"}), {4: b"b"}),
    "a doubled name": message(b"\xa2\x01\x26\x01\x26"),
    "trailing bytes": message() + b"\0",
    "an indefinite array": b"\x9f" + message()[1:] + b"\xff",
    "a length in a longer form": b"\x98\x04" + message()[1:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused(name: str) -> None:
    with pytest.raises(EvidenceFormatError):
        Sign1.from_bytes(HOSTILE[name])


@pytest.mark.parametrize(("key", "name"), [(P256, "ES256"), (P384, "ES384"), (ED, "EdDSA")])
@pytest.mark.parametrize("tagged", [False, True])
def test_what_is_signed_verifies_with_its_key_only(key: Any, name: str, tagged: bool) -> None:
    made = Sign1.sign(b"payload", key=key, algorithm=name, tagged=tagged, unprotected={4: b"kid"})
    read = Sign1.from_bytes(made.to_bytes())
    assert read == made
    assert read.algorithm == name
    for other in (P256, P384, ED):
        assert read.verify(other.public_key(), allowed=NAMES) is (other is key)
    assert not read.verify(key.public_key(), allowed=[other for other in NAMES if other != name])
    assert not read.verify(key.public_key(), allowed=NAMES, external=b"x")
    for changed in (
        replace(read, payload=b"Payload"),
        replace(read, signature=bytes(len(read.signature))),
        replace(read, signature=read.signature + b"\0"),
        replace(read, protected=b""),
    ):
        assert not changed.verify(key.public_key(), allowed=NAMES)


def test_an_algorithm_of_another_curve_or_kind_does_not_verify() -> None:
    assert not Sign1.from_bytes(message(b"")).verify(P256.public_key(), allowed=(*NAMES, ""))
    unknown = Sign1.from_bytes(message(cbor.dumps({1: "ES256"})))
    assert unknown.algorithm == ""
    assert not unknown.verify(P256.public_key(), allowed=NAMES)
    with pytest.raises(ValueError, match="does not belong"):
        Sign1.sign(b"", key=P256, algorithm="EdDSA")
    with pytest.raises(ValueError, match="needs a key"):
        Sign1.sign(b"", key=P256, algorithm="ES384")
    with pytest.raises(ValueError, match="none of"):
        Sign1.sign(b"", key=P256, algorithm="HS256")
    key = rsa.generate_private_key(65537, 2048).public_key()
    assert not Sign1.from_bytes(message()).verify(key, allowed=NAMES)


# ---- documents --------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "module_id": "i-1-enc2",
    "digest": "SHA384",
    "timestamp": 1,
    "pcrs": {0: bytes(48)},
    "certificate": b"c",
    "cabundle": [b"r"],
    "public_key": None,
    "user_data": b"",
    "nonce": bytes(1024),
}
GONE = object()
WRONG: dict[str, Any] = {
    "module_id": [GONE, "", b"x", None, 1],
    "digest": [GONE, "SHA1", "sha384", "", b"SHA384", None],
    "timestamp": [GONE, 0, -1, True, 1 << 60, "1", None],
    "pcrs": [
        GONE,
        {},
        [],
        None,
        {32: bytes(48)},
        {-1: bytes(48)},
        {"0": bytes(48)},
        {0: bytes(47)},
        {0: bytes(32)},
        {0: "0" * 48},
        {0: None},
    ],
    "certificate": [GONE, b"", bytes(1025), "x", None],
    "cabundle": [GONE, [], [b""], [bytes(1025)], ["x"], b"x", None, [b"x"] * 17],
    "public_key": [bytes(1025), "x", 1],
    "user_data": [bytes(1025), "x", 1],
    "nonce": [bytes(1025), "x", []],
}


def changed(name: str, value: object) -> bytes:
    fields = {key: item for key, item in (GOOD | {name: value}).items() if item is not GONE}
    return cbor.dumps(fields)


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, values in WRONG.items() for place in range(len(values))],
)
def test_each_field_is_held_to_its_bounds(name: str, place: int) -> None:
    NitroPayload.from_bytes(cbor.dumps(GOOD))
    with pytest.raises(EvidenceFormatError, match=r"Nitro document"):
        NitroPayload.from_bytes(changed(name, WRONG[name][place]))


def test_optional_fields_may_be_absent_or_null_and_unknown_ones_are_ignored() -> None:
    for name in ("public_key", "user_data", "nonce"):
        assert getattr(NitroPayload.from_bytes(changed(name, GONE)), name) is None
        assert getattr(NitroPayload.from_bytes(changed(name, None)), name) is None
    assert NitroPayload.from_bytes(changed("new", {"a": [1]})).module_id == "i-1-enc2"


def test_a_payload_that_is_no_map_is_refused() -> None:
    for value in ([], b"", 1, None):
        with pytest.raises(EvidenceFormatError):
            NitroPayload.from_bytes(cbor.dumps(value))


def test_documents_carry_no_other_header() -> None:
    payload = NitroPayload.from_bytes(cbor.dumps(GOOD)).to_bytes()
    made = Sign1.sign(payload, key=P384, algorithm="ES384")
    assert NitroDocument.from_bytes(made.to_bytes()).payload.digest == "SHA384"
    with pytest.raises(EvidenceFormatError, match="headers"):
        NitroDocument.from_bytes(replace(made, unprotected={4: b"x"}).to_bytes())
    with pytest.raises(EvidenceFormatError, match="headers"):
        NitroDocument.from_bytes(replace(made, protected=cbor.dumps({1: -35, 4: b""})).to_bytes())
    with pytest.raises(EvidenceFormatError, match="too large"):
        NitroDocument.from_bytes(bytes(16 * 1024 + 1))


def test_every_document_of_the_vectors_is_read_and_written(vectors: Path) -> None:
    found = sorted((vectors / "attestation").glob("*nitro*/attestation-doc.cbor"))
    assert len(found) >= 7
    for path in found:
        data = path.read_bytes()
        document = NitroDocument.from_bytes(data)
        assert document.to_bytes() == data
        assert NitroPayload.from_bytes(document.payload.to_bytes()) == document.payload
