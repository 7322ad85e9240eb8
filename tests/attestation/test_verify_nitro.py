"""Hostile Nitro documents, made under roots of our own so that every flaw is reachable."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_nitro import AT, ISSUER, NONCE, PCR0, PLACES, judge, key_of

from pyenclave.attestation import AppraisalPolicy
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor


def test_a_document_of_a_pinned_root_is_accepted_identified_and_fresh() -> None:
    result = judge(ISSUER.document(), user_data=b"data")
    assert result.refused_by == ()
    assert result.accepted
    assert result.identified
    assert result.fresh
    assert result.claims["public_key"] == b"key".hex()


def test_att_02_a_root_of_the_same_name_is_no_anchor() -> None:
    forged = key_of("forged")
    data = ISSUER.document(root={"key": forged, "signer": forged}, region={"signer": forged})
    result = judge(data)
    assert result.refused_by == ("chain.root",)
    assert not result.genuine
    assert "chain.root" in judge(ISSUER.document(), roots=[]).refused_by


CHAIN_FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "a leaf that is a CA": ({"leaf": {"ca": True}}, "chain.constraints"),
    "an issuer that is no CA": ({"instance": {"ca": False}}, "chain.constraints"),
    "constraints that are not critical": ({"region": {"critical": False}}, "chain.constraints"),
    "a path that is too long": ({"region": {"path_length": 0}}, "chain.constraints"),
    "an unknown critical extension": (
        {"leaf": {"extension": x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"")}},
        "chain.constraints",
    ),
    "a leaf that may sign certificates": ({"leaf": {"cert_sign": True}}, "chain.key_usage"),
    "an issuer that may not": ({"instance": {"cert_sign": False}}, "chain.key_usage"),
    "another issuer's name": ({"leaf": {"issuer": "other"}}, "chain.names"),
    "an expired leaf": ({"leaf": {"end": AT - timedelta(seconds=1)}}, "chain.validity"),
    "an expired issuer": ({"region": {"end": AT - timedelta(seconds=1)}}, "chain.validity"),
    "a leaf of tomorrow": ({"leaf": {"start": AT + timedelta(minutes=1)}}, "chain.validity"),
    "a leaf signed by another": ({"leaf": {"signer": key_of("forged")}}, "chain.signatures"),
    "an issuer signed by another": ({"region": {"signer": key_of("forged")}}, "chain.signatures"),
    "SHA-256 in the chain": ({"instance": {"hash": hashes.SHA256()}}, "chain.algorithms"),
    "P-256 in the chain": (
        {
            "instance": {"key": key_of("small", ec.SECP256R1())},
            "leaf": {"signer": key_of("small", ec.SECP256R1()), "hash": hashes.SHA256()},
        },
        "chain.algorithms",
    ),
}


@pytest.mark.parametrize("name", CHAIN_FLAWS)
def test_att_03_04_each_flaw_of_a_chain_is_found_by_its_check(name: str) -> None:
    changes, check = CHAIN_FLAWS[name]
    result = judge(ISSUER.document(**changes))
    assert check in result.refused_by
    assert not result.genuine


def test_att_03_the_order_of_the_bundle_counts() -> None:
    made = [ISSUER.certificate(place).public_bytes(Encoding.DER) for place in PLACES]
    for bundle in ((made[2], made[3], made[1]), (made[1], made[2], made[3]), (made[3], made[1])):
        result = judge(ISSUER.document(cabundle=bundle))
        assert {"chain.names", "chain.root"} & set(result.refused_by)
        assert not result.genuine


SIGNATURE_FLAWS: dict[str, dict[str, Any]] = {
    "another key": {"key": key_of("forged")},
    "no signature": {"message": {"signature": b""}},
    "a signature of zeros": {"message": {"signature": bytes(96)}},
    "a byte more": {"message": {"signature": bytes(97)}},
    "another algorithm": {
        "message": {"protected": cbor.dumps({1: -7})},
    },
    "no algorithm of COSE": {"message": {"protected": cbor.dumps({1: -257})}},
}


@pytest.mark.parametrize("name", SIGNATURE_FLAWS)
def test_att_20_each_flaw_of_the_signature_is_found(name: str) -> None:
    result = judge(ISSUER.document(**SIGNATURE_FLAWS[name]))
    assert "document.signature" in result.refused_by
    assert not result.genuine


def test_a_leaf_of_another_curve_signs_nothing() -> None:
    key = key_of("small", ec.SECP256R1())
    result = judge(ISSUER.document(leaf={"key": key}, key=key, algorithm="ES256"))
    assert {"chain.algorithms", "document.signature"} <= set(result.refused_by)


def test_att_22_each_byte_of_a_document_counts() -> None:
    data = ISSUER.document()
    policy = AppraisalPolicy.permissive()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        try:
            result = judge(bytes(changed), policy=policy, nonce=None, freshness="not_checked")
        except EvidenceFormatError:
            continue
        assert not result.genuine, place


@pytest.mark.parametrize("size", [0, 1, 5, 20, 100])
def test_att_22_a_document_that_is_cut_or_longer_is_refused(size: int) -> None:
    data = ISSUER.document()
    for changed in (data[: len(data) - 1 - size], data + bytes(size + 1)):
        result = judge(changed)
        assert "document.format" in result.refused_by
        assert not result.genuine


@pytest.mark.parametrize(
    ("pcrs", "check"),
    [
        ({0: PCR0}, "document.pcrs"),
        ({0: PCR0, 2: bytes(48)}, "document.pcrs"),
        ({1: bytes(48), 2: bytes(48)}, "document.pcrs"),
        ({4: bytes(48)}, "debug"),
    ],
)
def test_registers_of_the_image_must_be_there(pcrs: dict[int, bytes], check: str) -> None:
    result = judge(ISSUER.document(pcrs=pcrs))
    assert check in result.refused_by
    assert not result.genuine


@pytest.mark.parametrize(("digest", "size"), [("SHA256", 32), ("SHA512", 64)])
def test_only_sha384_is_taken(digest: str, size: int) -> None:
    pcrs = {index: bytes([index + 1]) * size for index in range(16)}
    result = judge(ISSUER.document(digest=digest, pcrs=pcrs))
    assert "document.digest" in result.refused_by
    assert not result.genuine


@pytest.mark.parametrize(
    ("shift", "genuine"),
    [
        (timedelta(), True),
        (timedelta(minutes=4), True),
        (timedelta(minutes=6), False),
        (timedelta(minutes=-59), True),
        (timedelta(minutes=-66), False),
        (timedelta(days=-400), False),
    ],
)
def test_the_time_in_the_document_fits_the_certificate_and_now(
    shift: timedelta, genuine: bool
) -> None:
    result = judge(ISSUER.document(timestamp=int((AT + shift).timestamp() * 1000)))
    assert result.genuine is genuine
    assert result.refused_by == (() if genuine else ("document.time",))


def test_att_01_a_zero_image_register_is_debug_on_every_path() -> None:
    zero = {index: bytes(48) for index in range(16)}
    policy = AppraisalPolicy.any_code()
    result = judge(ISSUER.document(pcrs=zero), policy=policy)
    assert result.genuine
    assert result.refused_by == ("debug",)
    # Not only if all three registers are zero: an image always has a measurement.
    others = zero | {1: b"\1" * 48, 2: b"\2" * 48}
    assert judge(ISSUER.document(pcrs=others), policy=policy).refused_by == ("debug",)
    assert judge(ISSUER.document(pcrs=zero), policy=AppraisalPolicy.permissive()).accepted


@pytest.mark.parametrize("nonce", [None, b"", NONCE[:-1], NONCE + b"\0", NONCE.swapcase() + b"x"])
def test_att_13_another_nonce_is_refused(nonce: bytes | None) -> None:
    result = judge(ISSUER.document(nonce=nonce))
    assert result.refused_by == ("nonce",)
    assert not result.fresh


def test_att_12_each_byte_of_the_nonce_counts() -> None:
    for place in range(len(NONCE)):
        changed = bytearray(NONCE)
        changed[place] ^= 1
        assert judge(ISSUER.document(), nonce=bytes(changed)).refused_by == ("nonce",)


def test_user_data_is_compared_when_it_is_given() -> None:
    for wanted in (b"", b"dat", b"data\0", b"Data"):
        assert judge(ISSUER.document(), user_data=wanted).refused_by == ("user_data",)
    assert judge(ISSUER.document(user_data=None), user_data=b"").refused_by == ("user_data",)
    assert judge(ISSUER.document(), report_data=bytes(64)).refused_by == ("report_data",)


@pytest.mark.parametrize(
    ("pcrs", "accepted"),
    [
        ({0: PCR0}, True),
        ({0: (b"\x22" * 48, PCR0)}, True),
        ({0: PCR0, 8: bytes(48)}, True),
        ({0: b"\x22" * 48}, False),
        ({0: PCR0, 8: b"\x22" * 48}, False),
        ({0: PCR0[:32]}, False),
        ({0: PCR0, 31: bytes(48)}, False),
    ],
)
def test_att_31_registers_are_compared_whole(pcrs: Any, accepted: bool) -> None:
    result = judge(ISSUER.document(), policy=AppraisalPolicy(pcrs=pcrs))
    assert result.accepted is accepted
    assert result.refused_by == (() if accepted else ("code.pcrs",))


def test_without_reference_values_code_is_not_identified() -> None:
    result = judge(ISSUER.document(), policy=AppraisalPolicy.any_code())
    assert result.accepted
    assert not result.identified


@pytest.mark.parametrize("certificate", [b"x", b"\x30\x00", bytes(1024)])
def test_att_35_certificates_that_cannot_be_read_refuse(certificate: bytes) -> None:
    result = judge(ISSUER.document(certificate=certificate))
    assert "chain.format" in result.refused_by
    assert not result.genuine
    result = judge(ISSUER.document(cabundle=(certificate,)))
    assert not result.genuine


def test_the_age_of_a_document_is_compared_when_a_limit_is_given() -> None:
    data = ISSUER.document(timestamp=int(AT.timestamp() * 1000) - 61_000)
    assert judge(data, policy=AppraisalPolicy(pcrs={0: PCR0}, max_age=61)).accepted
    old = judge(data, policy=AppraisalPolicy(pcrs={0: PCR0}, max_age=60))
    assert old.refused_by == ("document.age",)


def test_att_30_a_policy_for_another_kind_takes_no_document() -> None:
    """Whatever is not compared must not accept: the policy speaks of SGX and SNP only."""
    for policy in (
        AppraisalPolicy(mrenclave=b"\1" * 32),
        AppraisalPolicy(mrsigner=b"\1" * 32, product_id=1),
        AppraisalPolicy(launch_digest=b"\1" * 48),
        AppraisalPolicy(claims={"iss": "x"}),
    ):
        result = judge(ISSUER.document(), policy=policy)
        assert result.refused_by == ("code.named",)
        assert result.genuine
        assert not result.accepted
    # A policy may name identities of several kinds.
    fleet = AppraisalPolicy(mrenclave=b"\1" * 32, pcrs={0: PCR0})
    assert judge(ISSUER.document(), policy=fleet).accepted


def test_att_32_what_is_remembered_of_a_chain_is_not_taken_for_another() -> None:
    """The same certificates first in a good chain, then forged, cut and late."""
    assert judge(ISSUER.document()).accepted
    forged = ISSUER.document(leaf={"signer": key_of("forged")})
    for _ in range(2):
        assert judge(forged).refused_by == ("chain.signatures",)
    assert judge(ISSUER.document()).accepted
    assert "chain.validity" in judge(ISSUER.document(), at=AT + timedelta(days=9)).refused_by
    assert judge(ISSUER.document(), roots=[]).refused_by == ("chain.root",)
