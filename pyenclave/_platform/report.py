"""EREPORT in software: reports that only their target, on this platform, can verify."""

from __future__ import annotations

import dataclasses
import hmac

from pyenclave._core import aes128_cmac
from pyenclave._platform.keys import Keys
from pyenclave.errors import EvidenceFormatError, UnsealError
from pyenclave.formats.sgx import Report, ReportBody, TargetInfo

__all__ = ["make_report", "verify_report"]


def make_report(
    keys: Keys, body: ReportBody, *, target: TargetInfo, data: bytes, key_id: bytes
) -> Report:
    """
    Make a report of the enclave *body* for *target* (SDM: EREPORT).

    Args:
        keys: The platform's keys.
        body: Identity of the reporting enclave, from the platform's own books.
        target: Whom the report is for.
        data: 64 bytes of report data, from measured code.
        key_id: 32 random bytes of this platform process.

    Returns:
        The report; MAC = AES-128-CMAC over its first 384 bytes.

    """
    if len(data) != 64:
        raise EvidenceFormatError("report data has another length", expected=64, found=len(data))
    filled = dataclasses.replace(body, report_data=data)
    mac = aes128_cmac(keys.report_key(target, key_id), filled.to_bytes())
    return Report(body=filled, key_id=key_id, mac=mac)


def verify_report(keys: Keys, body: ReportBody, report: Report) -> None:
    """
    Check that *report* was made on this platform for the enclave *body*.

    Raises:
        UnsealError: The MAC does not hold.

    """
    key = keys.report_key(TargetInfo.of(body), report.key_id)
    if not hmac.compare_digest(aes128_cmac(key, report.body.to_bytes()), report.mac):
        raise UnsealError("MAC of the report does not hold: not for this enclave, or not from here")
