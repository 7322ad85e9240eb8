"""Chains and revocation lists: one mutation for each rule, each refused by its own check."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pyenclave.attestation import pki
from pyenclave.attestation.cache import Cache
from pyenclave.attestation.checks import Verdict
from pyenclave.formats import der
from pyenclave.formats.x509 import AlgorithmId, Certificate, Crl

AT = datetime(2026, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
PROFILE = pki.Profile(
    keys=frozenset(("secp256r1",)), algorithms=frozenset(("ecdsa-sha256",)), shortest=3
)
PLACES = ("leaf", "intermediate", "root")
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def key(name: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    secret = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return ec.derive_private_key(secret % (1 << 250) + 1, curve or ec.SECP256R1())


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def usage(*names: str) -> x509.KeyUsage:
    known = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{item: item in names for item in known})


def certificate(place: str, **changes: Any) -> Certificate:
    index = PLACES.index(place)
    issuer = PLACES[min(index + 1, 2)]
    options: dict[str, Any] = {
        "subject": place,
        "issuer": issuer,
        "key": key(place).public_key(),
        "signer": key(issuer),
        "start": AT - DAY,
        "end": AT + DAY,
        "constraints": x509.BasicConstraints(
            ca=index > 0, path_length=index - 1 if index else None
        ),
        "constraints_critical": True,
        "usage": usage("key_cert_sign", "crl_sign") if index else usage("digital_signature"),
        "issuer_key": key(issuer).public_key(),
        "hash": hashes.SHA256(),
        "extra": (),
    }
    assert not set(changes) - set(options)
    options |= changes
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(options["subject"]))
        .issuer_name(name(options["issuer"]))
        .public_key(options["key"])
        .serial_number(index + 1)
        .not_valid_before(options["start"])
        .not_valid_after(options["end"])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(options["key"]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(options["issuer_key"]),
            critical=False,
        )
    )
    if options["constraints"] is not None:
        builder = builder.add_extension(
            options["constraints"], critical=options["constraints_critical"]
        )
    if options["usage"] is not None:
        builder = builder.add_extension(options["usage"], critical=True)
    for extension in options["extra"]:
        builder = builder.add_extension(extension, critical=True)
    made = builder.sign(options["signer"], options["hash"])
    return Certificate.from_der(made.public_bytes(Encoding.DER))


def chain(place: str | None = None, **changes: Any) -> tuple[Certificate, ...]:
    return tuple(certificate(each, **(changes if each == place else {})) for each in PLACES)


GOOD = chain()
JUDGES: dict[str, Callable[[tuple[Certificate, ...]], Verdict]] = {
    "length": lambda c: pki.check_length(c, PROFILE),
    "root": lambda c: pki.check_root(c, GOOD[2:]),
    "names": pki.check_names,
    "algorithms": lambda c: pki.check_algorithms(c, PROFILE),
    "constraints": lambda c: pki.check_constraints(c, PROFILE),
    "key_usage": lambda c: pki.check_key_usage(c, PROFILE),
    "validity": lambda c: pki.check_validity(c, AT),
    "signatures": pki.check_signatures,
}


def failing(found: tuple[Certificate, ...]) -> set[str]:
    return {name for name, judge in JUDGES.items() if judge(found).outcome != "passed"}


def test_a_good_chain_passes_every_check() -> None:
    assert not failing(GOOD)
    assert pki.check_chain(GOOD, GOOD[2:], AT, PROFILE).outcome == "passed"


OTHER = key("other")
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
CASES: dict[str, tuple[tuple[Certificate, ...], set[str]]] = {
    "own root with the same names": (
        chain("root", key=OTHER.public_key(), signer=OTHER, issuer_key=OTHER.public_key()),
        {"root", "names", "signatures"},
    ),
    "two certificates": (GOOD[1:], {"length", "constraints", "key_usage"}),
    "other order": (
        (GOOD[1], GOOD[0], GOOD[2]),
        {"names", "constraints", "key_usage", "signatures"},
    ),
    "issuer of another name": (chain("leaf", issuer="someone"), {"names"}),
    "issuer of another key": (chain("leaf", issuer_key=OTHER.public_key()), {"names"}),
    "leaf signed by another": (chain("leaf", signer=OTHER), {"signatures"}),
    "intermediate signed by another": (chain("intermediate", signer=OTHER), {"signatures"}),
    "root signed by another": (chain("root", signer=OTHER), {"signatures"}),
    "leaf is a CA": (
        chain("leaf", constraints=x509.BasicConstraints(ca=True, path_length=None)),
        {"constraints"},
    ),
    "leaf without constraints": (chain("leaf", constraints=None), {"constraints"}),
    "intermediate is no CA": (
        chain("intermediate", constraints=x509.BasicConstraints(ca=False, path_length=None)),
        {"constraints"},
    ),
    "intermediate without constraints": (chain("intermediate", constraints=None), {"constraints"}),
    "constraints not critical": (
        chain("intermediate", constraints_critical=False),
        {"constraints"},
    ),
    "path length of the root too short": (
        chain("root", constraints=x509.BasicConstraints(ca=True, path_length=0)),
        {"constraints"},
    ),
    "unknown critical extension": (chain("leaf", extra=(UNKNOWN,)), {"constraints"}),
    "leaf may sign certificates": (
        chain("leaf", usage=usage("digital_signature", "key_cert_sign")),
        {"key_usage"},
    ),
    "leaf may not sign": (chain("leaf", usage=usage("key_agreement")), {"key_usage"}),
    "leaf without key usage": (chain("leaf", usage=None), {"key_usage"}),
    "intermediate may not sign": (
        chain("intermediate", usage=usage("crl_sign")),
        {"key_usage"},
    ),
    "intermediate without key usage": (chain("intermediate", usage=None), {"key_usage"}),
    "leaf expired": (chain("leaf", start=AT - 2 * DAY, end=AT - DAY), {"validity"}),
    "intermediate not yet valid": (
        chain("intermediate", start=AT + DAY, end=AT + 2 * DAY),
        {"validity"},
    ),
    "root expired": (chain("root", start=AT - 2 * DAY, end=AT - DAY), {"validity"}),
    "leaf of another curve": (
        chain("leaf", key=key("leaf", ec.SECP384R1()).public_key()),
        {"algorithms"},
    ),
    "leaf signed with another hash": (chain("leaf", hash=hashes.SHA384()), {"algorithms"}),
}


@pytest.mark.parametrize("what", CASES)
def test_att_02_att_03_att_04_each_rule_of_a_chain_counts(what: str) -> None:
    found, expected = CASES[what]
    assert failing(found) == expected
    assert pki.check_chain(found, GOOD[2:], AT, PROFILE).outcome == "failed"


def test_without_anchors_no_root_is_one() -> None:
    assert pki.check_root(GOOD, ()).outcome == "failed"
    assert pki.check_root((), GOOD).outcome == "failed"


def test_the_bounds_of_validity_count_as_valid() -> None:
    assert pki.check_validity(GOOD, AT - DAY).outcome == "passed"
    assert pki.check_validity(GOOD, AT + DAY).outcome == "passed"
    assert pki.check_validity(GOOD, AT + DAY + timedelta(microseconds=1)).outcome == "failed"


def test_a_missing_root_is_taken_from_the_anchors_only() -> None:
    assert pki.completed(GOOD[:2], GOOD[2:]) == GOOD
    assert pki.completed(GOOD, GOOD[2:]) == GOOD
    assert pki.completed(GOOD[:2], ()) == GOOD[:2]


# ---- revocation -------------------------------------------------------------------------------


def crl(*, serials: Iterable[int] = (), extra: tuple[Any, ...] = (), **changes: Any) -> Crl:
    options: dict[str, Any] = {
        "issuer": "intermediate",
        "signer": key("intermediate"),
        "start": AT - DAY,
        "end": AT + DAY,
        "number": True,
        "key_id": key("intermediate").public_key(),
        "hash": hashes.SHA256(),
    } | changes
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name(options["issuer"]))
        .last_update(options["start"])
        .next_update(options["end"])
    )
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(AT).build()
        )
    if options["number"]:
        builder = builder.add_extension(x509.CRLNumber(1), critical=False)
    if options["key_id"] is not None:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(options["key_id"]), critical=False
        )
    for extension in extra:
        builder = builder.add_extension(extension, critical=True)
    made = builder.sign(options["signer"], options["hash"])
    return Crl.from_bytes(made.public_bytes(Encoding.DER))


def verdict(found: Crl, issuer: Certificate = GOOD[1]) -> Verdict:
    return pki.check_crl(found, issuer, AT, PROFILE, GOOD[0])


def test_a_good_list_passes() -> None:
    assert verdict(crl(serials=(77,))).outcome == "passed"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"serials": (1,)}, "on the list"),
        ({"issuer": "root"}, "CN=root"),
        ({"signer": OTHER}, "invalid signature"),
        ({"start": AT - 2 * DAY, "end": AT - DAY}, "to"),
        ({"start": AT + DAY, "end": AT + 2 * DAY}, "to"),
        ({"number": False}, "version 2"),
        ({"key_id": None}, "version 2"),
        ({"key_id": OTHER.public_key()}, ""),
        ({"hash": hashes.SHA384()}, "ecdsa-sha384"),
        (
            {
                "extra": (
                    x509.IssuingDistributionPoint(None, None, True, False, None, False, False),
                )
            },
            "2.5.29.28",
        ),
        ({"extra": (x509.DeltaCRLIndicator(1),)}, "2.5.29.27"),
    ],
)
def test_att_05_each_rule_of_a_revocation_list_counts(changes: dict[str, Any], why: str) -> None:
    found = verdict(crl(**changes))
    assert found.outcome == "failed"
    assert why in str(found.found)


def test_att_05_an_issuer_without_crl_sign_signs_no_list() -> None:
    issuer = certificate("intermediate", usage=usage("key_cert_sign"))
    assert verdict(crl(), issuer).outcome == "failed"


def test_a_list_speaks_only_of_its_own_issuers_certificates() -> None:
    assert pki.check_not_revoked(crl(serials=(2,)), GOOD[1]).outcome == "passed"


# ---- raw signatures ---------------------------------------------------------------------------


def raw(size: int, r: int, s: int, order: str = "big") -> tuple[bytes, bytes]:
    return r.to_bytes(size, order), s.to_bytes(size, order)  # type: ignore[arg-type]


def test_att_20_only_whole_numbers_in_range_are_signatures() -> None:
    data = b"signed"
    r, s = decode_dss_signature(key("leaf").sign(data, ec.ECDSA(hashes.SHA256())))
    public = key("leaf").public_key()
    assert pki.verify_p256_raw(public, b"".join(raw(32, r, s)), data)
    for bad in ((0, s), (r, 0), (ORDER, s), (r, ORDER), (0, 0), ((1 << 256) - 1, s), (s, r)):
        assert not pki.verify_p256_raw(public, b"".join(raw(32, *bad)), data)
    assert not pki.verify_p256_raw(public, b"".join(raw(32, r, s, "little")), data)
    assert not pki.verify_p256_raw(public, b"".join(raw(33, r, s)), data)
    assert not pki.verify_p256_raw(public, b"", data)
    assert not pki.verify_p256_raw(public, b"".join(raw(32, r, s)), data + b"x")
    other = key("leaf", ec.SECP384R1()).public_key()
    assert not pki.verify_p256_raw(other, b"".join(raw(32, r, s)), data)
    assert not pki.verify_ecdsa(public, "sha256", -r, s, data)


def test_att_20_numbers_of_amd_are_little_endian_and_padded() -> None:
    private = key("chip", ec.SECP384R1())
    r, s = decode_dss_signature(private.sign(b"x", ec.ECDSA(hashes.SHA384())))
    left, right = raw(72, r, s, "little")
    assert pki.verify_p384_le(private.public_key(), left, right, b"x")
    assert not pki.verify_p384_le(private.public_key(), left[:-1] + b"\1", right, b"x")
    assert not pki.verify_p384_le(private.public_key(), left, right[:-1] + b"\1", b"x")
    assert not pki.verify_p384_le(private.public_key(), bytes(72), right, b"x")
    assert not pki.verify_p384_le(key("leaf").public_key(), left, right, b"x")


def test_att_21_what_is_no_point_is_no_key() -> None:
    numbers = key("leaf").public_key().public_numbers()
    good = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    assert pki.p256_key(good) is not None
    for bad in (
        bytes(64),
        good[:-1] + bytes([good[-1] ^ 1]),
        b"\xff" * 64,
        good[:63],
        b"",
        good * 2,
    ):
        assert pki.p256_key(bad) is None


def test_der_signatures_are_strict() -> None:
    signature = key("leaf").sign(b"x", ec.ECDSA(hashes.SHA256()))
    public = key("leaf").public_key()
    assert pki.verify_signature(public, "ecdsa-sha256", signature, b"x")
    r, s = decode_dss_signature(signature)
    long = der.encode_sequence(
        der.encode(2, b"\0" + der.encode_integer(r)[2:]), der.encode_integer(s)
    )
    for bad in (signature + b"\0", signature[:-1], long, b"", b"\x30\x00"):
        assert not pki.verify_signature(public, "ecdsa-sha256", bad, b"x")
    assert not pki.verify_signature(public, "ecdsa-sha384", signature, b"x")
    assert not pki.verify_signature(public, "rsa-pss-sha256", signature, b"x")
    assert not pki.verify_signature(public, "", signature, b"x")


def test_pss_has_one_hash_and_a_salt_of_its_size() -> None:
    def parameters(digest: str, mask: str, salt: int) -> AlgorithmId:
        def hash_id(oid: str) -> bytes:
            return der.encode_sequence(der.encode_oid(oid))

        mgf = der.encode_sequence(der.encode_oid("1.2.840.113549.1.1.8"), hash_id(mask))
        body = der.encode_sequence(
            der.encode(der.context(0), hash_id(digest)),
            der.encode(der.context(1), mgf),
            der.encode(der.context(2), der.encode_integer(salt)),
        )
        return AlgorithmId("1.2.840.113549.1.1.10", body)

    sha256, sha384 = "2.16.840.1.101.3.4.2.1", "2.16.840.1.101.3.4.2.2"
    assert pki.algorithm_name(parameters(sha384, sha384, 48)) == "rsa-pss-sha384"
    assert pki.algorithm_name(parameters(sha384, sha256, 48)) is None
    assert pki.algorithm_name(parameters(sha384, sha384, 20)) is None
    assert pki.algorithm_name(parameters("1.3.14.3.2.26", "1.3.14.3.2.26", 20)) is None
    assert pki.algorithm_name(AlgorithmId("1.2.840.113549.1.1.10", None)) is None
    assert pki.algorithm_name(AlgorithmId("1.2.840.10045.4.3.2", b"\x05\x00")) is None
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    digest = hashes.SHA384()
    signature = private.sign(b"x", padding.PSS(padding.MGF1(digest), 48), digest)
    assert pki.verify_signature(private.public_key(), "rsa-pss-sha384", signature, b"x")
    assert not pki.verify_signature(private.public_key(), "rsa-pkcs1-sha384", signature, b"x")
    short = private.sign(b"x", padding.PSS(padding.MGF1(digest), 20), digest)
    assert not pki.verify_signature(private.public_key(), "rsa-pss-sha384", short, b"x")


# ---- the store --------------------------------------------------------------------------------


def test_the_store_is_bounded_by_number_and_size() -> None:
    store = Cache(max_items=3, max_bytes=10)
    for index in range(10):
        assert store.get("x", bytes([index]), len).value == 1
    assert len(store) == 3
    store.get("x", bytes(8), len)
    assert len(store) == 3
    store.get("x", bytes(9), len)
    assert len(store) == 1
    store.get("x", bytes(11), len)
    assert len(store) <= 1


def test_the_store_tells_readers_apart_and_forgets_failures() -> None:
    store = Cache(max_items=3, max_bytes=10)
    assert store.get("size", b"abc", len).value == 3
    assert store.get("first", b"abc", lambda data: data[:1]).value == b"a"
    assert store.get("size", b"abc", lambda _: 0).value == 3
    with pytest.raises(ZeroDivisionError):
        store.get("size", b"abcd", lambda _: 1 // 0)
    assert store.get("size", b"abcd", len).value == 4
    known = store.get("size", b"abc", len)
    assert known.fact(("a", 1), lambda: 1) == 1
    assert known.fact(("a", 1), lambda: 2) == 1
    assert known.fact(("a", 2), lambda: 2) == 2
