"""Hardware → platform → enclave: a machine vouches for a platform, or the evidence is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_pyenclave import Issuer

from pyenclave.attestation import AttestationResult, kind_of
from pyenclave.attestation.checks import PASSED
from pyenclave.attestation.verify_machine import CHECKS
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.hcl import REPORT_TYPE_SNP
from pyenclave.formats.machine import MAX_MACHINE, MachineEvidence, machine_report_data
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.intel import IntelPlatform

LAUNCH, MRTD = bytes(range(48)), bytes(range(48))


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip()


@pytest.fixture(scope="module")
def intel() -> IntelPlatform:
    return IntelPlatform(now=Issuer.AT)


def vouched(issuer: Issuer) -> bytes:
    """What the machine has to put into its report for the issuer's platform."""
    return machine_report_data(
        root=issuer.root.public_bytes(Encoding.DER),
        attestation_key=issuer.raw_public(issuer.key("attestation")),
    )


def snp(chip: AmdChip, data: bytes, **fields: Any) -> MachineEvidence:
    report = chip.report(report_data=data, **fields)
    return MachineEvidence(evidence=report, files=chip.endorsements())


def td(intel: IntelPlatform, data: bytes, **fields: Any) -> MachineEvidence:
    quote = intel.td_quote(report_data=data, **fields)
    return MachineEvidence(evidence=quote, files=intel.endorsements("tdx"))


def azure(chip: AmdChip, data: bytes) -> MachineEvidence:
    vm = AzureVm(hardware=lambda bound: chip.report(report_data=bound), user_data=data)
    assert vm.report_type == REPORT_TYPE_SNP
    return MachineEvidence(
        evidence=vm.hcl_report(), files={**chip.endorsements(), **vm.endorsements()}
    )


def evidence(issuer: Issuer, machine: MachineEvidence | bytes | None, tee: str) -> bytes:
    data = machine.to_bytes() if isinstance(machine, MachineEvidence) else machine
    return replace(issuer.parts(record={"tee": tee}), machine=data).to_bytes()


def judge(issuer: Issuer, data: bytes, *pins: bytes, **options: Any) -> AttestationResult:
    """Appraise; the vendor's root is the synthetic chip's, the platform's is enrolled."""
    roots = options.pop("roots", [issuer.root, *pins])
    policy = issuer.policy(**({"dangerous_allow_software": False} | options.pop("policy", {})))
    return issuer.appraise(data, policy=policy, roots=roots, **options)


@pytest.fixture(params=["snp", "tdx", "azure"])
def world(request: Any, issuer: Issuer, chip: AmdChip, intel: IntelPlatform) -> Any:
    """Machine evidence that vouches, its TEE and the vendor's root, for each kind of machine."""
    data = vouched(issuer)
    return {
        "snp": lambda: (snp(chip, data), "sev-snp", chip.root, {"launch_digest": [LAUNCH]}),
        "tdx": lambda: (td(intel, data), "tdx", intel.root, {"mrtd": [MRTD]}),
        "azure": lambda: (azure(chip, data), "sev-snp", chip.root, {"launch_digest": [LAUNCH]}),
    }[request.param]()


def test_one_verification_walks_from_the_hardware_to_the_enclave(world: Any, issuer: Issuer):
    machine, tee, root, names = world
    result = judge(issuer, evidence(issuer, machine, tee), root, policy=names)
    assert result.refused_by == ()
    assert result.accepted
    assert result.identified
    assert result.fresh
    assert result.claims["tee"] == tee
    assert result.claims["machine"]["kind"] == kind_of(machine.evidence)


def test_a_record_alone_claims_no_hardware(world: Any, issuer: Issuer):
    _, tee, root, _ = world
    result = judge(issuer, evidence(issuer, None, tee), root)
    assert result.refused_by == ("record.tee",)
    assert not result.genuine
    assert result.claims["tee"] == "none"


def test_a_machine_that_the_record_does_not_claim_is_refused(world: Any, issuer: Issuer):
    machine, _, root, _ = world
    policy = {"dangerous_allow_software": True}
    result = judge(issuer, evidence(issuer, machine, "none"), root, policy=policy)
    assert set(result.refused_by) == {"record.tee", "machine.kind"}
    assert result.claims["tee"] == "none"


def test_a_machine_of_another_tee_is_refused(world: Any, issuer: Issuer):
    machine, tee, root, _ = world
    other = "tdx" if tee == "sev-snp" else "sev-snp"
    result = judge(issuer, evidence(issuer, machine, other), root)
    assert result.refused_by == ("machine.kind",)
    assert result.claims["tee"] == "none"


def test_a_machine_that_vouched_for_other_keys_is_refused(
    issuer: Issuer, chip: AmdChip, intel: IntelPlatform
):
    for other in (bytes(64), bytes(range(64))):
        for machine, tee, root in (
            (snp(chip, other), "sev-snp", chip.root),
            (td(intel, other), "tdx", intel.root),
            (azure(chip, other), "sev-snp", chip.root),
        ):
            result = judge(issuer, evidence(issuer, machine, tee), root)
            assert result.refused_by == ("machine.binding",)
            assert not result.genuine
            assert result.claims["tee"] == "none"


def test_each_part_of_what_is_vouched_for_counts(issuer: Issuer, chip: AmdChip):
    root, key = issuer.root.public_bytes(Encoding.DER), issuer.raw_public(issuer.key("attestation"))
    for parts in (
        {"root": root, "attestation_key": issuer.raw_public(issuer.key("other"))},
        {"root": root + b"\0", "attestation_key": key},
    ):
        machine = snp(chip, machine_report_data(**parts))
        result = judge(issuer, evidence(issuer, machine, "sev-snp"), chip.root)
        assert result.refused_by == ("machine.binding",)


def test_a_chip_of_an_unknown_maker_proves_nothing(world: Any, issuer: Issuer):
    machine, tee, _, _ = world
    result = judge(issuer, evidence(issuer, machine, tee))
    assert not result.genuine
    assert result.refused_by
    assert all(name.startswith("machine.") for name in result.refused_by)
    assert result.claims["tee"] == "none"


def test_a_forged_report_proves_nothing(issuer: Issuer, chip: AmdChip):
    forged = AmdChip(chip_id=bytes(64)).report(report_data=vouched(issuer))
    machine = MachineEvidence(evidence=forged, files=chip.endorsements())
    result = judge(issuer, evidence(issuer, machine, "sev-snp"), chip.root)
    assert "machine.snp.report.signature" in result.refused_by
    assert result.claims["tee"] == "none"


def test_a_debug_machine_is_refused_by_the_policy(issuer: Issuer, chip: AmdChip):
    machine = snp(chip, vouched(issuer), policy=0x30000 | 1 << 19)
    result = judge(issuer, evidence(issuer, machine, "sev-snp"), chip.root)
    assert result.genuine
    assert [name for name in result.refused_by if not name.startswith("machine.snp.")] == []
    assert result.refused_by


def test_another_machine_than_the_named_one_is_refused(world: Any, issuer: Issuer):
    machine, tee, root, names = world
    wrong = {name: [b"\1" * 48] for name in names}
    result = judge(issuer, evidence(issuer, machine, tee), root, policy=wrong)
    assert result.genuine
    assert len(result.refused_by) == 1
    assert result.refused_by[0].endswith(f".code.{next(iter(names))}")


def test_a_platform_in_software_is_not_what_a_policy_that_names_a_machine_wants(issuer: Issuer):
    result = judge(issuer, issuer.evidence(), policy={"launch_digest": [LAUNCH]})
    assert result.refused_by == ("platform.software",)


def test_the_code_of_the_machine_is_not_the_code_of_the_enclave(world: Any, issuer: Issuer):
    """A policy that names the machine alone would otherwise take any enclave on it."""
    machine, tee, root, names = world
    nobody = {
        "mrenclave": None,
        "mrsigner": None,
        "product_id": None,
        "min_security_version": None,
    }
    result = judge(issuer, evidence(issuer, machine, tee), root, policy=names | nobody)
    assert result.genuine
    assert not result.accepted
    assert not result.identified
    assert "code.named" in result.refused_by


def test_a_named_machine_vouches_for_a_root_that_nobody_enrolled(issuer: Issuer, chip: AmdChip):
    data = evidence(issuer, snp(chip, vouched(issuer)), "sev-snp")
    named = {"launch_digest": [LAUNCH]}
    assert judge(issuer, data, roots=[chip.root], policy=named).accepted
    unnamed = judge(issuer, data, roots=[chip.root])
    assert unnamed.refused_by == ("chain.root",)
    other = judge(issuer, data, roots=[chip.root], policy={"launch_digest": [b"\1" * 48]})
    assert set(other.refused_by) == {"chain.root", "machine.snp.code.launch_digest"}


def test_firmware_alone_vouches_for_no_root_where_it_loads_what_it_is_given(
    issuer: Issuer, chip: AmdChip, intel: IntelPlatform
):
    data = vouched(issuer)
    for machine, tee, root, named in (
        (azure(chip, data), "sev-snp", chip.root, {"launch_digest": [LAUNCH]}),
        (td(intel, data), "tdx", intel.root, {"mrtd": [MRTD]}),
    ):
        result = judge(issuer, evidence(issuer, machine, tee), roots=[root], policy=named)
        assert result.refused_by == ("chain.root",)


def test_what_the_relying_party_gives_goes_before_what_came_along(issuer: Issuer, chip: AmdChip):
    bare = MachineEvidence(evidence=snp(chip, vouched(issuer)).evidence)
    data = evidence(issuer, bare, "sev-snp")
    assert not judge(issuer, data, chip.root).genuine
    assert judge(issuer, data, chip.root, endorsements=chip.endorsements()).accepted
    # A host that withholds a revocation does not help itself where the verifier has one.
    serial = x509.load_der_x509_certificate(chip.ask.der).serial_number
    result = judge(
        issuer,
        evidence(issuer, snp(chip, vouched(issuer)), "sev-snp"),
        chip.root,
        endorsements={"crl.der": chip.endorsements(revoked=[serial])["crl.der"]},
    )
    assert result.refused_by
    assert not result.genuine
    assert result.claims["tee"] == "none"


@pytest.mark.parametrize("check", ["format", "kind", "binding"])
def test_each_own_check_refuses_what_no_other_refuses(
    check: str, issuer: Issuer, chip: AmdChip, monkeypatch: pytest.MonkeyPatch
):
    data = vouched(issuer)
    wrong = {
        "kind": evidence(issuer, snp(chip, data), "tdx"),
        "binding": evidence(issuer, snp(chip, bytes(64)), "sev-snp"),
        "format": evidence(issuer, b"no machine", "sev-snp"),
    }[check]
    assert f"machine.{check}" in judge(issuer, wrong, chip.root).refused_by
    monkeypatch.setitem(CHECKS.functions, check, lambda _: PASSED)
    CHECKS._plan = None
    try:
        # What cannot be read refuses even if nobody says so.
        assert judge(issuer, wrong, chip.root).genuine is (check != "format")
    finally:
        CHECKS._plan = None


def test_raw_evidence_has_a_machine_too(issuer: Issuer, chip: AmdChip):
    parts = issuer.parts(record={"tee": "sev-snp"}, raw=True)
    data = replace(parts, machine=snp(chip, vouched(issuer)).to_bytes()).to_bytes()
    result = judge(issuer, data, chip.root, nonce=None, freshness="not_checked")
    assert result.claims["tee"] == "sev-snp"
    assert result.accepted


def container(count: int, *fields: bytes) -> bytes:
    body = b"".join(len(item).to_bytes(4, "little") + item for item in fields)
    return b"PYEMACH\x01" + count.to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PYEMACH\x02" + bytes(4),
        b"PYEMACH\x01" + b"\xff" * 4,
        container(0),
        container(0, b""),
        container(0, b"x", b"y"),
        container(1, b"x", b"vek.der"),
        container(1, b"x", b"../etc.pem", b"y"),
        container(1, b"x", b"VEK.DER", b"y"),
        container(2, b"x", b"vek.der", b"y", b"vek.der", b"z"),
        container(2, b"x", b"vek.der", b"y", b"ark.pem", b"z"),
        container(25, b"x"),
        container(0, b"x")[:-1],
        container(0, b"x" * (33 * 1024)),
        container(0, b"x") + bytes(MAX_MACHINE),
        b"PYEMACH\x01" + bytes(4) + b"\xff\xff\xff\xff" + b"x",
    ],
)
def test_anything_but_the_one_way_to_write_it_is_refused(data: bytes):
    with pytest.raises(EvidenceFormatError, match="machine evidence"):
        MachineEvidence.from_bytes(data)


def test_what_is_written_is_read(chip: AmdChip):
    machine = snp(chip, bytes(64))
    again = MachineEvidence.from_bytes(machine.to_bytes())
    assert again.to_bytes() == machine.to_bytes()
    assert dict(again.files) == dict(machine.files)
    for wrong in (
        MachineEvidence(evidence=b""),
        MachineEvidence(evidence=b"x", files={"../x.pem": b""}),
        MachineEvidence(evidence=b"x", files={"vek.der": bytes(MAX_MACHINE)}),
    ):
        with pytest.raises(ValueError, match=r"machine evidence|name of an endorsement"):
            wrong.to_bytes()
