"""GPU reports: what breaks one, which certificates count, and what a policy says of one."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from issuer_nvidia import (
    DIGEST,
    FIRMWARE,
    NONCE,
    chain,
    crl,
    device_identity,
    judge,
    key_of,
    report,
    root,
    sign,
)

from pyenclave.attestation import AppraisalPolicy
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.spdm import FWID, Measurement
from pyenclave.formats.x509 import pem_blocks

ANY = AppraisalPolicy.any_code()


def test_a_good_report_is_accepted_identified_and_fresh() -> None:
    result = judge(report())
    assert result.accepted, result.refused_by
    assert result.identified
    assert result.fresh
    assert result.claims["device"] == "NVIDIA:GH100:0123"
    assert result.claims["measurements"]["1"] == DIGEST.hex()
    assert result.claims["chain"] == ["leaf", "brom", "product", "root"]
    json.dumps(result.to_json())


def test_zeros_behind_a_report_are_no_matter_and_other_bytes_are() -> None:
    assert judge(report() + b"\0").accepted
    assert judge(report() + b"\0\1").refused_by == ("report.format",)


def test_att_02_each_byte_of_a_report_counts() -> None:
    data = report()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        try:
            result = judge(bytes(changed), policy=ANY)
        except EvidenceFormatError:
            continue
        assert not result.genuine, position


def certificates(text: bytes) -> tuple[bytes, ...]:
    return pem_blocks(text, "CERTIFICATE", limit=9)


def test_each_byte_of_the_certificates_counts() -> None:
    good = report()
    text = chain()
    data = bytearray(text)
    for position in range(0, len(data), 7):
        data[position] ^= 1
        result = judge(good, chain=bytes(data), policy=ANY)
        # Other white space is no change, nor are the bits of base64 that stand for no byte.
        assert not result.genuine or certificates(bytes(data)) == certificates(text), position
        data[position] ^= 1


def test_signatures_of_other_forms_are_refused() -> None:
    signed = report()[:-96]
    good = sign(signed, key_of("leaf"))
    assert judge(signed + good).accepted
    for signature in (
        bytes(96),
        b"\xff" * 96,
        bytes(48) + good[48:],
        good[:48] + bytes(48),
        good[48:] + good[:48],
        good[47::-1] + good[:47:-1],
    ):
        assert judge(signed + signature).refused_by == ("report.signature",)


def test_a_key_of_another_curve_is_refused() -> None:
    key = key_of("leaf", ec.SECP521R1())
    result = judge(report(), chain=chain(leaf={"key": key}))
    assert set(result.refused_by) == {"chain.algorithms", "report.signature"}


def test_a_root_among_the_certificates_is_no_anchor() -> None:
    assert judge(report(), roots=[]).refused_by == ("chain.root",)
    text = chain()
    bare = text[: text.rindex(b"-----BEGIN")]
    assert judge(report(), chain=bare).accepted
    assert "chain.root" in judge(report(), chain=bare, roots=[]).refused_by


def test_an_issuer_above_the_gpu_makes_no_report() -> None:
    """Whoever has a CA's key could sign measurements; a CA is no leaf."""
    text = chain()
    above = text[text.index(b"-----BEGIN", 10) :]
    result = judge(report(key=key_of("brom"), fields={}), chain=above)
    assert set(result.refused_by) == {"chain.constraints", "chain.key_usage"}


@pytest.mark.parametrize("data", [b"", b"\x30\x00", b"-----BEGIN CERTIFICATE-----\n"])
def test_damaged_certificates_refuse(data: bytes) -> None:
    result = judge(report(), endorsements={"cert-chain.pem": data})
    assert result.refused_by == ("chain.format",)


def test_a_chain_of_one_or_seven_is_refused() -> None:
    text = chain()
    only = text[text.rindex(b"-----BEGIN") :]
    assert "chain.format" in judge(report(), endorsements={"cert-chain.pem": only}).refused_by
    many = text + 3 * only
    assert "chain.format" in judge(report(), endorsements={"cert-chain.pem": many}).refused_by


# ---- revocation -------------------------------------------------------------------------------


def test_a_list_that_revokes_nothing_of_the_chain_passes() -> None:
    assert judge(report(), crl=crl(revoked=(99,))).accepted
    assert judge(report(), crl=crl(revoked=(1,), issuer="root")).accepted, "another issuer's"


@pytest.mark.parametrize(
    "data",
    [
        crl(revoked=(1,)),
        crl(revoked=(2,), issuer="product"),
        crl(revoked=(3,), issuer="root"),
        crl(end=timedelta(minutes=-1)),
        crl(issuer="stranger"),
        crl()[:-1],
        b"",
    ],
)
def test_a_list_that_revokes_or_does_not_hold_refuses(data: bytes) -> None:
    assert judge(report(), crl=data).refused_by == ("crl",)


# ---- firmware ---------------------------------------------------------------------------------


def test_firmware_of_report_and_certificate_agree() -> None:
    other = {"fields": {FWID: b"\x55" * 48}}
    assert judge(report(**other)).refused_by == ("report.fwid",)
    identity = {"identity": device_identity(b"\x55" * 48)}
    assert judge(report(**other), chain=chain(leaf=identity)).accepted
    for short in (b"", FIRMWARE[:-1], FIRMWARE + b"\0"):
        assert judge(report(fields={FWID: short})).refused_by == ("report.fwid",)
    malformed = {"identity": b"\x30\x01\x02"}
    assert judge(report(), chain=chain(leaf=malformed)).refused_by == ("report.fwid",)


def test_older_firmware_names_none() -> None:
    for result in (judge(report(fields={})), judge(report(), chain=chain(leaf={"identity": None}))):
        assert result.accepted
        (check,) = (item for item in result.checks if item.name == "report.fwid")
        assert check.outcome == "skipped"


# ---- what is wanted ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [0, 1, 0xFE])
def test_a_report_of_some_measurements_only_is_refused(operation: int) -> None:
    assert judge(report(operation=operation)).refused_by == ("report.whole",)


@pytest.mark.parametrize(
    "wanted", [{1: b"\x55" * 48}, {1: DIGEST, 2: DIGEST}, {3: DIGEST}, {0: DIGEST}, {254: DIGEST}]
)
def test_every_measurement_that_is_named_must_match(wanted: dict[int, bytes]) -> None:
    result = judge(report(), policy=AppraisalPolicy(gpu_measurements=wanted))
    assert result.refused_by == ("code.gpu_measurements",)
    assert result.genuine
    assert not result.identified


def test_measurements_of_zero_alone_identify_nothing() -> None:
    with pytest.raises(ValueError, match="not zero"):
        AppraisalPolicy(gpu_measurements={2: bytes(48)})
    policy = AppraisalPolicy(gpu_measurements={1: DIGEST, 2: bytes(48)})
    assert judge(report(), policy=policy).identified


def test_a_raw_value_is_not_taken_for_a_digest_of_another_size() -> None:
    odd: dict[str, Any] = {"measurements": {1: Measurement(4, True, DIGEST + b"\0")}}
    assert judge(report(**odd)).refused_by == ("code.gpu_measurements",)


def test_the_nonce_is_the_requests_and_not_the_responses() -> None:
    data = report(nonce=bytes(32), response_nonce=NONCE)
    assert judge(data).refused_by == ("nonce",)
    assert judge(report(nonce=NONCE[:20] + bytes(12)), nonce=NONCE[:20]).fresh
    assert judge(report(), nonce=NONCE + b"\0").refused_by == ("nonce",)


def test_att_31_a_policy_of_other_hardware_takes_no_gpu() -> None:
    for policy in (AppraisalPolicy(mrtd=DIGEST), AppraisalPolicy(pcrs={1: DIGEST})):
        assert not judge(report(), policy=policy).accepted


def test_the_pinned_root_is_nvidias_own() -> None:
    from pyenclave.attestation import roots

    (pinned,) = roots.for_kind("nvidia")
    assert pinned.common_name == "NVIDIA Device Identity CA"
    assert pinned.der != root()
