"""Azure confidential VMs on TDX with one thing wrong each; see ``test_mutation.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import issuer_azure as azure
from issuer_amd import AT

from pyenclave.attestation import AppraisalPolicy, AttestationResult, kinds
from pyenclave.formats.hcl import REPORT_TYPE_TDX
from pyenclave.formats.tdx import TdReport
from pyenclave.testing.intel import IntelPlatform

STRUCTURAL = azure.STRUCTURAL | {"hcl.type", "td.quote"}
SVN = bytes((5, 1, 2)) + bytes(13)
MR_TD, MR_SEAM = bytes(range(48)), bytes(range(48, 96))


@cache
def platform() -> IntelPlatform:
    return IntelPlatform(AT)


def body(bound: bytes, /, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tee_tcb_svn": SVN,
        "mr_seam": MR_SEAM,
        "td_attributes": (1 << 28).to_bytes(8, "little"),
        "xfam": bytes.fromhex("e702060000000000"),
        "mr_td": MR_TD,
        "rtmr0": bytes(48),
        "report_data": bound,
    }
    return fields | changes


def td_report(bound: bytes, /, **changes: Any) -> bytes:
    """Return the TDREPORT with the fields of `body`; ``report`` are fields of `TdReport`."""
    report = changes.pop("report", {})
    fields = body(bound, **changes)
    module = (
        (0x301FF).to_bytes(8, "little")
        + fields["tee_tcb_svn"]
        + fields["mr_seam"]
        + bytes(48 + 8)
        + fields["tee_tcb_svn"]
        + bytes(95)
    )
    td = fields["td_attributes"] + fields["xfam"] + fields["mr_td"] + bytes(3 * 48)
    td = (td + fields["rtmr0"]).ljust(512, b"\0")
    values: dict[str, Any] = {
        "version": 0,
        "cpu_svn": bytes(16),
        "tee_tcb_info_hash": hashlib.sha384(module).digest(),
        "tee_info_hash": hashlib.sha384(td).digest(),
        "report_data": fields["report_data"],
        "mac": bytes(32),
        "tee_tcb_info": module,
        "td_info": td,
    }
    return TdReport(**(values | report)).to_bytes()


def judged(
    flaw: azure.Flaw,
    *,
    report: Mapping[str, Any] | None = None,
    quoted: Mapping[str, Any] | None = None,
    quote: Mapping[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    **options: Any,
) -> AttestationResult:
    """
    Appraise a VM.

    Args:
        flaw: What is wrong around the hardware report.
        report: Changes of TDREPORT.
        quoted: Changes of the body of the quote; the quote is signed.
        quote: Arguments of `IntelPlatform.td_quote`.
        leave_out: Files that are not there.
        options: Arguments of `appraise`.
    """
    intel = platform()
    files = intel.endorsements("tdx")

    def hardware(report_data: bytes) -> bytes:
        said = body(report_data, **(quoted or {}))
        files["td-quote.bin"] = intel.td_quote(**said, **(quote or {}))
        for file in leave_out:
            del files[file]
        return td_report(report_data, **dict(report or {}))

    values: dict[str, Any] = {
        "policy": AppraisalPolicy(mrtd=MR_TD),
        "roots": [intel.root, azure.vtpm_root()],
        "files": files,
        "vm": {"report_type": REPORT_TYPE_TDX},
    }
    return azure.appraised(flaw, hardware, **(values | options))


def of_another_kind(kind: str, data: bytes) -> AttestationResult:
    """Let the checks of *kind* judge evidence of another one; `appraise` never does that."""
    found = kinds.load(kind)
    case = found.case(data=data, kind=kind, policy=AppraisalPolicy.strict(), at=AT)
    checks = found.checks.run(case)
    return AttestationResult(kind=kind, checks=checks, claims={}, at=AT)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    good = azure.Flaw("")
    for flaw in azure.FLAWS:
        yield flaw.check, partial(judged, flaw)
    for check, options in azure.JUDGED:
        yield check, partial(judged, good, **options())
    snp = azure.machine(lambda _: bytes(1184)).hcl_report()
    yield "hcl.type", partial(of_another_kind, "azure-hcl-tdx", snp)
    for part in ("tee_info_hash", "tee_tcb_info_hash"):
        yield "td.report", partial(judged, good, report={"report": {part: bytes(48)}})
    yield "td.quote", partial(judged, good, leave_out=("td-quote.bin",))
    for changes in (
        {"report_data": bytes(64)},
        {"report_data": b"\1" * 64},
        {"rtmr0": b"\1" * 48},
        {"rtmr3": b"\1" * 48},
        {"mr_owner": b"\1" * 48},
        {"xfam": bytes.fromhex("e700000000000000")},
    ):
        yield "td.binding", partial(judged, good, quoted=changes)
    yield "td.binding", partial(judged, good, report={"mr_td": b"\1" * 48})
    wrong = {"quote": {"quote": {"signature": bytes(64)}}}
    yield "tdx.quote.signature", partial(judged, good, **wrong)
    debug = {"td_attributes": b"\1" + bytes(7)}
    yield "tdx.td.debug", partial(judged, good, report=debug, quoted=debug)
    yield "tdx.code.mrtd", partial(judged, good, policy=AppraisalPolicy(mrtd=b"\1" * 48))
    yield "tdx.collateral.complete", partial(judged, good, leave_out=("tcb-info.json",))
