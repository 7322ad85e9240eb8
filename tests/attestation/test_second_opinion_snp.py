"""Another verifier of SEV-SNP reports: its own real report, our chips, and where we differ."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.testing.amd import AmdChip

NOW = datetime(2026, 11, 1, tzinfo=UTC)
other = pytest.importorskip("omne_attest", reason="the second opinion is not installed")
# It reads certificates by a library that warns of AMD's serial number 0.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


def _real() -> tuple[bytes, dict[str, bytes]]:
    from pyenclave.formats.x509 import encode_pem

    files = {
        "vek.der": other.vectors.vcek(),
        "ask.pem": encode_pem(other.vectors.ask()),
        "ark.pem": encode_pem(other.vectors.ark()),
    }
    return other.vectors.attestation(), files


def _ours(report: bytes, files: dict[str, bytes], *roots: bytes) -> Any:
    return appraise(
        report,
        policy=AppraisalPolicy.strict(),
        endorsements=files,
        freshness="not_checked",
        roots=roots,
        at=NOW,
    )


def _theirs(
    report: bytes, vek: bytes, ask: bytes, ark: bytes, pin: bytes, *, debug: bool = False
) -> bool:
    found = other.Report.parse(report)
    policy = other.Policy(
        measurement=found.measurement,
        report_data=found.report_data,
        max_vmpl=3,
        reject_debug=not debug,
    )
    try:
        other.verify(report, vek, ask, ark, pin, policy)
    except other.Fail:
        return False
    return True


def test_the_others_real_milan_report_is_genuine_under_amds_own_root() -> None:
    report, files = _real()
    result = _ours(report, files)
    assert result.genuine
    assert result.refused_by == ("guest.debug",), "the guest was a debug guest"
    found = other.Report.parse(report)
    assert result.claims["measurement"] == found.measurement.hex()
    assert result.claims["chip_id"] == found.chip_id.hex()
    assert result.claims["report_data"] == found.report_data.hex()
    pin = other.vectors.ARK_SHA256
    vectors = other.vectors
    chain = vectors.vcek(), vectors.ask(), vectors.ark(), pin
    assert _theirs(report, *chain, debug=True)
    assert not _theirs(report, *chain)


@pytest.mark.parametrize("at", [0, 4, 0x08, 0x38, 0x50, 0x90, 0x180, 0x1A0, 0x29F, 0x2A0, 0x2E8])
def test_both_refuse_what_was_changed(at: int) -> None:
    report, files = _real()
    changed = bytearray(report)
    changed[at] ^= 1
    assert not _ours(bytes(changed), files).genuine
    vectors = other.vectors
    try:
        theirs = _theirs(
            bytes(changed),
            vectors.vcek(),
            vectors.ask(),
            vectors.ark(),
            vectors.ARK_SHA256,
            debug=True,
        )
    except other.Fail:
        theirs = False
    assert not theirs


def test_both_accept_a_synthetic_chip_under_its_own_root() -> None:
    chip = AmdChip("milan")
    report = chip.report(report_data=b"\x05" * 64)
    assert _ours(report, chip.endorsements(), chip.root).accepted
    pin = chip.ark.certificate.sha256
    assert _theirs(report, chip.vek, chip.ask.der, chip.ark.der, pin)
    assert not _ours(report, chip.endorsements()).genuine
    assert not _theirs(report, chip.vek, chip.ask.der, chip.ark.der, other.vectors.ARK_SHA256)


def test_a_chip_whose_microcode_has_two_content_bytes_is_read() -> None:
    """DER writes 219 as ``02 02 00 DB``; a reader of one fixed byte sees zero."""
    chip = AmdChip("milan", tcb={"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219})
    assert _ours(chip.report(), chip.endorsements(), chip.root).genuine
