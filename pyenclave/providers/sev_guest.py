"""
Reports from the raw guest devices: ``/dev/sev-guest`` and ``/dev/tdx_guest``.

For kernels without configfs-tsm (before 6.7). The project's notes on evidence providers, 1.3 and
1.5; Linux, ``include/uapi/linux/sev-guest.h`` and ``tdx-guest.h``. A TDREPORT can be checked by its
own machine only: it is an ingredient of evidence, and none itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from typing import Any, Final

from pyenclave.errors import EvidenceFormatError, ProviderError
from pyenclave.formats import snp
from pyenclave.formats.snp import SnpReport
from pyenclave.formats.tdx import TdReport
from pyenclave.providers.evidence import Evidence, demand_bound, malformed, report_data_of
from pyenclave.providers.tsm import table_files

__all__ = ["DEVICE", "TDX_DEVICE", "Ioctl", "evidence", "td_report"]

DEVICE: Final = "/dev/sev-guest"
TDX_DEVICE: Final = "/dev/tdx_guest"
SNP_GET_EXT_REPORT: Final = 0xC0205302  # _IOWR('S', 2, struct snp_guest_request_ioctl)
TDX_GET_REPORT0: Final = 0xC4405401  # _IOWR('T', 1, struct tdx_report_req)

_REQUEST: Final = struct.Struct("@B7xQQII")
_EXT_REQUEST: Final = struct.Struct("@64sI28xQI4x")
_RESPONSE: Final = 4000
_RESPONSE_HEADER: Final = struct.Struct("<II24x")
_PAGE: Final = 4096
_MAX_CERTIFICATES: Final = 16 << 10  # SEV_FW_BLOB_MAX_SIZE
_NOT_REACHED: Final = 0xFF
_TD_REPORT: Final = 1024

Ioctl = Callable[[int, int, bytearray], Any]
"""As `fcntl.ioctl`: descriptor, number, and the argument's bytes, which it may change."""


def _call(device: str, number: int, message: bytearray, ioctl: Ioctl | None) -> None:
    if ioctl is not None:
        ioctl(-1, number, message)
        return
    from fcntl import ioctl as call

    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        call(fd, number, message)
    finally:
        os.close(fd)


def _failure(device: str, error: OSError, detail: str = "") -> ProviderError:
    advice = {
        errno.ENOENT: "This guest has no such device.",
        errno.EACCES: "Run this as root.",
        errno.EPERM: "Run this as root.",
        errno.ENOTTY: "The channel to the firmware is disabled until the guest is restarted.",
        errno.ETIMEDOUT: "The host throttles requests: try later.",
    }.get(error.errno or 0)
    return ProviderError(f"{device}: {error.strerror}{detail}", advice=advice)


def evidence(
    *,
    nonce: bytes = b"",
    report_data: bytes | None = None,
    vmpl: int = 0,
    device: str = DEVICE,
    ioctl: Ioctl | None = None,
) -> Evidence:
    """
    Make an SEV-SNP report, with the certificates that the host has.

    Args:
        nonce: The relying party's challenge, up to 64 bytes; padded with zeros it is the report
            data.
        report_data: The 64 bytes themselves instead.
        vmpl: Privilege level of the report, 0 to 3.
        device: The device.
        ioctl: Does the call, for tests.

    Raises:
        BindingError: The report binds other data.
        ProviderError: There is none.
        ValueError: Nothing to bind, or of an impossible length.

    """
    data = report_data_of(nonce, report_data)
    if not 0 <= vmpl <= 3:
        raise ValueError(f"a privilege level is 0 to 3, not {vmpl}")
    blob, table = _ext_report(data, vmpl, device, ioctl)
    try:
        found = Evidence(
            kind="sev-snp-report",
            evidence=blob,
            auxiliary=table,
            report_data=SnpReport.decode(blob).report_data,
            endorsements=table_files(table, blob) if any(table) else {},
            nonce=nonce,
            provider="sev-guest",
        )
    except EvidenceFormatError as error:
        raise malformed(device, error) from None
    return demand_bound(found, data)


def _ext_report(data: bytes, vmpl: int, device: str, ioctl: Ioctl | None) -> tuple[bytes, bytes]:
    room = _PAGE
    for _ in range(3):  # once, once more with the size that it asks for, and once for a race
        table = ctypes.create_string_buffer(room)
        request = ctypes.create_string_buffer(
            _EXT_REQUEST.pack(data, vmpl, ctypes.addressof(table), room), _EXT_REQUEST.size
        )
        response = ctypes.create_string_buffer(_RESPONSE)
        message = bytearray(
            _REQUEST.pack(1, ctypes.addressof(request), ctypes.addressof(response), 0, 0)
        )
        try:
            _call(device, SNP_GET_EXT_REPORT, message, ioctl)
        except OSError as error:
            *_, firmware, hypervisor = _REQUEST.unpack(message)
            wanted = _EXT_REQUEST.unpack(request.raw)[3]
            too_small = error.errno == errno.EIO and hypervisor == 1
            if too_small and room < wanted <= _MAX_CERTIFICATES and not wanted % _PAGE:
                room = wanted
                continue
            reached = "not reached" if firmware == _NOT_REACHED else f"status {firmware:#x}"
            detail = f" (firmware {reached}, hypervisor status {hypervisor})"
            raise _failure(device, error, detail) from None
        return _report_of(device, response.raw), table.raw
    raise ProviderError(f"{device}: the host's certificate table grows with each request")


def _report_of(device: str, response: bytes) -> bytes:
    status, size = _RESPONSE_HEADER.unpack_from(response)
    if status or size != snp.REPORT_SIZE:
        raise ProviderError(
            f"{device}: the firmware gave no report",
            expected=f"status 0 and {snp.REPORT_SIZE} bytes",
            found=f"status {status:#x} and {size} bytes",
        )
    return response[_RESPONSE_HEADER.size : _RESPONSE_HEADER.size + size]


def td_report(report_data: bytes, *, device: str = TDX_DEVICE, ioctl: Ioctl | None = None) -> bytes:
    """
    Return a TDREPORT of 1,024 bytes, for whoever makes a quote of it.

    Raises:
        BindingError: It binds other data.
        ProviderError: There is none.
        ValueError: Not 64 bytes.

    """
    data = report_data_of(b"", report_data)
    message = bytearray(data + bytes(_TD_REPORT))
    try:
        _call(device, TDX_GET_REPORT0, message, ioctl)
    except OSError as error:
        raise _failure(device, error) from None
    blob = bytes(message[len(data) :])
    try:
        bound = TdReport.from_bytes(blob).report_data
    except EvidenceFormatError as error:
        raise malformed(device, error) from None
    found = Evidence(kind="tdreport", evidence=blob, report_data=bound, provider="tdx-guest")
    return demand_bound(found, data).evidence
