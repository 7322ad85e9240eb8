"""What an Azure confidential VM's evidence says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from pyenclave.attestation import verify_snp, verify_tdx
from pyenclave.attestation.azure_case import Case
from pyenclave.attestation.case import gathered, judged_at
from pyenclave.attestation.vtpm import ak_claims, quote_claims
from pyenclave.formats import hcl
from pyenclave.formats.snp import SnpReport

__all__ = ["claims", "quote_differs"]


def quote_differs(case: Case) -> tuple[str, bytes, bytes] | None:
    """Return the first field in which TDREPORT and TD quote differ, with both values."""
    report, quoted = case.td_report.body, case.tdx_case().body
    for item in fields(report):
        expected, found = getattr(report, item.name), getattr(quoted, item.name)
        # The quote's body may be older (without the fields of 1.5) or newer than the TDREPORT's.
        if found is not None and item.name != "extension" and expected != found:
            return item.name, expected, found
    return None


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the evidence says, as far as it can be read; binary values as hex."""
    return gathered(
        case, judged_at, _hcl_claims, _runtime_claims, _hardware_claims, _vtpm_claims, ak_claims
    )


def _hcl_claims(case: Case) -> dict[str, Any]:
    report = case.read_hcl()
    size = len(report.runtime_data)
    return {
        "tee": "snp" if report.report_type == hcl.REPORT_TYPE_SNP else "tdx",
        "hcl": {
            "sig": hcl.HCL_MAGIC.decode("ascii"),
            "version": report.version,
            "report_size": report.report_size,
            "request_type": report.request_type,
            "status": report.status,
            "data_size": 20 + size,
            "data_version": report.data_version,
            "report_type": report.report_type,
            "hash_type": report.hash_type,
            "var_size": size,
        },
        "runtime_data_sha256": hashlib.sha256(report.runtime_data).hexdigest(),
        "report_data": case.bound_data.hex(),
        "report_data_binds_runtime_data": case.bound_data == report.expected_report_data,
        "hardware_report_length": len(report.hardware_report),
    }


def _runtime_claims(case: Case) -> dict[str, Any]:
    runtime = case.read_runtime()
    return {
        "vm_configuration": dict(runtime.vm_configuration),
        "user_data": runtime.user_data_text,
        "key_ids": list(runtime.key_ids),
    }


def _vtpm_claims(case: Case) -> dict[str, Any]:
    found = quote_claims(case)
    return {} if found is None else {"vtpm_quote": found}


def _hardware_claims(case: Case) -> dict[str, Any]:
    if case.hcl.report_type == hcl.REPORT_TYPE_SNP:
        return _snp_claims(case)
    return _td_claims(case)


def _snp_claims(case: Case) -> dict[str, Any]:
    report = SnpReport.decode(case.hcl.hardware_report)
    inner = verify_snp.claims(case.snp_case())
    found = {
        "report": verify_snp.report_claims(report),
        "report_signature_ok": inner.get("report_signature_ok"),
        "debug": report.debug,
    }
    for name in ("chip_id_matches_hwid", "reported_tcb_matches_vek", "product", "vek"):
        if name in inner:
            found[name] = inner[name]
    return found


def _td_claims(case: Case) -> dict[str, Any]:
    report = case.read_td_report()
    body = report.body
    found: dict[str, Any] = {
        "td_report": {
            "report_type": case.hcl.hardware_report[:4].hex(),
            "cpu_svn": report.cpu_svn.hex(),
            "tee_tcb_info_hash": report.tee_tcb_info_hash.hex(),
            "tee_info_hash": report.tee_info_hash.hex(),
            "report_data": report.report_data.hex(),
            "mac": report.mac.hex(),
            **{
                name: getattr(body, name).hex()
                for name in ("tee_tcb_svn", "mr_seam", "mr_td", "td_attributes", "xfam")
            },
            **{f"rtmr{index}": value.hex() for index, value in enumerate(body.rtmrs)},
        },
        "debug": body.debug,
    }
    if "td-quote.bin" in case.endorsements:
        found |= _td_quote_claims(case)
    return found


# Of a TD quote's claims those that are of the quote, and those of its appraisal.
_QUOTE_CLAIMS: Final = (
    "quote_version",
    "att_key_type",
    "tee_type",
    "body_type",
    "cert_data_type",
    "tee_tcb_svn",
    "tee_tcb_svn2",
    "mr_seam",
    "mrsigner_seam",
    "seam_attributes",
    "td_attributes",
    "xfam",
    "mr_td",
    "mr_config_id",
    "mr_owner",
    "mr_owner_config",
    "mr_service_td",
    "rtmr0",
    "rtmr1",
    "rtmr2",
    "rtmr3",
    "report_data",
    "debug",
    "sept_ve_disable",
    "pck",
    "qe_isv_svn",
    "qe_mrsigner",
    "qe_mrenclave",
)
_TCB_CLAIMS: Final = (
    "tcb_status",
    "platform_tcb_status",
    "tdx_module_status",
    "qe_status",
    "advisory_ids",
)


def _td_quote_claims(case: Case) -> dict[str, Any]:
    inner = case.tdx_case()
    said = verify_tdx.claims(inner)
    checks = verify_tdx.CHECKS.run(inner)
    found: dict[str, Any] = {
        "td_quote_ok": all(check.holds for check in checks if check.part == "evidence"),
        "td_quote": {name: said[name] for name in _QUOTE_CLAIMS if name in said},
    }
    found |= {name: said[name] for name in _TCB_CLAIMS if name in said}
    found["td_quote_binds_same_report_data_and_mrtd"] = quote_differs(case) is None
    return found
