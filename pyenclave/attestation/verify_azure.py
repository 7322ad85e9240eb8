"""
The checks of Azure confidential VMs (``azure-hcl-snp``, ``azure-hcl-tdx``), in their order.

The chain (the project's notes on evidence providers, 1.6): nonce → quote of the vTPM → its key in
the runtime claims → hash of the claims in the hardware report's report data → SEV-SNP report, or
TDREPORT and the TD quote made of it. A TDREPORT alone can be checked by its own machine only and
proves nothing here. Beside the HCL report come ``td-quote.bin``, ``tpm-quote.msg``,
``tpm-quote.sig``, ``tpm-pcrs.json``, ``ak-cert.pem`` and what the hardware's kind needs.
"""

from __future__ import annotations

import hmac
from typing import Any, Final

from pyenclave.attestation import verify_snp, verify_tdx
from pyenclave.attestation.azure_case import Case
from pyenclave.attestation.azure_claims import claims, quote_differs
from pyenclave.attestation.case import judge_report_data
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed, not_asked
from pyenclave.attestation.vtpm import register_vtpm
from pyenclave.formats import hcl
from pyenclave.formats.snp import SnpReport

__all__ = ["SNP_CHECKS", "TDX_CHECKS", "Case", "claims"]

_IMDS: Final = "http://169.254.169.254/acc/tdquote"
SNP_CHECKS: Final[Registry[Case]] = Registry()
TDX_CHECKS: Final[Registry[Case]] = Registry()


# ---- is it genuine? ---------------------------------------------------------------------------


def _format(case: Case) -> Verdict:
    """The bytes are an HCL report, whole, of a known version."""
    case.read_hcl()
    return PASSED


def _is_type(kind: int, name: str) -> Any:
    def check(case: Case) -> Verdict:
        """The hardware is of the kind that is judged here."""
        if case.hcl.report_type == kind:
            return PASSED
        return failed(expected=f"a report of type {kind} ({name})", found=case.hcl.report_type)

    return check


def _claims(case: Case) -> Verdict:
    """The runtime claims can be read, each name once."""
    case.read_runtime()
    return PASSED


def _copy(case: Case) -> Verdict:
    """A copy of the runtime claims that was given is the same."""
    given = case.endorsements.get("runtime-data.json")
    if given is None:
        return _NO_COPY
    if hmac.compare_digest(given, case.hcl.runtime_data):
        return PASSED
    return failed(
        expected="runtime-data.json as in the HCL report",
        found="other bytes",
        advice="Cut it out of the report without change, or leave it away.",
    )


def _binding(case: Case) -> Verdict:
    """The hardware's report data is the hash of the runtime claims."""
    expected = case.hcl.expected_report_data
    if hmac.compare_digest(expected, case.bound_data):
        return PASSED
    return failed(
        expected=expected,
        found=case.bound_data,
        advice="The runtime claims are not those that the paravisor bound to the hardware report: "
        "they were changed, or belong to another report.",
    )


_NO_COPY: Final = not_asked("the runtime claims inside the HCL report are used")
_NO_NONCE: Final = not_asked("give the nonce that was sent, or the evidence may be an old one")


def _register_hcl(registry: Registry[Case], kind: int, name: str) -> None:
    registry.evidence("hcl.format")(_format)
    registry.evidence("hcl.type")(_is_type(kind, name))
    registry.evidence("hcl.claims")(_claims)
    registry.evidence("hcl.copy")(_copy)
    registry.evidence("hcl.binding")(_binding)


def _included(registry: Registry[Any]) -> set[str]:
    """
    Return the inner checks that are left out.

    Freshness, report data and which policy fits are judged out here; an HCL report has no place
    for a certificate table, and its privilege level is fixed (``hcl.vmpl``).
    """
    outside = {"nonce", "report_data", "user_data", "code.kind", "table.format", "guest.vmpl"}
    return outside & set(registry.functions)


_register_hcl(SNP_CHECKS, hcl.REPORT_TYPE_SNP, "SEV-SNP")


@SNP_CHECKS.evidence("hcl.vmpl")
def _vmpl(case: Case) -> Verdict:
    """The paravisor itself asked for the report: software below it binds no claims of its own."""
    found = SnpReport.decode(case.hardware(hcl.REPORT_TYPE_SNP)).vmpl
    if found == 0:
        return PASSED
    return failed(
        expected="VMPL 0 (the paravisor)",
        found=found,
        advice="The guest made this report by itself: read it from the vTPM.",
    )


SNP_CHECKS.include(
    "snp", verify_snp.CHECKS, lambda case: case.snp_case(), without=_included(verify_snp.CHECKS)
)

_register_hcl(TDX_CHECKS, hcl.REPORT_TYPE_TDX, "TDX")


@TDX_CHECKS.evidence("td.report")
def _td_report(case: Case) -> Verdict:
    """The TDREPORT is whole: its hashes are those of what follows them."""
    case.hardware(hcl.REPORT_TYPE_TDX)
    if case.read_td_report().consistent:
        return PASSED
    return failed(expected="hashes of TEE_TCB_INFO and TDINFO", found="other hashes")


@TDX_CHECKS.evidence("td.quote")
def _td_quote(case: Case) -> Verdict:
    """The TD quote of the TDREPORT was given."""
    if "td-quote.bin" in case.endorsements:
        return PASSED
    return failed(
        expected="td-quote.bin",
        found="absent",
        advice="A TDREPORT is authenticated for its own machine only. In the VM, have it quoted "
        f'(POST {{"report": base64url}} to {_IMDS}) and give the quote as td-quote.bin.',
    )


TDX_CHECKS.include(
    "tdx", verify_tdx.CHECKS, lambda case: case.tdx_case(), without=_included(verify_tdx.CHECKS)
)


@TDX_CHECKS.evidence("td.binding")
def _td_binding(case: Case) -> Verdict:
    """The quote was made of this TDREPORT: it says the same of TD, module and report data."""
    differing = quote_differs(case)
    if differing is None:
        return PASSED
    name, expected, found = differing
    return failed(
        expected=f"{name} {expected.hex()}, as in the TDREPORT",
        found=found,
        advice="The TD quote is of another VM or of another report: quote this one.",
    )


for _registry in (SNP_CHECKS, TDX_CHECKS):
    register_vtpm(_registry)


# ---- is it what I want? -----------------------------------------------------------------------


def _nonce(case: Case) -> Verdict:
    """The nonce is what the vTPM quoted; without a quote, what the guest wrote for the report."""
    if case.nonce is None:
        return _NO_NONCE
    quote = case.quote
    if quote is not None:
        found, wanted = quote.extra_data, case.nonce
    else:
        found = case.runtime.user_data or b""
        wanted = case.nonce.ljust(len(found), b"\0")
    if hmac.compare_digest(wanted, found):
        return PASSED
    return failed(
        expected=case.nonce,
        found=found,
        advice="Replayed, or made for another challenge: the nonce is the quote's qualifying data.",
    )


def _report_data(case: Case) -> Verdict:
    """The report data of the hardware is the expected one."""
    return judge_report_data(case, case.bound_data)


def _user_data(case: Case) -> Verdict:
    """The guest wrote the expected user data."""
    if case.user_data is None:
        return not_asked("give the expected user data to have it compared")
    found = case.runtime.user_data
    padded = case.user_data.ljust(len(found or b""), b"\0")
    if found is not None and hmac.compare_digest(padded, found):
        return PASSED
    return failed(
        expected=case.user_data,
        found=found,
        advice="The guest writes it to NV index 0x01400002 and reads the report again.",
    )


def _code_kind(*names: str) -> Any:
    def check(case: Case) -> Verdict:
        """
        The policy names the firmware, or any code will do.

        PCRs alone name nothing: firmware of somebody's own can bring a vTPM that says whatever
        they want, on genuine hardware.
        """
        policy = case.policy
        if policy.accept_any_code or any(getattr(policy, name) is not None for name in names):
            return not_asked("the policy's identities are compared by other checks")
        return failed(
            expected=f"one of {', '.join(names)} in the policy, or any_code()",
            found="PCRs alone" if policy.pcrs else "identities of other kinds of evidence",
            advice="Name the firmware that makes the vTPM, besides its PCRs."
            if policy.pcrs
            else "Name what an Azure confidential VM is known by.",
        )

    return check


_SNP_IDENTITIES: Final = ("launch_digest", "id_key_digest", "author_key_digest")
for _registry, _identities in ((SNP_CHECKS, _SNP_IDENTITIES), (TDX_CHECKS, ("mrtd",))):
    _registry.policy("nonce")(_nonce)
    _registry.policy("report_data")(_report_data)
    _registry.policy("user_data")(_user_data)
    _registry.policy("code.kind")(_code_kind(*_identities))
