"""
The checks of SEV-SNP attestation reports (``sev-snp-report``), in their order.

The project's notes on SEV-SNP structures: layout and policy 4.1 to 4.4, endorsement 4.5. The
evidence is a report of 1,184 bytes; the host's certificate table may follow it, as in the answer to
an extended guest request. ``vek.der``, ``ask.pem``, ``ark.pem`` and ``crl.der`` come beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation import amd, pki
from pyenclave.attestation.case import judge_nonce, judge_reference, judge_report_data
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    failed,
    not_asked,
)
from pyenclave.attestation.verify_vek import CHAIN_BLOCK, VekCase, chain_claims, register_chain
from pyenclave.errors import EnclaveError, EvidenceFormatError
from pyenclave.formats import snp, snp_certs
from pyenclave.formats.snp import SnpReport
from pyenclave.formats.snp_certs import CertificateTable

__all__ = ["CHECKS", "Case", "claims", "report_claims"]

_NO_TABLE: Final = CertificateTable(())
_SHORT_CHIP: Final = 8


@dataclass(slots=True, kw_only=True)
class Case(VekCase):
    """A report, with or without the certificate table of its host."""

    def read_report(self) -> SnpReport:
        """Read the report, strictly."""
        return self._part("report", lambda: SnpReport.from_bytes(self.data[: snp.REPORT_SIZE]))

    def read_table(self) -> CertificateTable:
        """Read the certificate table behind the report."""
        if len(self.data) <= snp.REPORT_SIZE:
            return _NO_TABLE
        return self._part(
            "table", lambda: CertificateTable.from_bytes(self.data[snp.REPORT_SIZE :])
        )

    @property
    def report(self) -> SnpReport:
        """The report, for other checks."""
        found = self._read.get("report")
        if isinstance(found, SnpReport):
            return found
        return self.need("report.format", self.read_report)

    @property
    def table(self) -> CertificateTable:
        """The certificate table, for other checks."""
        return self.need("table.format", self.read_table)

    def vek_bytes(self) -> bytes:
        """Return the certificate of the key that signed the report."""
        is_vlek = self.report.signing_key == snp.KEY_VLEK
        guid = snp_certs.GUID_VLEK if is_vlek else snp_certs.GUID_VCEK
        found = self.endorsements.get("vek.der") or self.table.get(guid)
        if found is None:
            raise EvidenceFormatError(
                "certificate of the key that signed the report",
                expected="vek.der",
                found="absent",
                advice=_where_to_find(self.report),
            )
        return found

    def issuer_bytes(self) -> tuple[bytes | None, bytes | None]:
        """Return ASK and ARK as they were given."""
        given = self.endorsements
        return (
            given.get("ask.pem") or self.table.get(snp_certs.GUID_ASK),
            given.get("ark.pem") or self.table.get(snp_certs.GUID_ARK),
        )

    def signature_holds(self) -> bool:
        """Whether the leaf's key signed the report."""
        found = self._read.get("signature")
        if isinstance(found, bool):
            return found
        report = self.report
        # That the key is of P-384 is for chain.algorithms, that R and S are padded with zeros for
        # report.format; both have been judged.
        holds = pki.verify_ecdsa(
            self.chain.leaf.public_key(),
            "sha384",
            int.from_bytes(report.signature_r, "little"),
            int.from_bytes(report.signature_s, "little"),
            self.data[: snp.SIGNED_SIZE],
        )
        self._read["signature"] = holds
        return holds


def _where_to_find(report: SnpReport) -> str:
    if report.signing_key == snp.KEY_VLEK:
        return (
            "The cloud provider hands VLEK certificates to its guests, in the certificate table "
            "of an extended report: attach that table, or save the certificate as vek.der."
        )
    if report.chip_id_masked:
        return (
            "The report does not name its chip: ask the host's operator for the VCEK certificate."
        )
    lines = [report.product] if report.product else ["milan", "genoa"]
    urls = " or ".join(amd.kds_url(report, line) for line in lines if line)
    return f"Fetch {urls} and give it as vek.der; pyenclave collateral fetch does that."


CHECKS: Final[Registry[Case]] = Registry()

# Verdicts that need nothing of the evidence are made once.
_NO_NONCE: Final = not_asked("give the nonce that was sent, or the evidence may be an old one")
_NO_REPORT_DATA: Final = not_asked("give the expected report data to have it compared")
_VLEK: Final = not_asked("a VLEK belongs to no single chip")
_MASKED: Final = not_asked("the host masks the chip's identity: the signature alone names it")
_NO_USER_DATA: Final = not_asked("a report has no user data: give report_data to have it compared")
_NO_CODE: Final = not_asked("the policy's identities are compared by other checks")
_NAME: Final = {
    name: not_asked(f"name {name} to have it compared")
    for name in (
        "max_vmpl",
        "required_policy_bits or forbidden_policy_bits",
        "min_guest_svn",
        "required_platform_bits",
        "min_tcb",
        "launch_digest",
        "id_key_digest",
        "author_key_digest",
        "family_id",
        "image_id",
        "host_data",
        "chip_id",
        "product_lines",
    )
}


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("report.format")
def _report(case: Case) -> Verdict:
    """The bytes are a report of a known version, its reserved fields zero."""
    case.read_report()
    return PASSED


@CHECKS.evidence("table.format")
def _table(case: Case) -> Verdict:
    """The certificate table behind the report, if there is one, can be read."""
    case.read_table()
    return PASSED


@CHECKS.evidence("report.product")
def _product(case: Case) -> Verdict:
    """The CPU is one of a line whose TCB layout and root are known."""
    report = case.report
    if report.version < 3 or report.product is not None:
        return PASSED
    return failed(
        expected="a CPU of a known product line",
        found=f"family {report.cpuid_fam:#x}, model {report.cpuid_mod:#x}",
        advice="Newer than this pyenclave: upgrade it.",
    )


register_chain(CHECKS)
CHECKS.remember(CHAIN_BLOCK)


@CHECKS.evidence("report.signature")
def _signature(case: Case) -> Verdict:
    """The key of the certificate signed the report."""
    if case.signature_holds():
        return PASSED
    return failed(
        expected="signed by the key of vek.der",
        found="an invalid signature",
        advice="The report was changed, or the certificate is of another chip or TCB version.",
    )


@CHECKS.evidence("vek.signer")
def _signer(case: Case) -> Verdict:
    """The report says that it was signed by a key of the certificate's kind."""
    if case.report.signing_key == case.vek.kind:
        return PASSED
    vek = "VCEK" if case.vek.kind == snp.KEY_VCEK else "VLEK"
    return failed(expected=f"{vek}, as the certificate", found=case.report.signing_key_name)


@CHECKS.evidence("vek.line")
def _line(case: Case) -> Verdict:
    """The report's CPU belongs to the product line of the certificate."""
    found = case.report.product
    if found is None:
        return PASSED  # version 2 does not say, and an unknown CPU was refused already
    if found == case.vek.line:
        return PASSED
    return failed(expected=f"a CPU of {case.vek.product}", found=found)


@CHECKS.evidence("vek.tcb")
def _tcb(case: Case) -> Verdict:
    """The certificate is for the reported TCB version, byte by byte."""
    reported, vek = case.report.reported_tcb, case.vek
    if reported == vek.tcb:
        return PASSED
    return failed(
        expected=f"reported TCB {vek.tcb.hex()}, as in the certificate",
        found=reported,
        advice="Fetch the certificate of the reported TCB version.",
    )


@CHECKS.evidence("vek.hwid")
def _hwid(case: Case) -> Verdict:
    """The certificate is of the reported chip. Where it is masked, the signature alone says so."""
    hwid, chip = case.vek.hwid, case.report.chip_id
    if hwid is None:
        return _VLEK
    if case.report.chip_id_masked:
        return _MASKED
    if chip == hwid.ljust(len(chip), b"\0"):
        return PASSED
    return failed(expected=f"chip {hwid.hex()}, as in the certificate", found=chip)


# ---- is it what I want? -----------------------------------------------------------------------


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The report data is the nonce, or the bytes that the caller says it became."""
    if case.nonce is None:
        return _NO_NONCE
    return judge_nonce(case, case.report.report_data)


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """The report data is the expected one."""
    if case.report_data is None:
        return _NO_REPORT_DATA
    return judge_report_data(case, case.report.report_data)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """Nothing is expected that a report does not have."""
    if case.user_data is None:
        return _NO_USER_DATA
    return failed(
        expected=case.user_data,
        found=None,
        advice="A report has no user data of its own: give report_data, as the guest makes it.",
    )


@CHECKS.policy("guest.debug")
def _debug(case: Case) -> Verdict:
    """The guest policy forbids debugging, unless the policy allows it."""
    if case.report.debug and not case.policy.allow_debug:
        return failed(
            expected="a guest that nobody can debug",
            found="debug",
            advice="The host can read its memory. Launch it with a guest policy without bit 19.",
        )
    return PASSED


@CHECKS.policy("guest.migration")
def _migration(case: Case) -> Verdict:
    """The guest has no migration agent, unless the policy allows one."""
    if case.report.migrate_ma and not case.policy.allow_migration_agent:
        return failed(
            expected="a guest without migration agent",
            found="migrate_ma",
            advice="Launch it with a guest policy without bit 18, or, if you trust the agent, "
            "allow_migration_agent.",
        )
    return PASSED


@CHECKS.policy("guest.vmpl")
def _vmpl(case: Case) -> Verdict:
    """Who asked for the report has a privilege level that the policy accepts."""
    wanted, found = case.policy.max_vmpl, case.report.vmpl
    if wanted is None:
        return _NAME["max_vmpl"]
    if found <= wanted:
        return PASSED
    return failed(
        expected=f"VMPL {wanted} or lower",
        found=found,
        advice="Software at a less privileged level asked for it; ask from VMPL 0.",
    )


@CHECKS.policy("guest.policy")
def _policy_bits(case: Case) -> Verdict:
    """The guest policy has the required bits and none of the forbidden ones."""
    wanted, unwanted = case.policy.required_policy_bits, case.policy.forbidden_policy_bits
    if not wanted and not unwanted:
        return _NAME["required_policy_bits or forbidden_policy_bits"]
    names = snp.bit_names(case.report.policy, snp.POLICY_BITS)
    missing = [name for name in wanted if name not in names]
    present = [name for name in unwanted if name in names]
    if not missing and not present:
        return PASSED
    return failed(
        expected=f"with {', '.join(wanted) or 'any'}, without {', '.join(unwanted) or 'none'}",
        found=names,
        advice="Launch the guest with another guest policy.",
    )


@CHECKS.policy("guest.svn")
def _guest_svn(case: Case) -> Verdict:
    """GUEST_SVN is high enough."""
    wanted, found = case.policy.min_guest_svn, case.report.guest_svn
    if wanted is None:
        return _NAME["min_guest_svn"]
    if found >= wanted:
        return PASSED
    return failed(expected=f"at least {wanted}", found=found, advice="Launch a newer ID block.")


@CHECKS.policy("platform.bits")
def _platform_bits(case: Case) -> Verdict:
    """PLATFORM_INFO has the required bits."""
    wanted = case.policy.required_platform_bits
    if not wanted:
        return _NAME["required_platform_bits"]
    names = snp.bit_names(case.report.platform_info, snp.PLATFORM_BITS)
    if all(name in names for name in wanted):
        return PASSED
    return failed(
        expected=wanted,
        found=names,
        advice="Change the machine's firmware or its set-up; old firmware does not report them.",
    )


@CHECKS.policy("platform.chip")
def _chip(case: Case) -> Verdict:
    """A VCEK is of one chip, so the report of it can name it."""
    report = case.report
    if report.signing_key != snp.KEY_VCEK or not report.chip_id_masked:
        return PASSED
    if case.policy.allow_masked_chip_id:
        return PASSED
    return failed(
        expected="a report that names its chip",
        found="masked",
        advice="Let the host clear MASK_CHIP_ID, or say allow_masked_chip_id.",
    )


@CHECKS.policy("platform.chip_id")
def _chip_id(case: Case) -> Verdict:
    """The chip is one that the policy names."""
    if not case.policy.reference("chip_id"):
        return _NAME["chip_id"]
    if case.vek.hwid is None:
        return failed(
            expected="a VCEK, which is of one chip",
            found="a VLEK, whose holder may name any chip",
            advice="Have the host sign with VCEKs, or name no chips.",
        )
    chip = case.report.chip_id
    advice = "Another machine made the report."
    if case.report.chip_id_masked:
        advice = "The host masks its chip: let it clear MASK_CHIP_ID."
    verdict = judge_reference(case, "chip_id", chip, advice=advice)
    # From Turin on, eight bytes name a chip and zeros follow them.
    if verdict is PASSED or case.vek.line != "turin" or any(chip[_SHORT_CHIP:]):
        return verdict
    return judge_reference(case, "chip_id", chip[:_SHORT_CHIP], advice=advice)


@CHECKS.policy("platform.line")
def _product_line(case: Case) -> Verdict:
    """The processor is of a line that the policy names."""
    wanted, found = case.policy.product_lines, case.vek.line
    if not wanted:
        return _NAME["product_lines"]
    if found in wanted:
        return PASSED
    return failed(expected=wanted, found=found, advice="A processor of another line made it.")


@CHECKS.policy("tcb.minimum")
def _min_tcb(case: Case) -> Verdict:
    """Each component of each TCB version that is in force now is high enough."""
    wanted = case.policy.min_tcb
    if wanted is None:
        return _NAME["min_tcb"]
    report = case.report
    line = case.vek.line
    if line not in amd.LINES:
        return failed(expected="a known product line", found=line)
    for name, value in (
        ("reported", report.reported_tcb),
        ("committed", report.committed_tcb),
        ("current", report.current_tcb),
    ):
        levels = snp.decode_tcb(value, line)
        for component, level in wanted.items():
            # A component that this line does not have cannot be high enough.
            if levels.get(component, -1) < level:
                return failed(
                    expected=f"{name} TCB: {component} at least {level}",
                    found=levels.get(component, f"no {component} on {line}"),
                    advice="Update the machine's firmware and let its host commit the update.",
                )
    return PASSED


def _one_of(case: Case, name: str, found: bytes, advice: str) -> Verdict:
    if not case.policy.reference(name):
        return _NAME[name]
    return judge_reference(case, name, found, advice=advice)


@CHECKS.policy("code.launch_digest")
def _launch_digest(case: Case) -> Verdict:
    """The launch digest is one that the policy names."""
    return _one_of(
        case,
        "launch_digest",
        case.report.measurement,
        "Another firmware, kernel or number of CPUs was launched: pyenclave measure snp tells what "
        "to expect.",
    )


@CHECKS.policy("code.id_key_digest")
def _id_key(case: Case) -> Verdict:
    """The digest of the key that signed the ID block is one that the policy names."""
    return _one_of(
        case, "id_key_digest", case.report.id_key_digest, "Somebody else signed the ID block."
    )


@CHECKS.policy("code.author_key_digest")
def _author_key(case: Case) -> Verdict:
    """The digest of the author key is one that the policy names."""
    report = case.report
    wanted = case.policy.reference("author_key_digest")
    if wanted and not report.author_key_en:
        return failed(
            expected=wanted,
            found="no author key at launch",
            advice="Launch the guest with an author key.",
        )
    return _one_of(
        case, "author_key_digest", report.author_key_digest, "Somebody else signed the ID key."
    )


@CHECKS.policy("guest.family_id")
def _family_id(case: Case) -> Verdict:
    """FAMILY_ID is one that the policy names."""
    return _one_of(case, "family_id", case.report.family_id, "The ID block is of another family.")


@CHECKS.policy("guest.image_id")
def _image_id(case: Case) -> Verdict:
    """IMAGE_ID is one that the policy names."""
    return _one_of(case, "image_id", case.report.image_id, "The ID block is of another image.")


@CHECKS.policy("guest.host_data")
def _host_data(case: Case) -> Verdict:
    """HOST_DATA is one that the policy names."""
    return _one_of(
        case,
        "host_data",
        case.report.host_data,
        "The host gave the guest other data at launch (a hash of its configuration or policy).",
    )


@CHECKS.policy("code.kind")
def _code_kind(case: Case) -> Verdict:
    """A policy that names code of other kinds of evidence only is not met by this one."""
    policy = case.policy
    named = policy.launch_digest or policy.id_key_digest or policy.author_key_digest
    if policy.accept_any_code or named:
        return _NO_CODE
    return failed(
        expected="launch_digest, id_key_digest or author_key_digest in the policy, or any_code()",
        found="identities of other kinds of evidence",
        advice="Name what an SEV-SNP guest is known by.",
    )


# ---- what it says -----------------------------------------------------------------------------


def report_claims(report: SnpReport) -> dict[str, Any]:
    """Return the fields of a report by the names of the claims, binary ones as hex."""
    found: dict[str, Any] = {
        "version": report.version,
        "guest_svn": report.guest_svn,
        "policy": report.policy,
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "vmpl": report.vmpl,
        "sig_algo": report.signature_algo,
        "current_tcb": report.current_tcb.hex(),
        "platform_info": report.platform_info,
        "key_info": report.key_info,
        "report_data": report.report_data.hex(),
        "measurement": report.measurement.hex(),
        "host_data": report.host_data.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        "author_key_digest": report.author_key_digest.hex(),
        "report_id": report.report_id.hex(),
        "report_id_ma": report.report_id_ma.hex(),
        "reported_tcb": report.reported_tcb.hex(),
        "chip_id": report.chip_id.hex(),
        "committed_tcb": report.committed_tcb.hex(),
        "launch_tcb": report.launch_tcb.hex(),
    }
    if report.version >= 3:
        found |= {
            "cpuid_fam": report.cpuid_fam,
            "cpuid_mod": report.cpuid_mod,
            "cpuid_step": report.cpuid_step,
        }
    found |= {
        "signing_key": report.signing_key_name,
        "mask_chip_key": report.mask_chip_key,
        "author_key_en": report.author_key_en,
        "debug_allowed": report.debug,
        "migrate_ma": report.migrate_ma,
        "smt_allowed": bool(report.policy & snp.POLICY_BITS["smt"]),
    }
    return found


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the evidence says, as far as it can be read; binary values as hex."""
    found: dict[str, Any] = {"verify_at": case.at.isoformat()}
    try:
        report = _shown_report(case)
    except EnclaveError:
        return found
    found |= report_claims(report)
    found["debug"] = report.debug
    found["policy_bits"] = snp.bit_names(report.policy, snp.POLICY_BITS)
    found["platform_bits"] = snp.bit_names(report.platform_info, snp.PLATFORM_BITS)
    found |= chain_claims(case)
    line = report.product
    with contextlib.suppress(EnclaveError, NotReachedError):
        vek = case.read_vek()
        line = line or vek.line
        hwid = None
        if vek.hwid is not None and not report.chip_id_masked:
            hwid = report.chip_id == vek.hwid.ljust(64, b"\0")
        found["chip_id_matches_hwid"] = hwid
        found["reported_tcb_matches_vek"] = report.reported_tcb == vek.tcb
        found["report_signature_ok"] = case.signature_holds()
    if line is not None:
        found["product"] = line
        if line in snp.LINES:
            found["reported_tcb_decoded"] = snp.decode_tcb(report.reported_tcb, line)
            found["current_tcb_decoded"] = snp.decode_tcb(report.current_tcb, line)
            found["committed_tcb_decoded"] = snp.decode_tcb(report.committed_tcb, line)
            found["launch_tcb_decoded"] = snp.decode_tcb(report.launch_tcb, line)
    return found


def _shown_report(case: Case) -> SnpReport:
    """Return the report also if it is not well-formed, to show what it says."""
    try:
        return case.read_report()
    except EnclaveError:
        return SnpReport.decode(case.data[: snp.REPORT_SIZE])
