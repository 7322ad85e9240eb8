"""Azure confidential VMs on SEV-SNP with one thing wrong each; see ``test_mutation.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import issuer_amd as amd
import issuer_azure as azure
from negatives_azure_hcl_tdx import of_another_kind, td_report

from pyenclave.attestation import AttestationResult
from pyenclave.attestation.verify_azure import SNP_CHECKS
from pyenclave.formats.hcl import REPORT_TYPE_TDX

STRUCTURAL = azure.STRUCTURAL | {"hcl.type"} | {f"snp.{name}" for name in amd.STRUCTURAL}


def judged(flaw: azure.Flaw, chip: amd.Flaw | None = None, **options: Any) -> AttestationResult:
    chip = chip or amd.Flaw("")
    made = chip.build()
    values: dict[str, Any] = {
        "policy": amd.policy(**chip.policy),
        "roots": [made.root, azure.vtpm_root()],
        "files": made.files,
    }
    return azure.appraised(flaw, chip.signed, **(values | options))


def _tdx_report() -> bytes:
    return azure.machine(td_report, report_type=REPORT_TYPE_TDX).hcl_report()


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    for chip in amd.FLAWS:
        if f"snp.{chip.check}" in SNP_CHECKS.functions:
            yield f"snp.{chip.check}", partial(judged, azure.Flaw(""), chip)
    yield "snp.chain.root", partial(judged, azure.Flaw(""), roots=[azure.vtpm_root()])
    for flaw in azure.FLAWS:
        yield flaw.check, partial(judged, flaw)
    yield "hcl.type", partial(of_another_kind, "azure-hcl-snp", _tdx_report())
    guest = amd.Flaw("hcl.vmpl", report={"vmpl": 1})
    yield "hcl.vmpl", partial(judged, azure.Flaw(""), guest)
    for check, options in azure.JUDGED:
        yield check, partial(judged, azure.Flaw(""), **options())
