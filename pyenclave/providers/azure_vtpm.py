"""
Evidence of an Azure confidential VM, from its vTPM: HCL report, quote, PCRs.

The paravisor below the guest answers reads of NV index 0x01400001 with a hardware report over its
claims, among them what the guest wrote into 0x01400002. It makes a new report at the start of a
read, but at most every two seconds, and serves the old one in between without a word: so the claims
are compared with what was written, and read again until they are the new ones (the project's notes
on evidence providers, 1.6). No network: what Azure's metadata service adds is an argument.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pyenclave._files import read_file
from pyenclave.errors import BindingError, EvidenceFormatError, ProviderError, TpmError
from pyenclave.formats import hcl, tpm_wire
from pyenclave.formats.hcl import HclReport, RuntimeClaims
from pyenclave.formats.snp import SnpReport
from pyenclave.formats.tdx import TdReport
from pyenclave.formats.tpm import PcrSelection, pcr_digest
from pyenclave.providers.evidence import Evidence, malformed
from pyenclave.tpm import Quoted, Tpm

__all__ = [
    "AK_HANDLE",
    "EVENT_LOG",
    "NV_AK_CERTIFICATE",
    "NV_REPORT",
    "NV_USER_DATA",
    "evidence",
    "read_report",
    "write_user_data",
]

NV_REPORT: Final = 0x01400001
NV_USER_DATA: Final = 0x01400002
NV_AK_CERTIFICATE: Final = 0x01C101D0
AK_HANDLE: Final = 0x81000003
EVENT_LOG: Final = "/sys/kernel/security/tpm0/binary_bios_measurements"

_USER_DATA: Final = 64
_MAX_EVENT_LOG: Final = 4 << 20  # what a file of endorsements may have
_MAX_QUOTE_NONCE: Final = 64
_PERIOD: Final = 2.0  # seconds between two reports of the paravisor
_READS: Final = 8
_PAUSE: Final = 0.7  # seconds: seven of them are twice the period and more
_QUOTES: Final = 5
_PCRS: Final = tuple(range(24))
_NAME: Final = "Azure vTPM"
_KINDS: Final = {hcl.REPORT_TYPE_SNP: "azure-hcl-snp", hcl.REPORT_TYPE_TDX: "azure-hcl-tdx"}


def write_user_data(tpm: Tpm, data: bytes) -> None:
    """
    Write what the next report binds; longer than 64 bytes, their SHA-512.

    Raises:
        TpmError: The NV index cannot be made or written.

    """
    data = (
        hashlib.sha512(data).digest() if len(data) > _USER_DATA else data.ljust(_USER_DATA, b"\0")
    )
    try:
        size = tpm.nv_public(NV_USER_DATA).size
    except TpmError as error:
        if error.rc != tpm_wire.RC_HANDLE:
            raise
        size = None
    if size is not None and size != _USER_DATA:
        tpm.nv_undefine(NV_USER_DATA)
    if size != _USER_DATA:
        tpm.nv_define(NV_USER_DATA, _USER_DATA)
    tpm.nv_write(NV_USER_DATA, data)


def read_report(tpm: Tpm) -> HclReport:
    """
    Read the HCL report as it stands.

    Raises:
        ProviderError: There is none, or it is malformed.
        TpmError: The TPM refuses.

    """
    data = _read(tpm)
    try:
        return HclReport.from_bytes(data)
    except EvidenceFormatError as error:
        raise malformed(_NAME, error) from None


def _read(tpm: Tpm) -> bytes:
    try:
        return tpm.nv_read(NV_REPORT)
    except TpmError as error:
        if error.rc != tpm_wire.RC_HANDLE:
            raise
        raise ProviderError(
            f"{_NAME}: there is no HCL report",
            expected=f"NV index {NV_REPORT:#x}",
            found="no such index",
            advice="This TPM belongs to no Azure confidential VM.",
        ) from None


def _bound_data(report: HclReport) -> bytes:
    if report.report_type == hcl.REPORT_TYPE_SNP:
        return SnpReport.decode(report.hardware_report).report_data
    return TdReport.from_bytes(report.hardware_report).report_data


def _fresh_report(
    tpm: Tpm, wanted: bytes | None, sleep: Callable[[float], None]
) -> tuple[HclReport, bytes, bool]:
    """
    Return the report, its report data, and whether it is whole and has the wanted user data.

    The index is read in pieces, and a report that was made meanwhile, for somebody else's read, is
    half the old one: it cannot be parsed, or its claims are not those that the hardware signed.
    """
    last: tuple[HclReport, bytes, bool] | EvidenceFormatError = EvidenceFormatError(_NAME)
    for attempt in range(_READS):
        if attempt:
            sleep(_PAUSE)
        data = _read(tpm)
        try:
            report = HclReport.from_bytes(data)
            bound = _bound_data(report)
            last = report, bound, False
            if not hmac.compare_digest(bound, report.expected_report_data):
                continue
            said = RuntimeClaims.from_bytes(report.runtime_data).user_data or bytes(_USER_DATA)
        except EvidenceFormatError as error:
            last = error
            continue
        if wanted is None or hmac.compare_digest(said, wanted):
            return report, bound, True
    if isinstance(last, EvidenceFormatError):
        raise malformed(_NAME, last)
    return last


def _quote(tpm: Tpm, nonce: bytes, selections: Sequence[PcrSelection]) -> tuple[Quoted, bytes]:
    """Return a quote and the PCR values that it is of, as JSON."""
    for _ in range(_QUOTES):
        values = tpm.pcr_read(selections)
        quoted = tpm.quote(AK_HANDLE, nonce, selections)
        digest = pcr_digest(values, quoted.attest.selections, "sha256")
        if digest is not None and hmac.compare_digest(digest, quoted.attest.pcr_digest):
            named = {
                bank: {str(index): value.hex() for index, value in sorted(found.items())}
                for bank, found in values.items()
            }
            return quoted, json.dumps(named).encode("ascii")
    raise ProviderError(
        f"{_NAME}: the PCRs are not those that were quoted",
        expected=f"the same within {_QUOTES} attempts",
        advice="Something extends PCRs all the time, or the attestation key has another hash.",
    )


def evidence(
    tpm: Tpm,
    *,
    nonce: bytes = b"",
    user_data: bytes | None = None,
    fresh_report: bool = True,
    event_log: str | os.PathLike[str] | None = EVENT_LOG,
    td_quote: Callable[[bytes], bytes] | None = None,
    pcrs: Sequence[int] = _PCRS,
    sleep: Callable[[float], None] = time.sleep,
) -> Evidence:
    """
    Make evidence of this VM: the HCL report, and a quote of its vTPM.

    Args:
        tpm: The vTPM.
        nonce: The relying party's challenge, up to 64 bytes: what the vTPM quotes.
        user_data: What the hardware report shall bind; more than 64 bytes are hashed with SHA-512.
            Default the nonce, so that the hardware report is new, too.
        fresh_report: Whether the report must have our user data. Without, an old report is taken:
            it still binds the key that signs the quote, and the quote has the nonce.
        event_log: The firmware's event log; left out if it cannot be read.
        td_quote: Has a TDREPORT of 1,024 bytes quoted (Azure's metadata service does); without it
            evidence of a TDX VM cannot be verified.
        pcrs: Which SHA-256 PCRs are quoted.
        sleep: Waits so many seconds.

    Raises:
        BindingError: The report is an old one and stays so.
        ProviderError: The vTPM refuses, or what it gave is malformed.
        ValueError: Nothing to bind, or a nonce that is too long.

    """
    if len(nonce) > _MAX_QUOTE_NONCE:
        raise ValueError(f"a vTPM quotes a nonce of at most {_MAX_QUOTE_NONCE} bytes: hash it")
    wanted = user_data if user_data is not None else nonce
    if not wanted:
        raise ValueError("give a nonce or user data: evidence that binds nothing is old at once")
    if len(wanted) > _USER_DATA:
        wanted = hashlib.sha512(wanted).digest()
    wanted = wanted.ljust(_USER_DATA, b"\0")
    try:
        # There is one index for user data: two that write it would wait for each other's report.
        with tpm.exclusive():
            return _evidence(
                tpm, nonce, wanted if fresh_report else None, event_log, td_quote, pcrs, sleep
            )
    except TpmError as error:
        raise ProviderError(f"{_NAME}: {error}") from error


def _evidence(
    tpm: Tpm,
    nonce: bytes,
    wanted: bytes | None,
    event_log: str | os.PathLike[str] | None,
    td_quote: Callable[[bytes], bytes] | None,
    pcrs: Sequence[int],
    sleep: Callable[[float], None],
) -> Evidence:
    if wanted is not None:
        write_user_data(tpm, wanted)
    report, bound, is_fresh = _fresh_report(tpm, wanted, sleep)
    quoted, values = _quote(tpm, nonce, (PcrSelection("sha256", tuple(sorted(pcrs))),))
    files = {
        "runtime-data.json": report.runtime_data,
        "tpm-quote.msg": quoted.message,
        "tpm-quote.sig": quoted.signature,
        "tpm-pcrs.json": values,
        **_optional_files(tpm, event_log),
    }
    if td_quote is not None and report.report_type == hcl.REPORT_TYPE_TDX:
        files["td-quote.bin"] = td_quote(report.hardware_report)
    bound_claims = hmac.compare_digest(bound, report.expected_report_data)
    found = Evidence(
        kind=_KINDS[report.report_type],
        evidence=report.to_bytes(),
        report_data=bound,
        endorsements=files,
        nonce=nonce,
        user_data=RuntimeClaims.from_bytes(report.runtime_data).user_data if bound_claims else None,
        provider="azure-vtpm",
    )
    if not is_fresh:
        raise _stale(report, bound, wanted, found)
    return found


def _optional_files(tpm: Tpm, event_log: str | os.PathLike[str] | None) -> Mapping[str, bytes]:
    files: dict[str, bytes] = {}
    if tpm.nv_exists(NV_AK_CERTIFICATE):
        with contextlib.suppress(TpmError):  # not written yet: the hardware report says the same
            files["ak-cert-nv.der"] = tpm.nv_read(NV_AK_CERTIFICATE)
    if event_log is not None:
        with contextlib.suppress(OSError):
            data = read_file(event_log, limit=_MAX_EVENT_LOG)
            if data:
                files["tpm-eventlog.bin"] = data
    return files


def _stale(report: HclReport, bound: bytes, wanted: bytes | None, found: Evidence) -> BindingError:
    if not hmac.compare_digest(bound, report.expected_report_data):
        return BindingError(
            f"{_NAME}: the hardware report does not bind the runtime claims",
            expected=report.expected_report_data.hex(),
            found=bound.hex(),
            evidence=found,
        )
    return BindingError(
        f"{_NAME}: the HCL report binds other user data",
        expected=(wanted or b"").hex(),
        found="none" if found.user_data is None else found.user_data.hex(),
        advice=f"A new report comes at most every {_PERIOD:.0f} seconds; this one stayed old for "
        "longer: it is a recording, or of an old image that takes no user data "
        "(fresh_report=False then relies on the vTPM's quote).",
        evidence=found,
    )
