"""Arm CCA tokens: hostile ones first, then each claim, then each profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st
from issuer_cca import (
    CPAK,
    RAK,
    key_of,
    message,
    newest,
    platform_claims,
    raw_of,
    realm_claims,
    token,
)

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor, cca, cose_key
from pyenclave.formats.cbor import Tag
from pyenclave.formats.cca import CcaToken, PlatformClaims, RealmClaims

PLATFORM = cbor.loads(platform_claims(realm_claims()).to_bytes())
REALM = cbor.loads(realm_claims().to_bytes())
NEWEST = newest()
PLATFORM_2024 = cbor.loads(platform_claims(realm_claims(), **NEWEST["platform"]).to_bytes())
REALM_2024 = cbor.loads(realm_claims(**NEWEST["realm"]).to_bytes())
COMPONENT = {1: "RMM", 2: bytes(32), 5: bytes(32)}


def parts() -> dict[int, Any]:
    made = CcaToken.from_bytes(token())
    return {44234: made.platform.to_bytes(), 44241: made.realm.to_bytes()}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (parts(), "tag 399 or 907"),
        (Tag(398, parts()), "tag 399 or 907"),
        (Tag(399, list(parts().values())), "two parts"),
        (Tag(399, {44234: parts()[44234]}), "two parts"),
        (Tag(399, parts() | {44242: b""}), "two parts"),
        (Tag(399, {str(label): part for label, part in parts().items()}), "two parts"),
        (Tag(399, {label: [263, part] for label, part in parts().items()}), "byte string"),
        (Tag(907, parts()), "263, bytes"),
        (Tag(907, {label: [264, part] for label, part in parts().items()}), "263, bytes"),
        (Tag(907, {label: [263, part, 1] for label, part in parts().items()}), "263, bytes"),
        (Tag(399, parts() | {44241: b""}), "realm token"),
        (Tag(399, parts() | {44241: parts()[44241] + b"\0"}), "realm token"),
        (Tag(399, parts() | {44241: parts()[44241][1:]}), "no tag"),
        (Tag(399, parts() | {44241: b"\xd1" + parts()[44241][1:]}), "four parts"),
    ],
)
def test_what_is_no_collection_of_two_parts_is_refused(value: Any, says: str) -> None:
    with pytest.raises(EvidenceFormatError) as caught:
        CcaToken.from_bytes(cbor.dumps(value))
    assert says in f"{caught.value.message} {caught.value.expected}"


def test_indefinite_lengths_are_refused_and_other_widths_are_read() -> None:
    data = token()
    body = data[4:]
    with pytest.raises(EvidenceFormatError, match="malformed"):
        CcaToken.from_bytes(b"\xd9\x01\x8f\xbf" + body + b"\xff")
    wide = b"\xda\x00\x00\x01\x8f\xb8\x02" + body
    assert CcaToken.from_bytes(wide) == CcaToken.from_bytes(data)


def test_a_part_twice_is_refused() -> None:
    part = cbor.dumps(44234) + cbor.dumps(parts()[44234])
    with pytest.raises(EvidenceFormatError, match="malformed"):
        CcaToken.from_bytes(b"\xd9\x01\x8f\xa2" + part + part)


def test_nothing_but_a_keys_name_goes_unsigned() -> None:
    named = CcaToken.from_bytes(token(realm_message={"unprotected": {4: b"name"}}))
    assert named.realm.unprotected == {4: b"name"}
    for header in ({33: b"certificate"}, {3: 263}, {"x": 1}):
        with pytest.raises(EvidenceFormatError, match="unprotected"):
            CcaToken.from_bytes(token(platform_message={"unprotected": header}))


def test_a_token_of_another_size_is_refused_before_it_is_read() -> None:
    with pytest.raises(EvidenceFormatError, match="too large"):
        CcaToken.from_bytes(bytes(cca.MAX_SIZE + 1))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_as_evidence(data: bytes) -> None:
    for head in (b"", b"\xd9\x01\x8f\xa2", b"\xa9"):
        for read in (CcaToken.from_bytes, PlatformClaims.from_bytes, RealmClaims.from_bytes):
            with pytest.raises(EvidenceFormatError):
                read(head + data)


# ---- claims -----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", PLATFORM_2024)
def test_each_claim_of_a_platform_is_needed(label: int) -> None:
    fields = {key: value for key, value in PLATFORM_2024.items() if key != label}

    with pytest.raises(EvidenceFormatError, match="missing"):
        PlatformClaims.from_bytes(cbor.dumps(fields))


@pytest.mark.parametrize("label", [label for label in REALM_2024 if label != 265])
def test_each_claim_of_a_realm_is_needed(label: int) -> None:
    fields = {key: value for key, value in REALM_2024.items() if key != label}
    with pytest.raises(EvidenceFormatError, match="missing"):
        RealmClaims.from_bytes(cbor.dumps(fields))


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (265, ""),
        (265, 1),
        (265, "x" * 1025),
        (10, bytes(31)),
        (10, bytes(33)),
        (10, [bytes(32)]),
        (2396, bytes(33)),
        (2396, "x" * 32),
        (256, bytes(33)),
        (256, b"\1" + bytes(31)),
        (2401, "text"),
        (2401, bytes(4097)),
        (2395, -1),
        (2395, 0x10000),
        (2395, True),
        (2395, b"\x30\x00"),
        (2399, []),
        (2399, {}),
        (2399, [COMPONENT] * 257),
        (2399, [b"x"]),
        (2399, [COMPONENT | {2: bytes(31)}]),
        (2399, [COMPONENT | {5: "x" * 32}]),
        (2399, [{1: "RMM", 2: bytes(32)}]),
        (2399, [{1: "RMM", 5: bytes(32)}]),
        (2399, [COMPONENT | {1: 1}]),
        (2399, [COMPONENT | {4: b"1.0"}]),
        (2399, [COMPONENT | {6: "x" * 1025}]),
        (2400, ""),
        (2400, b"https://x"),
        (2402, 1),
        (2394, 0),
        (2394, 2),
        (2394, True),
    ],
)
def test_a_wrong_claim_of_a_platform_is_refused(label: int, value: Any) -> None:
    with pytest.raises(EvidenceFormatError, match="CCA platform"):
        PlatformClaims.from_bytes(cbor.dumps(PLATFORM_2024 | {label: value}))


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (10, bytes(63)),
        (10, bytes(32)),
        (10, [bytes(64)]),
        (265, ""),
        (265, b"tag"),
        (44235, bytes(65)),
        (44238, bytes(31)),
        (44238, bytes(48)),  # the hash is SHA-256
        (44239, [bytes(32)] * 3),
        (44239, [bytes(32)] * 5),
        (44239, [bytes(32)] * 3 + [bytes(48)]),
        (44239, [bytes(32)] * 3 + [0]),
        (44239, bytes(128)),
        (44236, 1),
        (44236, "sha-512"),  # the measurements have 32 bytes
        (44237, b""),
        (44237, bytes(1025)),
        (44237, {1: 2}),
        (44240, b"sha-256"),
        (44243, "both"),
        (44243, b"private"),
        (256, bytes(33)),
        (256, b"\1" + bytes(33)),
    ],
)
def test_a_wrong_claim_of_a_realm_is_refused(label: int, value: Any) -> None:
    with pytest.raises(EvidenceFormatError, match="CCA realm"):
        RealmClaims.from_bytes(cbor.dumps(REALM_2024 | {label: value}))


def test_claims_that_are_not_known_are_ignored_and_stay_signed() -> None:
    """EAT: a receiver must not fail on claims that it does not understand."""
    odd = {99999: [1], -5: b"x", "text": {1: 2}}
    assert PlatformClaims.from_bytes(cbor.dumps(PLATFORM | odd)).profile == cca.LEGACY_PROFILE
    assert RealmClaims.from_bytes(cbor.dumps(REALM | odd)).rim == REALM[44238]


def test_a_hash_that_is_not_known_leaves_the_size_open() -> None:
    for size in (32, 48, 64):
        fields = REALM | {44236: "sha3-256", 44238: bytes(size), 44239: [bytes(size)] * 4}
        assert len(RealmClaims.from_bytes(cbor.dumps(fields)).rim) == size


def test_what_is_no_map_holds_no_claims() -> None:
    for data in (b"\x80", b"\x01", b"\x40"):
        with pytest.raises(EvidenceFormatError, match="claims"):
            PlatformClaims.from_bytes(data)


# ---- keys -------------------------------------------------------------------------------------


def test_a_realm_without_a_profile_has_a_bare_point() -> None:
    key, algorithms = realm_claims().read_key()
    assert key == RAK.public_key()
    assert algorithms == {"ES384"}
    for raw in (
        raw_of(RAK)[:-1],
        raw_of(RAK) + b"\0",
        b"\x02" + raw_of(RAK)[1:49],
        b"\x05" + raw_of(RAK)[1:],
        raw_of(RAK)[:-1] + bytes((raw_of(RAK)[-1] ^ 1,)),
        raw_of(key_of("x", ec.SECP256R1())),
        cose_key.write_key(RAK.public_key()),
        bytes(97),
    ):
        with pytest.raises(EvidenceFormatError, match="public key"):
            realm_claims(public_key=raw).read_key()


def test_a_realm_with_a_profile_has_a_cose_key() -> None:
    for profile in (*cca.REALM_PROFILES[1:], "tag:else"):
        claims = replace(realm_claims(profile=profile), profile=profile)
        assert claims.read_key()[0] == RAK.public_key()
        with pytest.raises(EvidenceFormatError, match="public key"):
            replace(claims, public_key=raw_of(RAK)).read_key()


# ---- reading what is written ------------------------------------------------------------------


@pytest.mark.parametrize("tag", [399, 907])
def test_written_and_read_a_token_is_the_same(tag: int) -> None:
    for options in ({}, NEWEST):
        data = token(tag=tag, **options)
        read = CcaToken.from_bytes(data)
        assert read.tag == tag
        assert read.to_bytes() == data
        platform = PlatformClaims.from_bytes(read.platform.payload)
        assert PlatformClaims.from_bytes(platform.to_bytes()) == platform
        realm = RealmClaims.from_bytes(read.realm.payload)
        assert RealmClaims.from_bytes(realm.to_bytes()) == realm


def test_lifecycles_have_names() -> None:
    for lifecycle, state in ((0x3000, "secured"), (0x30FF, "secured"), (0x3100, "invalid")):
        assert platform_claims(realm_claims(), lifecycle=lifecycle).state == state


def test_the_vectors_are_read_whole(vectors: Path) -> None:
    for path in sorted(vectors.glob("attestation/arm-cca-*/token.cbor")):
        data = path.read_bytes()
        read = CcaToken.from_bytes(data)
        assert read.to_bytes() == data
        assert RealmClaims.from_bytes(read.realm.payload).profile is None
        assert all(
            item.name for item in PlatformClaims.from_bytes(read.platform.payload).components
        )


def test_other_algorithms_sign_a_platform_too() -> None:
    secret = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    made = message(b"\xa0", CPAK)
    assert made.verify(CPAK.public_key(), allowed=("ES384",))
    key, algorithms = cose_key.read_key(cose_key.write_key(secret.public_key()))
    assert key == secret.public_key()
    assert algorithms == {"EdDSA"}
