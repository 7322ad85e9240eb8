"""An Azure confidential VM's evidence, its parts and the cases inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyenclave.attestation import verify_snp, verify_tdx
from pyenclave.attestation.checks import NotReachedError
from pyenclave.attestation.vtpm import VtpmCase
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import hcl
from pyenclave.formats.hcl import HclReport, RsaKey, RuntimeClaims
from pyenclave.formats.tdx import TdReport

__all__ = ["Case"]

# Offset of the 64 bytes of report data in either hardware report.
_REPORT_DATA_AT: Final = {hcl.REPORT_TYPE_SNP: 0x50, hcl.REPORT_TYPE_TDX: 128}


@dataclass(slots=True, kw_only=True)
class Case(VtpmCase):
    """An HCL report, with or without a vTPM quote."""

    def read_hcl(self) -> HclReport:
        """Read the HCL report."""
        return self._part("hcl", lambda: HclReport.from_bytes(self.data))

    def read_runtime(self) -> RuntimeClaims:
        """Read the runtime claims."""
        data = self.hcl.runtime_data
        return self._part("runtime", lambda: RuntimeClaims.from_bytes(data))

    def read_td_report(self) -> TdReport:
        """Read the TDREPORT."""
        data = self.hcl.hardware_report
        return self._part("td report", lambda: TdReport.from_bytes(data))

    @property
    def hcl(self) -> HclReport:
        """The HCL report, for other checks."""
        return self.need("hcl.format", self.read_hcl)

    @property
    def runtime(self) -> RuntimeClaims:
        """The runtime claims, for other checks."""
        return self.need("hcl.claims", self.read_runtime)

    @property
    def td_report(self) -> TdReport:
        """The TDREPORT, for other checks."""
        return self.need("td.report", self.read_td_report)

    @property
    def ak(self) -> RsaKey:
        """The vTPM's attestation key."""
        found = self.runtime.ak
        if found is None:
            raise EvidenceFormatError(
                "the runtime claims bind no attestation key",
                expected=hcl.AK_KEY_ID,
                found=", ".join(self.runtime.key_ids) or "no keys",
            )
        return found

    @property
    def bound_data(self) -> bytes:
        """The report data of the hardware report."""
        at = _REPORT_DATA_AT[self.hcl.report_type]
        return self.hcl.hardware_report[at : at + 64]

    def hardware(self, kind: int) -> bytes:
        """Return the hardware report, for checks of one *kind* of hardware."""
        if self.hcl.report_type != kind:
            raise NotReachedError("hcl.type")
        return self.hcl.hardware_report

    def snp_case(self) -> verify_snp.Case:
        """Return the case of the SEV-SNP report inside."""
        return self._part(
            "snp", lambda: self.derive(verify_snp.Case, self.hardware(hcl.REPORT_TYPE_SNP))
        )

    def tdx_case(self) -> verify_tdx.Case:
        """Return the case of the TD quote beside."""
        data = self.endorsements.get("td-quote.bin")
        if data is None:
            raise NotReachedError("td.quote")
        return self._part("tdx", lambda: self.derive(verify_tdx.Case, data))
