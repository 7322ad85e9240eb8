"""
The checks of the machine below one of our platforms, as ``machine.…`` in the platform's evidence.

Hardware vouches for a platform by report data that names the platform's root certificate and
attestation key (`formats.machine`): hardware → platform → enclave in one walk. The machine's own
evidence is judged by the checks of its kind. Freshness belongs to the quote of the enclave: the
machine vouched when the platform started, and a platform's keys live as long as it does.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pyenclave.attestation import verify_azure, verify_snp, verify_tdx
from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import PASSED, Registry, Verdict, failed
from pyenclave.attestation.detect import kind_of
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.machine import MachineEvidence

__all__ = ["CHECKS", "TEES", "Case"]

# Kind of the machine's evidence → the TEE that it proves.
TEES: Final = MappingProxyType(
    {
        "sev-snp-report": "sev-snp",
        "tdx-quote": "tdx",
        "azure-hcl-snp": "sev-snp",
        "azure-hcl-tdx": "tdx",
    }
)
_OUTSIDE: Final = frozenset(("nonce", "report_data", "user_data", "code.kind"))


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """
    What the machine says.

    Attributes:
        tee: The TEE that the platform's record claims.
        expected: The report data by which hardware vouches for this platform.
    """

    tee: str = ""
    expected: bytes = b""

    def read_machine(self) -> MachineEvidence:
        """Read the container."""
        return self._part("machine", lambda: MachineEvidence.from_bytes(self.data))

    @property
    def machine(self) -> MachineEvidence:
        """The container, for other checks."""
        return self.need("format", self.read_machine)

    def read_kind(self) -> str:
        """Return the kind of the evidence inside."""
        data = self.machine.evidence

        def find() -> str:
            kind = kind_of(data)
            if kind not in TEES:
                raise EvidenceFormatError(
                    "the machine's evidence is of no kind that vouches for a platform",
                    expected=", ".join(TEES),
                    found=kind,
                )
            return kind

        return self._part("kind", find)

    @property
    def found_kind(self) -> str:
        """The kind, for other checks."""
        return self.need("kind", self.read_kind)

    def inner(self, cls: type[Any], *kinds: str) -> Any:
        """Return the case of the evidence inside if it is one of *kinds*, else None."""
        kind = self.found_kind
        if kind not in kinds:
            return None
        # What the relying party gives goes before what came along; neither is believed unsigned.
        files = Endorsements.of({**self.machine.files, **self.endorsements.files})
        return self.derive(
            cls,
            self.machine.evidence,
            kind=kind,
            endorsements=files,
            nonce=None,
            user_data=None,
            report_data=None,
        )

    def bound(self) -> bytes:
        """Return the 64 bytes that the guest put into the machine's evidence."""
        if (snp := self.inner(verify_snp.Case, "sev-snp-report")) is not None:
            return bytes(snp.report.report_data)
        if (td := self.inner(verify_tdx.Case, "tdx-quote")) is not None:
            return bytes(td.body.report_data)
        azure = self.inner(verify_azure.Case, "azure-hcl-snp", "azure-hcl-tdx")
        return bytes(azure.runtime.user_data or b"")


CHECKS: Final[Registry[Case]] = Registry()


@CHECKS.evidence("format")
def _format(case: Case) -> Verdict:
    """The machine's evidence can be read."""
    case.read_machine()
    return PASSED


@CHECKS.evidence("kind")
def _kind(case: Case) -> Verdict:
    """It is of the TEE that the platform's record claims."""
    found = TEES[case.read_kind()]
    if found == case.tee:
        return PASSED
    return failed(
        expected=case.tee,
        found=found,
        advice="The platform's record and its machine's evidence contradict each other.",
    )


@CHECKS.evidence("binding")
def _binding(case: Case) -> Verdict:
    """The machine vouched for this platform: its root and its attestation key."""
    found = case.bound()
    if hmac.compare_digest(case.expected, found):
        return PASSED
    return failed(
        expected=case.expected,
        found=found,
        advice="This evidence is another platform's: the machine vouched for other keys.",
    )


def _without(registry: Registry[Any]) -> frozenset[str]:
    return _OUTSIDE & frozenset(registry.functions)


CHECKS.include(
    "snp",
    verify_snp.CHECKS,
    lambda case: case.inner(verify_snp.Case, "sev-snp-report"),
    without=_without(verify_snp.CHECKS),
    optional=True,
)
CHECKS.include(
    "tdx",
    verify_tdx.CHECKS,
    lambda case: case.inner(verify_tdx.Case, "tdx-quote"),
    without=_without(verify_tdx.CHECKS),
    optional=True,
)
CHECKS.include(
    "azure-snp",
    verify_azure.SNP_CHECKS,
    lambda case: case.inner(verify_azure.Case, "azure-hcl-snp"),
    without=_without(verify_azure.SNP_CHECKS),
    optional=True,
)
CHECKS.include(
    "azure-tdx",
    verify_azure.TDX_CHECKS,
    lambda case: case.inner(verify_azure.Case, "azure-hcl-tdx"),
    without=_without(verify_azure.TDX_CHECKS),
    optional=True,
)
