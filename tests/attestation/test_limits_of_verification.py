"""What verifying evidence does not protect against: each is shown to work (SECURITY.md)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import jose
from pyenclave.formats.x509 import Certificate
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.samples import MAA, Sample, samples

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
NONCE = bytes(range(32))
MINE = bytes(range(48))  # the launch digest that the relying party wants


@pytest.fixture(scope="module")
def made() -> dict[str, Sample]:
    return samples(NOW, NONCE)


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip("milan")


def judge(sample: Sample, policy: AppraisalPolicy, *, at: datetime = NOW) -> AttestationResult:
    """Judge without a nonce."""
    return appraise(
        sample.evidence,
        policy=policy,
        freshness="not_checked",
        endorsements=sample.endorsements,
        roots=[] if sample.root is None else [sample.root],
        at=at,
    )


def test_att_13_old_evidence_is_accepted_by_who_sends_no_nonce(made: dict[str, Sample]) -> None:
    later = NOW + timedelta(days=20)
    result = judge(made["sgx"], AppraisalPolicy(mrenclave=bytes(range(32))), at=later)
    assert result.accepted
    assert result.identified
    assert not result.fresh


def test_att_04_who_gives_an_earlier_time_brings_back_what_is_over(
    made: dict[str, Sample],
) -> None:
    policy = AppraisalPolicy.strict()
    assert not judge(made["sgx"], policy, at=NOW + timedelta(days=60)).accepted
    assert judge(made["sgx"], policy, at=NOW).accepted


def test_att_05_a_key_revoked_after_the_list_was_made_is_still_accepted() -> None:
    machine = IntelPlatform(NOW)
    sample = Sample(
        file="quote.bin",
        evidence=machine.enclave_quote(),
        endorsements=machine.endorsements(),
        root=machine.root,
    )
    serial = Certificate.from_der(machine.pck).serial
    newer = dict(sample.endorsements, **{"pck-crl.der": machine.pck_crl(revoked=[serial])})
    policy = AppraisalPolicy.strict()
    assert "revocation.pck" in judge(replace(sample, endorsements=newer), policy).refused_by
    assert judge(sample, policy).accepted, "with the older list"


def test_att_05_a_revoked_chip_is_accepted_by_who_gives_no_list_of_amds(chip: AmdChip) -> None:
    intermediate = chip.ask.certificate.serial
    sample = Sample(
        file="report.bin",
        evidence=chip.report(),
        endorsements=chip.endorsements(revoked=[intermediate]),
        root=chip.root,
    )
    policy = AppraisalPolicy.strict()
    assert "crl" in judge(sample, policy).refused_by
    without = {name: data for name, data in sample.endorsements.items() if name != "crl.der"}
    assert judge(replace(sample, endorsements=without), policy).accepted


def test_att_34_any_process_of_a_guest_gets_evidence_that_is_accepted(chip: AmdChip) -> None:
    """The report says which guest, not which program in it chose the report data."""
    for asked_by in (b"the service".ljust(64, b"\0"), b"anything else".ljust(64, b"\0")):
        sample = Sample(
            file="report.bin",
            evidence=chip.report(report_data=asked_by, measurement=MINE),
            endorsements=chip.endorsements(),
            root=chip.root,
        )
        assert judge(sample, AppraisalPolicy(launch_digest=MINE)).accepted


def test_att_36_who_has_a_chips_key_forges_any_launch(chip: AmdChip) -> None:
    stolen = chip.key
    forged = chip.report(key=stolen, measurement=MINE, report_data=NONCE.ljust(64, b"\0"))
    sample = Sample(
        file="report.bin", evidence=forged, endorsements=chip.endorsements(), root=chip.root
    )
    assert judge(sample, AppraisalPolicy(launch_digest=MINE)).accepted


def test_an_issuer_of_tokens_says_what_it_likes(made: dict[str, Sample]) -> None:
    """A token proves that its issuer said so, and shows no hardware."""
    from pyenclave.testing.certificates import Key

    issued = int(NOW.timestamp())
    key = Key.rsa(2048, index=8)  # the one of the issuer in the samples
    invented = {
        "iss": MAA,
        "iat": issued,
        "nbf": issued,
        "exp": issued + 60,
        "x-ms-ver": "1.0",
        "x-ms-attestation-type": "sgx",
        "x-ms-sgx-is-debuggable": False,
        "x-ms-sgx-mrenclave": "ab" * 32,
    }
    token = jose.sign(invented, key=key.private, algorithm="RS256", kid="1").encode()
    sample = replace(made["maa"], evidence=token)
    assert judge(sample, AppraisalPolicy(mrenclave=b"\xab" * 32)).identified


def test_a_td_report_of_azure_without_its_quote_is_not_genuine(made: dict[str, Sample]) -> None:
    sample = made["azure-tdx"]
    files = {n: data for n, data in sample.endorsements.items() if n != "td-quote.bin"}
    result = judge(replace(sample, endorsements=files), AppraisalPolicy.permissive())
    assert not result.genuine
    assert "td.quote" in result.refused_by


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"at": "2026-11-22T00:00:00Z"}, "at is a datetime, not str"),
        ({"nonce": "00" * 16}, r"nonce is bytes, not str: bytes.fromhex\(nonce\)"),
        ({"policy": "policy.toml"}, "AppraisalPolicy.from_file"),
    ],
)
def test_text_where_there_must_be_a_value_is_said_to_be_text(
    given: dict[str, Any], said: str
) -> None:
    arguments = {"policy": AppraisalPolicy.strict(), "nonce": b"\1" * 32} | given
    with pytest.raises(TypeError, match=said):
        appraise(AmdChip("milan").report(), **arguments)


def test_a_nonce_of_zeros_is_never_fresh() -> None:
    """Report data that nobody set is all zeros: such a nonce would make any evidence fresh."""
    chip = AmdChip("milan")
    for nonce, report_data in ((bytes(32), None), (b"\1" * 32, bytes(64))):
        result = appraise(
            chip.report(),
            policy=AppraisalPolicy.strict(),
            endorsements=chip.endorsements(),
            nonce=nonce,
            report_data=report_data,
            roots=[chip.root],
        )
        assert result.genuine
        assert not result.fresh
        assert result.refused_by == ("nonce",)
