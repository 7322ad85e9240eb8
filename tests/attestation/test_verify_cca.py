"""Arm CCA tokens: what breaks one, what a policy says of one, and which keys count."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from issuer_cca import (
    CPAK,
    IMPLEMENTATION,
    NONCE,
    RAK,
    REM,
    RIM,
    RPV,
    cpak_file,
    judge,
    key_of,
    message,
    newest,
    platform_claims,
    realm_claims,
    token,
)

from pyenclave.attestation import AppraisalPolicy
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cca, cose_key
from pyenclave.formats.cca import CcaToken
from pyenclave.formats.jwk import public_members

ANY = AppraisalPolicy.any_code()


def test_a_good_token_is_accepted_identified_and_fresh() -> None:
    for options in ({}, newest(), {"tag": 907} | newest()):
        result = judge(token(**options))
        assert result.accepted, result.refused_by
        assert result.identified
        assert result.fresh
        assert result.claims["platform_signature_ok"] is True
        assert result.claims["realm_signature_ok"] is True
        assert result.claims["binding_ok"] is True
        json.dumps(result.to_json())


def test_att_02_each_byte_of_a_token_counts() -> None:
    data = token(**newest())
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        try:
            result = judge(bytes(changed), policy=ANY)
        except EvidenceFormatError:
            continue
        assert not result.genuine, position


def test_the_key_that_a_token_brings_counts_for_nothing() -> None:
    """A forger signs with a key of his own, and says so in every place that there is."""
    forged = key_of("forged")
    header = {"unprotected": {4: cose_key.write_key(forged.public_key())}}
    for endorsements in ({}, cpak_file()):
        data = token(platform_key=forged, platform_message=header)
        result = judge(data, endorsements=endorsements, policy=AppraisalPolicy.permissive())
        assert result.refused_by == ("platform.signature",)


def test_a_root_of_the_caller_is_no_platform_key() -> None:
    from issuer_nvidia import root

    result = judge(token(), endorsements={}, roots=[root()])
    assert "platform.signature" in result.refused_by


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_platform_keys_of_each_curve_count(curve: ec.EllipticCurve) -> None:
    key = key_of("other", curve)
    assert judge(token(platform_key=key), endorsements=cpak_file(key)).accepted
    assert judge(token(platform_key=key)).refused_by == ("platform.signature",)


def test_the_algorithm_of_a_given_key_is_kept() -> None:
    assert judge(token(), endorsements=cpak_file(alg="ES384", use="sig")).accepted
    for members in ({"alg": "ES256"}, {"use": "enc"}, {"key_ops": ["sign"]}, {"d": "AA"}):
        result = judge(token(), endorsements=cpak_file(**members))
        assert result.refused_by == ("cpak.format",)
    rsa_key = rsa.RSAPublicNumbers(65537, (1 << 2047) + 1).public_key()
    file = {"cpak-pub.json": json.dumps(public_members(rsa_key)).encode()}
    assert judge(token(), endorsements=file).refused_by == ("platform.signature",)


@pytest.mark.parametrize("file", [b"", b"[]", b"{}", b'{"kty": "EC"}', b'{"keys": []}', b"\xff"])
def test_a_damaged_platform_key_refuses(file: bytes) -> None:
    result = judge(token(), endorsements={"cpak-pub.json": file})
    assert result.refused_by == ("cpak.format",)
    assert not result.genuine


@pytest.mark.parametrize("number", [None, -7, -36, -8, -257, 0, "ES384", b"\1", True, [-35]])
def test_another_algorithm_in_the_header_is_refused(number: Any) -> None:
    from pyenclave.formats import cbor

    header = {} if number is None else {1: number}
    changes = {"protected": cbor.dumps(header) if header else b"", "header": header}
    for part in ("platform", "realm"):
        result = judge(token(**{f"{part}_message": changes}))
        assert result.refused_by == (f"{part}.signature",)
        json.dumps(result.to_json())


def test_parts_of_two_tokens_do_not_make_one() -> None:
    """Each part is signed rightly; only the binding says that they belong together."""
    other = key_of("other realm")
    realm = realm_claims(public_key=b"\x04" + _point(other), rim=b"\x77" * 32)
    made = CcaToken(
        platform=message(platform_claims(realm_claims()).to_bytes(), CPAK),
        realm=message(realm.to_bytes(), other),
    )
    result = judge(made.to_bytes(), policy=ANY)
    assert result.refused_by == ("realm.binding",)
    assert result.claims["realm_signature_ok"] is True


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(48, "big") + numbers.y.to_bytes(48, "big")


@pytest.mark.parametrize("name", ["sha-1", "md5", "sha256", "shake128", "SHA-384", "__class__"])
def test_the_binding_is_of_a_known_hash(name: str) -> None:
    result = judge(token(realm={"public_key_hash": name}))
    assert result.refused_by == ("realm.binding",)


@pytest.mark.parametrize("name", cca.HASHES)
def test_the_binding_may_be_of_each_hash(name: str) -> None:
    import hashlib

    realm = realm_claims(public_key_hash=name)
    digest = hashlib.new(name.replace("-", ""), realm.public_key).digest()
    data = token(realm={"public_key_hash": name}, platform={"challenge": digest})
    assert judge(data).accepted
    short = token(realm={"public_key_hash": name}, platform={"challenge": digest[:32]})
    assert judge(short).refused_by == (() if name == "sha-256" else ("realm.binding",))


def test_the_platforms_key_does_not_sign_realms() -> None:
    result = judge(token(realm_key=CPAK))
    assert result.refused_by == ("realm.signature",)
    assert judge(token(platform_key=RAK)).refused_by == ("platform.signature",)


# ---- lifecycle --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lifecycle", [0, 0xFF, 0x1000, 0x2000, 0x2FFF, 0x3100, 0x4100, 0x6000, 0x7000, 0xFFFF]
)
def test_only_a_secured_platform_is_genuine(lifecycle: int) -> None:
    result = judge(token(platform={"lifecycle": lifecycle}), policy=AppraisalPolicy.permissive())
    assert result.refused_by == ("platform.lifecycle",)


@pytest.mark.parametrize("lifecycle", [0x4000, 0x40FF, 0x5000, 0x5001])
def test_a_debugged_platform_is_genuine_and_accepted_only_where_debug_is(lifecycle: int) -> None:
    data = token(platform={"lifecycle": lifecycle})
    result = judge(data)
    assert result.genuine
    assert result.refused_by == ("debug",)
    assert judge(data, policy=AppraisalPolicy(rim=RIM, allow_debug=True)).accepted


# ---- what is wanted ---------------------------------------------------------------------------


def test_a_policy_names_measurements_of_realm_and_platform() -> None:
    policy = AppraisalPolicy(
        rim=(b"\x01" * 64, RIM),
        rems={0: REM, 3: bytes(32)},
        rpv=RPV,
        implementation_id=IMPLEMENTATION,
    )
    result = judge(token(), policy=policy)
    assert result.accepted
    assert result.identified
    for changes in ({"rems": {1: REM}}, {"rems": {0: bytes(32)}}, {"rpv": bytes(64)}):
        wrong = judge(token(), policy=policy.with_options(**changes))
        assert wrong.genuine
        assert not wrong.identified
        assert len(wrong.refused_by) == 1


def test_extended_measurements_alone_identify_nothing() -> None:
    result = judge(token(), policy=AppraisalPolicy.any_code(rems={0: REM}))
    assert result.accepted
    assert not result.identified


def test_att_31_a_policy_of_other_hardware_takes_no_realm() -> None:
    for policy in (
        AppraisalPolicy(mrtd=b"\x31" * 48),
        AppraisalPolicy(gpu_measurements={1: b"\x31" * 48}),
        AppraisalPolicy(claims={"rim": RIM.hex()}),
    ):
        assert not judge(token(), policy=policy).accepted


def test_a_short_nonce_is_padded_and_a_hash_is_given_as_report_data() -> None:
    short = b"n" * 32
    assert judge(token(realm={"challenge": short.ljust(64, b"\0")}), nonce=short).fresh
    assert judge(token(), nonce=short, report_data=NONCE).fresh
    result = judge(token(), nonce=short)
    assert result.refused_by == ("nonce",)


@pytest.mark.parametrize(("size", "accepted"), [(32, True), (48, True), (64, True), (20, False)])
def test_a_register_may_be_longer_than_its_hash(size: int, accepted: bool) -> None:
    value = RIM[:20].ljust(size, b"\x17")
    realm = {"hash": "sha-256", "rim": value, "rems": (value,) * 4}
    result = judge(token(realm=realm), policy=AppraisalPolicy.any_code())
    assert result.refused_by == (() if accepted else ("realm.format",))
    short = {"hash": "sha-512", "rim": RIM[:32], "rems": (RIM[:32],) * 4}
    result = judge(token(realm=short), policy=AppraisalPolicy.any_code())
    assert result.refused_by == ("realm.format",)


def test_what_is_unreadable_leaves_the_rest_told() -> None:
    result = judge(token(realm_payload=b"\xa0"))
    assert result.refused_by == ("realm.format",)
    assert result.claims["implementation_id"] == IMPLEMENTATION.hex()
    assert result.claims["platform_signature_ok"] is True
    assert result.claims["realm_signature_ok"] is None
    assert "rim" not in result.claims
    skipped = {check.name for check in result.checks if not check.holds}
    assert {"realm.key", "realm.binding", "realm.signature", "code.rim"} <= skipped
