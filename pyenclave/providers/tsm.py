"""
Evidence from the kernel's configfs-tsm: SEV-SNP, TDX and Arm CCA guests.

One folder below ``/sys/kernel/config/tsm/report`` is one request. The folder's ``generation`` says
how often somebody wrote into it; only if that is exactly what we wrote, before and after reading,
do the blobs belong together and to us (the project's notes on evidence providers, 1.2; Linux,
``Documentation/ABI/testing/configfs-tsm-report``). Every loop here has an end.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn, Protocol

from pyenclave.errors import EvidenceFormatError, ProviderError, ReportRaceError
from pyenclave.formats import cca, snp
from pyenclave.formats.dcap import TdQuote
from pyenclave.formats.snp import SnpReport
from pyenclave.formats.snp_certs import (
    GUID_ARK,
    GUID_ASK,
    GUID_VCEK,
    GUID_VLEK,
    CertificateTable,
)
from pyenclave.formats.x509 import encode_pem
from pyenclave.providers.evidence import (
    REPORT_DATA_SIZE,
    Evidence,
    demand_bound,
    malformed,
    report_data_of,
)

__all__ = [
    "DIRECTORY",
    "OS_FILES",
    "Files",
    "TsmReport",
    "evidence",
    "meaning",
    "report",
    "table_files",
]

DIRECTORY: Final = "/sys/kernel/config/tsm/report"
ATTEMPTS: Final = 5
_TIMEOUT: Final = 180.0  # seconds; the kernel itself waits up to 60 for a throttled SNP host
_PAUSE: Final = 0.1  # seconds before the second attempt; doubled each time
_MAX_BLOB: Final = 1 << 20
_MAX_TEXT: Final = 4096
_MAX_INTERRUPTED: Final = 100
_MAX_TD_QUOTE: Final = 8 << 10  # beyond it, TDX means another format (newer kernels)
_SERVICES: Final = ("service_provider", "service_guid", "service_manifest_version")


class Files(Protocol):
    """What is done in the folder; each may raise OSError."""

    def mkdir(self, path: str) -> None:
        """Make a folder."""

    def rmdir(self, path: str) -> None:
        """Remove a folder."""

    def read(self, path: str, limit: int) -> bytes:
        """Read a file from its beginning to its end, at most *limit* + 1 bytes."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file in one piece and close it."""


class _OsFiles:
    """The operating system's."""

    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)

    @staticmethod
    def read(path: str, limit: int) -> bytes:
        """Read a file that can neither seek nor say how long it is."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            parts: list[bytes] = []
            left = limit + 1
            while left > 0 and (part := os.read(fd, min(left, 1 << 16))):
                parts.append(part)
                left -= len(part)
            return b"".join(parts)
        finally:
            os.close(fd)

    @staticmethod
    def write(path: str, data: bytes) -> None:
        """Write without truncating: the kernel's attributes take one write and commit at close."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            done = os.write(fd, data)
        finally:
            os.close(fd)
        if done != len(data):
            raise OSError(errno.EIO, "only a part was written", path)


OS_FILES: Final[Files] = _OsFiles()


@dataclass(frozen=True, slots=True, kw_only=True)
class TsmReport:
    """
    What one request gave.

    Attributes:
        provider: ``sev_guest``, ``tdx_guest`` or ``arm_cca_guest``.
        outblob: The report or quote, as it came.
        auxblob: The host's certificate table; empty if there is none.
        manifestblob: The SVSM's manifest of services; empty without one.
        generation: How often we wrote.
    """

    provider: str
    outblob: bytes = field(repr=False)
    auxblob: bytes = field(default=b"", repr=False)
    manifestblob: bytes = field(default=b"", repr=False)
    generation: int


# What an errno says, by what was done: whether to begin anew with another folder, a sentence, and
# what to do about it. Notes 1.2, "errno meaning".
_ANEW, _FINAL = True, False
_Meaning = tuple[bool, str, str | None]
_RELOAD: Final = (
    "Load the guest's driver (sev-guest or tdx-guest); if there is none, this is no TEE guest."
)
_MEANINGS: Final[Mapping[str, Mapping[int, _Meaning]]] = {
    "mkdir": {
        errno.ENXIO: (_FINAL, "no TSM provider is registered", _RELOAD),
        errno.ENOENT: (
            _FINAL,
            "there is no such folder",
            "Mount configfs (mount -t configfs none /sys/kernel/config) and load the module tsm.",
        ),
        errno.EACCES: (_FINAL, "only root may ask for a report", "Run this as root."),
        errno.EPERM: (_FINAL, "only root may ask for a report", "Run this as root."),
        errno.EEXIST: (_ANEW, "the folder's name is taken", None),
        errno.EBUSY: (_ANEW, "busy", None),
        errno.EROFS: (
            _FINAL,
            "configfs is mounted read-only",
            "Containers see it so: mount it writable, or ask outside the container.",
        ),
        errno.ENOMEM: (_FINAL, "the kernel has no memory for it", None),
    },
    "write": {
        errno.EBUSY: (_ANEW, "somebody writes the same request", None),
        errno.EINVAL: (
            _FINAL,
            "the value is refused",
            "A privilege level lies between privlevel_floor and 3; the only service provider is "
            "svsm.",
        ),
        errno.EFBIG: (_FINAL, "longer than the kernel takes", "Report data has 64 bytes."),
        errno.ENOENT: (_FINAL, "the guest's driver has no such option", None),
        errno.EACCES: (_FINAL, "no permission", "Run this as root."),
        errno.EPERM: (_FINAL, "no permission", "Run this as root."),
        errno.EAGAIN: (_ANEW, "busy", None),
    },
    "read": {
        errno.EINVAL: (
            _FINAL,
            "the firmware refuses the request",
            "Report data of exactly 64 bytes and a privilege level that the guest may ask for.",
        ),
        errno.EAGAIN: (_ANEW, "the report is not there yet", None),
        errno.EBUSY: (
            _ANEW,
            "an earlier quote request is still with the hypervisor",
            "Wait until the host's quoting service answers; a restart of the guest clears it.",
        ),
        errno.ETIMEDOUT: (
            _ANEW,
            "the host did not answer in time",
            "SEV-SNP: the host throttles requests. TDX: its quoting service does not run.",
        ),
        errno.EFBIG: (_FINAL, "the report is larger than the kernel's interface", None),
        errno.ENXIO: (
            _FINAL,
            "the provider is gone, or the SEV-SNP firmware refused",
            "The kernel's log (dmesg) has the firmware's status.",
        ),
        errno.ENOTTY: (
            _FINAL,
            "the channel to the SEV-SNP firmware is disabled after an earlier error",
            "It stays so until the guest is restarted.",
        ),
        errno.EIO: (
            _FINAL,
            "the hypervisor failed (TDX GetQuote), or its certificates do not fit (SEV-SNP)",
            "Ask the cloud's operator: the quoting service or its certificates are at fault.",
        ),
        errno.ENOMEM: (_FINAL, "the report does not fit, or the kernel has no memory", None),
        errno.EACCES: (_FINAL, "no permission", "Run this as root."),
        errno.EPERM: (_FINAL, "no permission", "Run this as root."),
    },
}


def _meaning(what: str, error: OSError) -> _Meaning:
    unknown: _Meaning = (_FINAL, error.strerror or "it failed", None)
    return _MEANINGS[what].get(error.errno or 0, unknown)


def meaning(what: Literal["mkdir", "write", "read"], error: OSError) -> str:
    """Return what an error of the folder says, as a part of a sentence."""
    return _meaning(what, error)[1]


class _AgainError(Exception):
    """Begin anew with another folder; *error* says why, if this was the last time."""

    def __init__(self, error: ProviderError) -> None:
        super().__init__(str(error))
        self.error = error


class _Entry:
    """One request: a folder, and how often it was written into."""

    def __init__(self, files: Files, path: str) -> None:
        self._files = files
        self._path = path
        self._try("mkdir", path, lambda: files.mkdir(path))

    def _try(self, what: str, path: str, call: Callable[[], bytes | None]) -> bytes:
        for _ in range(_MAX_INTERRUPTED):
            try:
                return call() or b""
            except InterruptedError:
                continue  # at once: nothing was done
            except OSError as error:
                self._refused(what, path, error)
        raise ProviderError(f"configfs-tsm: {what} of {path} was interrupted again and again")

    def _refused(self, what: str, path: str, error: OSError) -> NoReturn:
        anew, text, advice = _meaning(what, error)
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        made = ProviderError(f"configfs-tsm: {what} of {path}: {text} ({name})", advice=advice)
        if anew:
            raise _AgainError(made) from None
        raise made from None

    def read(self, name: str, limit: int) -> bytes:
        path = f"{self._path}/{name}"
        data = self._try("read", path, lambda: self._files.read(path, limit))
        if len(data) > limit:
            raise ProviderError(
                f"configfs-tsm: {name} is too long", expected=f"at most {limit} bytes"
            )
        return data

    def read_optional(self, name: str, limit: int) -> bytes:
        """Read an attribute that not every driver has (ENOENT)."""
        path = f"{self._path}/{name}"

        def call() -> bytes:
            try:
                return self._files.read(path, limit)
            except FileNotFoundError:
                return b""

        data = self._try("read", path, call)
        if len(data) > limit:
            raise ProviderError(
                f"configfs-tsm: {name} is too long", expected=f"at most {limit} bytes"
            )
        return data

    def number(self, name: str) -> int:
        text = self.read(name, _MAX_TEXT).strip()
        if not text.isdigit() or len(text) > 20:
            raise ProviderError(
                f"configfs-tsm: {name} is no number",
                expected="decimal digits",
                found=text[:40].decode("ascii", "replace"),
            )
        return int(text)

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._path}/{name}"
        self._try("write", path, lambda: self._files.write(path, data))

    def remove(self) -> None:
        """Give the folder back. Its files go with it; that it fails must not hide what did."""
        for _ in range(_MAX_INTERRUPTED):
            try:
                self._files.rmdir(self._path)
            except InterruptedError:
                continue
            except OSError:
                pass
            return


def report(
    report_data: bytes,
    *,
    directory: str = DIRECTORY,
    privlevel: int | None = None,
    service_provider: str | None = None,
    service_guid: str | None = None,
    service_manifest_version: int | None = None,
    attempts: int = ATTEMPTS,
    timeout: float = _TIMEOUT,
    files: Files | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> TsmReport:
    """
    Ask the kernel for one report.

    Args:
        report_data: 64 bytes.
        directory: Where configfs-tsm is.
        privlevel: VMPL of the report, SEV-SNP only; default the kernel's own.
        service_provider: ``svsm`` for a report of the SVSM.
        service_guid: Of which service; default all.
        service_manifest_version: Of the manifest.
        attempts: How many folders are tried.
        timeout: Seconds after which no other is tried.
        files: What is done in the folder, for tests.
        sleep: Waits so many seconds.
        clock: Seconds, from any start.

    Raises:
        ProviderError: There is none; the message names step, errno and what to do.
        ReportRaceError: Somebody else wrote into each of our folders.
        ValueError: Not 64 bytes, or impossible options.

    """
    if len(report_data) != REPORT_DATA_SIZE:
        raise ValueError(f"report data has exactly 64 bytes, not {len(report_data)}")
    if privlevel is not None and not 0 <= privlevel <= 3:
        raise ValueError(f"a privilege level is 0 to 3, not {privlevel}")
    if attempts < 1:
        raise ValueError("attempts is at least 1")
    options: dict[str, str] = {}
    if privlevel is not None:
        options["privlevel"] = str(privlevel)
    for name, value in zip(
        _SERVICES, (service_provider, service_guid, service_manifest_version), strict=True
    ):
        if value is not None:
            options[name] = str(value)
    deadline = clock() + timeout
    pause = _PAUSE
    last: ProviderError | None = None
    for attempt in range(attempts):
        if attempt:
            sleep(pause)
            pause *= 2
            if clock() >= deadline:
                break
        path = f"{directory}/pyenclave-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            return _once(files or OS_FILES, path, report_data, options)
        except _AgainError as again:
            last = again.error
    assert last is not None  # every way here sets it
    raise last


def _once(files: Files, path: str, report_data: bytes, options: Mapping[str, str]) -> TsmReport:
    entry = _Entry(files, path)
    try:
        generation = entry.number("generation")
        for name, value in options.items():
            entry.write(name, value.encode("ascii"))
            generation += 1
        entry.write("inblob", report_data)
        generation += 1
        # The same generation for all of them: else certificates of one report go with another.
        auxblob = entry.read_optional("auxblob", _MAX_BLOB)
        outblob = entry.read("outblob", _MAX_BLOB)
        manifest = b""
        if "service_provider" in options:
            manifest = entry.read_optional("manifestblob", _MAX_BLOB)
        provider = entry.read("provider", _MAX_TEXT).strip()
        found = entry.number("generation")
    finally:
        entry.remove()
    if found != generation:
        raise _AgainError(
            ReportRaceError(
                "configfs-tsm: somebody else wrote into our request",
                expected=f"generation {generation}",
                found=found,
                advice="Find who else writes below tsm/report: folders are not to be shared.",
            )
        )
    if not outblob:
        # Older TDX drivers do not look at the hypervisor's final status.
        raise ProviderError(
            "configfs-tsm: the report is empty",
            expected="a report",
            found="0 bytes, and no error",
            advice="The host's quoting service failed: ask the cloud's operator.",
        )
    return TsmReport(
        provider=provider.decode("ascii", "replace"),
        outblob=outblob,
        auxblob=auxblob,
        manifestblob=manifest,
        generation=generation,
    )


def evidence(
    *,
    nonce: bytes = b"",
    report_data: bytes | None = None,
    directory: str = DIRECTORY,
    privlevel: int | None = None,
    certificates: bool = True,
    attempts: int = ATTEMPTS,
    files: Files | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Evidence:
    """
    Make evidence of this guest.

    Args:
        nonce: The relying party's challenge, up to 64 bytes; padded with zeros it is the report
            data.
        report_data: The 64 bytes themselves instead.
        directory: Where configfs-tsm is.
        privlevel: VMPL of the report, SEV-SNP only.
        certificates: Whether the host's certificate table is read into ``vek.der``, ``ask.pem``
            and ``ark.pem``.
        attempts: How many folders are tried.
        files: As for `report`.
        sleep: As for `report`.
        clock: As for `report`.

    Raises:
        BindingError: What the kernel gave binds other data.
        ProviderError: There is none, or none of a kind that can be verified.
        ValueError: Nothing to bind, or of an impossible length.

    """
    data = report_data_of(nonce, report_data)
    made = report(
        data,
        directory=directory,
        privlevel=privlevel,
        attempts=attempts,
        files=files,
        sleep=sleep,
        clock=clock,
    )
    readers = {"sev_guest": _snp, "tdx_guest": _tdx, "arm_cca_guest": _cca}
    reader = readers.get(made.provider)
    if reader is None:
        raise ProviderError(
            "configfs-tsm: the provider is not known",
            expected=", ".join(readers),
            found=made.provider[:40],
        )
    try:
        kind, blob, bound = reader(made.outblob)
        beside = table_files(made.auxblob, blob) if certificates and made.auxblob else {}
    except EvidenceFormatError as error:
        raise malformed(f"configfs-tsm ({made.provider})", error) from None
    found = Evidence(
        kind=kind,
        evidence=blob,
        auxiliary=made.auxblob,
        report_data=bound,
        endorsements=beside,
        nonce=nonce,
        provider=f"configfs-tsm ({made.provider})",
    )
    return demand_bound(found, data)


def _snp(blob: bytes) -> tuple[str, bytes, bytes]:
    if len(blob) != snp.REPORT_SIZE:
        raise EvidenceFormatError(
            "SEV-SNP report: the size is wrong",
            expected=f"{snp.REPORT_SIZE} bytes",
            found=f"{len(blob)} bytes",
        )
    return "sev-snp-report", blob, SnpReport.decode(blob).report_data


def _tdx(blob: bytes) -> tuple[str, bytes, bytes]:
    if len(blob) > _MAX_TD_QUOTE:
        raise ProviderError(
            "configfs-tsm (tdx_guest): a quote of this size is of a format that is unsupported",
            expected=f"at most {_MAX_TD_QUOTE} bytes",
            found=f"{len(blob)} bytes",
            advice="Newer kernels give DICE or CBOR web token quotes so; DCAP quotes are read.",
        )
    quote = TdQuote.from_bytes(blob)  # refuses what follows the quote, unless it is zeros
    return "tdx-quote", blob[: len(quote.to_bytes())], quote.report_body.report_data


def _cca(blob: bytes) -> tuple[str, bytes, bytes]:
    claims = cca.RealmClaims.from_bytes(cca.CcaToken.from_bytes(blob).realm.payload)
    return "arm-cca-token", blob, claims.challenge


def table_files(table: bytes, report: bytes) -> dict[str, bytes]:
    """
    Return the certificates of an SEV-SNP host's table, as files for ``verify --endorsements``.

    The host writes the table: it is only a convenience, and verified like any other file.

    Args:
        table: The table.
        report: The report that came with it: it says which key signed.

    Raises:
        EvidenceFormatError: The table, or the report's size, is wrong.

    """
    parsed = CertificateTable.from_bytes(table)
    is_vlek = SnpReport.decode(report).signing_key == snp.KEY_VLEK
    vek = parsed.get(GUID_VLEK if is_vlek else GUID_VCEK)
    files = {} if vek is None else {"vek.der": vek}
    for guid, name in ((GUID_ASK, "ask.pem"), (GUID_ARK, "ark.pem")):
        found = parsed.get(guid)
        if found is not None:
            files[name] = encode_pem(found)
    return files
