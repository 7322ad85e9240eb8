"""
Evidence of an SGX enclave under Gramine, from its pseudo-files below ``/dev/attestation``.

What a file gives is made when it is opened, of what was written before; the files belong to the
whole process, so one request at a time (the project's notes on evidence providers, 1.7; Gramine,
``Documentation/attestation.rst``).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from pyenclave._locks import Lock
from pyenclave.errors import EvidenceFormatError, ProviderError
from pyenclave.formats import dcap
from pyenclave.providers.evidence import Evidence, demand_bound, malformed, report_data_of

__all__ = ["DIRECTORY", "attestation_type", "evidence", "key", "report"]

DIRECTORY: Final = "/dev/attestation"
_MAX_QUOTE: Final = 8192
_TARGET_INFO: Final = 512
_REPORT: Final = 432
_KEY: Final = 16
_MUTEX: Final = Lock()
_NAME: Final = "Gramine"


def attestation_type(directory: str = DIRECTORY) -> str:
    """
    Return how this enclave can be attested: ``none``, ``dcap``, or ``epid`` in old releases.

    Raises:
        ProviderError: This is no Gramine enclave.

    """
    data = _read(directory, "attestation_type", 64)
    return data.decode("ascii", "replace").strip()


def evidence(
    *, nonce: bytes = b"", report_data: bytes | None = None, directory: str = DIRECTORY
) -> Evidence:
    """
    Make a quote of this enclave.

    Args:
        nonce: The relying party's challenge, up to 64 bytes; padded with zeros it is the report
            data.
        report_data: The 64 bytes themselves instead.
        directory: Where the pseudo-files are.

    Raises:
        BindingError: The quote binds other data: another thread outside this module wrote.
        ProviderError: No Gramine enclave, none that can be attested remotely, or no quote.
        ValueError: Nothing to bind, or of an impossible length.

    """
    data = report_data_of(nonce, report_data)
    kind = attestation_type(directory)
    if kind != "dcap":
        raise ProviderError(
            f"{_NAME}: this enclave makes no DCAP quotes",
            expected='attestation type "dcap"',
            found=kind[:40] or "nothing",
            advice='Set sgx.remote_attestation = "dcap" in the manifest.',
        )
    with _MUTEX:
        _write(directory, "user_report_data", data)
        blob = _read(directory, "quote", _MAX_QUOTE)
    try:
        quote = dcap.Quote.from_bytes(blob)
    except EvidenceFormatError as error:
        raise malformed(_NAME, error) from None
    found = Evidence(
        kind="sgx-quote",
        evidence=blob[: len(quote.to_bytes())],
        report_data=quote.report_body.report_data,
        nonce=nonce,
        provider="gramine (dcap)",
    )
    return demand_bound(found, data)


def report(
    report_data: bytes, *, target_info: bytes | None = None, directory: str = DIRECTORY
) -> bytes:
    """
    Return a REPORT of 432 bytes for another enclave of this platform.

    Args:
        report_data: 64 bytes.
        target_info: TARGETINFO of that enclave, 512 bytes; default this enclave itself.
        directory: Where the pseudo-files are.

    Raises:
        ProviderError: There is none.
        ValueError: An impossible length.

    """
    data = report_data_of(b"", report_data)
    if target_info is not None and len(target_info) != _TARGET_INFO:
        raise ValueError(f"TARGETINFO has {_TARGET_INFO} bytes, not {len(target_info)}")
    with _MUTEX:
        if target_info is None:
            target_info = _exactly(directory, "my_target_info", _TARGET_INFO)
        _write(directory, "target_info", target_info)
        _write(directory, "user_report_data", data)
        return _exactly(directory, "report", _REPORT)


def key(name: str = "_sgx_mrenclave", *, directory: str = DIRECTORY) -> bytes:
    """
    Return a key of 16 bytes: ``_sgx_mrenclave`` and ``_sgx_mrsigner`` are the hardware's for
    sealing.

    Raises:
        ProviderError: There is no such key, or it was not set yet.
        ValueError: No name of a key.

    """
    if not name or "/" in name or name in (".", "..") or not name.isprintable():
        raise ValueError(f"{name!r} is no name of a key")
    return _exactly(directory, f"keys/{name}", _KEY)


def _exactly(directory: str, name: str, size: int) -> bytes:
    data = _read(directory, name, size)
    if len(data) != size:
        raise ProviderError(
            f"{_NAME}: {name} has another size",
            expected=f"{size} bytes",
            found=f"{len(data)} bytes",
        )
    return data


def _read(directory: str, name: str, limit: int) -> bytes:
    path = f"{directory}/{name}"
    try:
        with open(path, "rb") as file:  # opened anew each time: opening it makes its content
            data = file.read(limit + 1)
    except OSError as error:
        raise _failure("read", path, error) from None
    if len(data) > limit:
        raise ProviderError(f"{_NAME}: {name} is too long", expected=f"at most {limit} bytes")
    return data


def _write(directory: str, name: str, data: bytes) -> None:
    # A longer write would be cut and a shorter one padded, both silently: sizes were checked.
    path = f"{directory}/{name}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        raise _failure("written", path, error) from None
    if done != len(data):
        raise ProviderError(
            f"{_NAME}: only a part of {name} was written", expected=len(data), found=done
        )


def _failure(what: str, path: str, error: OSError) -> ProviderError:
    advice = {
        errno.ENOENT: "This is no Gramine enclave, or its manifest sets no sgx.remote_attestation.",
        errno.EACCES: "Gramine says so for whatever fails below it: look at its log "
        "(loader.log_level), and whether the quoting service (aesmd) runs.",
    }.get(error.errno or 0)
    return ProviderError(f"{_NAME}: {path} cannot be {what}: {error.strerror}", advice=advice)
