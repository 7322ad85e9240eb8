"""
The checks of NVIDIA GPU attestation reports: signed SPDM measurements.

DMTF DSP0274 (SPDM) 1.1, and NVIDIA's description of its local verifier. The key that signs is
certified by the GPU's boot ROM, whose chain ends at the pinned root of NVIDIA's device identities;
driver and tools hand out the chain beside the report (``cert-chain.pem``). What each measurement
should be is in manifests that NVIDIA publishes for each driver and VBIOS: a policy names the
values (``gpu_measurements``).
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation import pki
from pyenclave.attestation.cache import known
from pyenclave.attestation.case import CaseBase, gathered, judge_registers
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed, not_asked
from pyenclave.errors import CollateralError
from pyenclave.formats import spdm
from pyenclave.formats.spdm import GpuReport
from pyenclave.formats.x509 import Certificate, Crl

__all__ = ["CHAIN", "CHECKS", "Case", "claims"]

CHAIN: Final = "cert-chain.pem"
PROFILE: Final = pki.Profile(
    keys=frozenset(("secp384r1",)),
    algorithms=frozenset(("ecdsa-sha384",)),
    shortest=2,
    longest=6,
    leaf_bare=True,  # the boot ROM writes no basic constraints
)
_HALF: Final = spdm.SIGNATURE_SIZE // 2
_GIVE: Final = f"Give the chain that the driver hands out beside the report as {CHAIN}."


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A report, and what it is judged by."""

    def read_report(self) -> GpuReport:
        """Read the report."""
        return self._part("report", lambda: GpuReport.from_bytes(self.data))

    def read_chain(self) -> tuple[Certificate, ...]:
        """Read the certificates, the root completed."""

        def read() -> tuple[Certificate, ...]:
            data = self.endorsements.get(CHAIN)
            if data is None:
                raise CollateralError(
                    "no certificates were given",
                    expected="the chain of the GPU's attestation key",
                    found="absent",
                    advice=_GIVE,
                )
            found = known("pem-chain", data, Certificate.from_pem_chain).value
            return tuple(pki.completed(found, self.anchors("nvidia")))

        return self._part("chain", read)

    @property
    def report(self) -> GpuReport:
        """The report, for other checks."""
        return self.need("report.format", self.read_report)

    @property
    def chain(self) -> tuple[Certificate, ...]:
        """The certificates, for other checks."""
        return self.need("chain.format", self.read_chain)

    def signed(self) -> bool:
        """Whether the leaf signed the report."""
        report, key = self.report, self.chain[0].public_key()
        r = int.from_bytes(report.signature[:_HALF], "big")
        s = int.from_bytes(report.signature[_HALF:], "big")
        return pki.key_name(key) == "secp384r1" and pki.verify_ecdsa(
            key, "sha384", r, s, report.signed
        )


CHECKS: Final[Registry[Case]] = Registry()


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("report.format")
def _report(case: Case) -> Verdict:
    """The report is a request and a signed response of SPDM 1.1, whole."""
    case.read_report()
    return PASSED


@CHECKS.evidence("report.whole")
def _whole(case: Case) -> Verdict:
    """All measurements were asked for, so none is held back."""
    found = case.report.operation
    if found == spdm.ALL_MEASUREMENTS:
        return PASSED
    return failed(expected="a request for all measurements", found=f"for {found:#04x} only")


@CHECKS.evidence("chain.format")
def _chain(case: Case) -> Verdict:
    """The chain of the key that signs was given and can be read."""
    return pki.check_length(case.read_chain(), PROFILE)


@CHECKS.evidence("chain.root")
def _chain_root(case: Case) -> Verdict:
    """The chain ends at NVIDIA's root of device identities, or one of the caller's."""
    return pki.check_root(case.chain, case.anchors("nvidia"))


@CHECKS.evidence("chain.names")
def _chain_names(case: Case) -> Verdict:
    """Each certificate names the next one as its issuer."""
    return pki.check_names(case.chain)


@CHECKS.evidence("chain.algorithms")
def _chain_algorithms(case: Case) -> Verdict:
    """Keys are of P-384, signatures ECDSA with SHA-384."""
    return pki.check_algorithms(case.chain, PROFILE)


@CHECKS.evidence("chain.constraints")
def _chain_constraints(case: Case) -> Verdict:
    """Only CAs issue, each within its path length; nothing critical is unknown."""
    return pki.check_constraints(case.chain, PROFILE)


@CHECKS.evidence("chain.key_usage")
def _chain_key_usage(case: Case) -> Verdict:
    """CAs may sign certificates; the leaf may sign, and no certificates."""
    return pki.check_key_usage(case.chain, PROFILE)


@CHECKS.evidence("chain.validity")
def _chain_validity(case: Case) -> Verdict:
    """Every certificate is valid at the time given."""
    return pki.check_validity(case.chain, case.at)


@CHECKS.evidence("chain.signatures")
def _chain_signatures(case: Case) -> Verdict:
    """Each certificate is signed by the next one, the root by itself."""
    return pki.check_signatures(case.chain)


@CHECKS.evidence("crl")
def _crl(case: Case) -> Verdict:
    """If a list is given, it is in force and of an issuer in the chain, and revokes none of it."""
    data = case.endorsements.get("crl.der")
    if data is None:
        return not_asked("no revocation list was given; NVIDIA's certificates name theirs")
    crl = known("crl", data, Crl.from_bytes).value
    issuer = next((item for item in case.chain if item.subject == crl.issuer), None)
    if issuer is None:
        return failed(expected="a list of an issuer in the chain", found=crl.issuer_text)
    return pki.check_crl(crl, issuer, case.at, PROFILE, *case.chain)


@CHECKS.evidence("report.signature")
def _signature(case: Case) -> Verdict:
    """The leaf's key signed request and response."""
    if case.signed():
        return PASSED
    return failed(
        expected="an ECDSA P-384 signature of the leaf's key",
        found="invalid",
        advice="Something was changed, or the certificates are of another GPU.",
    )


@CHECKS.evidence("report.fwid")
def _fwid(case: Case) -> Verdict:
    """The firmware that signed is the one that its certificate was made for."""
    wanted, found = spdm.fwid_of(case.chain[0]), case.report.fields.get(spdm.FWID)
    if wanted is None or found is None:
        return not_asked("report or certificate names no firmware", found=found)
    if hmac.compare_digest(wanted, found):
        return PASSED
    return failed(expected=wanted, found=found, advice="Other firmware than was certified runs.")


# ---- is it what I want? -----------------------------------------------------------------------


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The request has the nonce that was sent."""
    found = case.report.nonce
    if case.nonce is None:
        return not_asked("give the nonce that was sent, or the report may be an old one")
    if len(case.nonce) <= len(found) and hmac.compare_digest(
        case.nonce.ljust(len(found), b"\0"), found
    ):
        return PASSED
    return failed(
        expected=case.nonce,
        found=found,
        advice="Replayed, or made for another challenge; a nonce of a GPU has 32 bytes.",
    )


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """A GPU's report has none: to expect some refuses."""
    if case.report_data is None:
        return not_asked("a GPU's report has a nonce and no report data")
    return failed(
        expected=case.report_data,
        found="none: a GPU's report has a nonce instead",
        advice="Give it as nonce.",
    )


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """A GPU's report has none: to expect some refuses."""
    if case.user_data is None:
        return not_asked("a GPU's report has no user data")
    return failed(
        expected=case.user_data, found="none", advice="Bind it into the nonce that is sent."
    )


@CHECKS.policy("code.gpu_measurements")
def _measurements(case: Case) -> Verdict:
    """The measurements that the policy names have its values."""
    return judge_registers(
        case,
        "gpu_measurements",
        {index: item.value for index, item in case.report.measurements.items()},
        advice="NVIDIA's manifests (RIM) of the driver and the VBIOS have the values.",
        unnamed="name gpu_measurements (by index, from NVIDIA's manifests), or any is accepted",
    )


# ---- what it says -----------------------------------------------------------------------------


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the report says, as far as it can be read; binary values as hex."""
    return gathered(case, _report_claims, _chain_claims, _device_claims, _signature_claims)


def _report_claims(case: Case) -> dict[str, Any]:
    report = case.report
    return report.named_fields() | {
        "nonce": report.nonce.hex(),
        "response_nonce": report.response_nonce.hex(),
        "slot": report.slot,
        "measurements": {
            str(index): item.value.hex() for index, item in sorted(report.measurements.items())
        },
    }


def _chain_claims(case: Case) -> dict[str, Any]:
    chain = case.chain
    names, signatures = pki.check_names(chain), pki.check_signatures(chain)
    return {
        "chain": [certificate.common_name for certificate in chain],
        "chain_ok": names.outcome == signatures.outcome == "passed",
        "root_ok": pki.check_root(chain, case.anchors("nvidia")).outcome == "passed",
    }


def _device_claims(case: Case) -> dict[str, Any]:
    return {"device": spdm.device_of(case.chain[0])}


def _signature_claims(case: Case) -> dict[str, Any]:
    return {"signature_ok": case.signed()}
