"""What a provider gives: evidence, the files that belong beside it, and what it binds."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pyenclave.errors import BindingError, EvidenceFormatError, ProviderError

__all__ = [
    "REPORT_DATA_SIZE",
    "Evidence",
    "demand_bound",
    "report_data_of",
]

REPORT_DATA_SIZE: Final = 64

# Kind (a name of `attestation.kinds`) → the file's name in a folder of evidence.
_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sgx-quote": "quote.bin",
        "tdx-quote": "quote.bin",
        "sev-snp-report": "report.bin",
        "azure-hcl-snp": "hcl-report.bin",
        "azure-hcl-tdx": "hcl-report.bin",
        "nitro-document": "document.cbor",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """
    Evidence of this machine.

    Attributes:
        kind: Which kind it is, as `pyenclave.verify` tells it from the bytes.
        evidence: Its bytes.
        auxiliary: What the device gave with it, as it came: the certificate table of an SEV-SNP
            host, for instance. Empty otherwise.
        report_data: The 64 bytes that the hardware signed, read from the evidence; None where the
            kind has none (Nitro).
        endorsements: The files beside it by their names for ``verify --endorsements``.
        nonce: The challenge that it answers.
        user_data: What else the caller had bound, where the kind has a place for it.
        provider: Where it came from.
    """

    kind: str
    evidence: bytes = field(repr=False)
    auxiliary: bytes = field(default=b"", repr=False)
    report_data: bytes | None = None
    endorsements: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    nonce: bytes = b""
    user_data: bytes | None = None
    provider: str = ""

    @property
    def file_name(self) -> str:
        """The name of the evidence in a folder of its own."""
        return _FILES.get(self.kind, "evidence.bin")

    def to_bytes(self) -> bytes:
        """Return the bytes of the evidence."""
        return self.evidence

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """
        Write the evidence and the files beside it into *folder*, as ``verify`` reads them.

        Args:
            folder: Made if it is not there; files in it are never replaced.

        Returns:
            The evidence's path.

        Raises:
            FileExistsError: One of the files is there already.
            OSError: It cannot be written.

        """
        top = Path(folder)
        top.mkdir(parents=True, exist_ok=True)
        for name, data in {**self.endorsements, self.file_name: self.evidence}.items():
            with open(top / name, "xb") as file:
                file.write(data)
        return top / self.file_name


def report_data_of(nonce: bytes, report_data: bytes | None) -> bytes:
    """
    Return the 64 bytes that the hardware has to sign.

    Args:
        nonce: The relying party's challenge.
        report_data: The bytes themselves, for who derived them from nonce and more.

    Raises:
        ValueError: Another length, or nothing to bind.

    """
    if report_data is not None:
        if len(report_data) != REPORT_DATA_SIZE:
            raise ValueError(
                f"report data has exactly {REPORT_DATA_SIZE} bytes, not {len(report_data)}: "
                "hash what is longer, and pad what is shorter"
            )
        return bytes(report_data)
    if len(nonce) > REPORT_DATA_SIZE:
        raise ValueError(
            f"a nonce of {len(nonce)} bytes does not fit into {REPORT_DATA_SIZE} bytes of report "
            "data: hash it, and give the hash as report_data"
        )
    if not any(nonce):
        raise ValueError("give a nonce or report data: evidence that binds nothing is old at once")
    return nonce.ljust(REPORT_DATA_SIZE, b"\0")


def demand_bound(evidence: Evidence, wanted: bytes) -> Evidence:
    """
    Return *evidence* if the hardware signed the *wanted* report data.

    Raises:
        BindingError: It signed other data.

    """
    found = evidence.report_data or b""
    if hmac.compare_digest(found, wanted):
        return evidence
    raise BindingError(
        f"{evidence.provider}: the evidence binds other report data",
        expected=wanted.hex(),
        found=found.hex(),
        advice="It answers another request, or is a recording.",
        evidence=evidence,
    )


def malformed(provider: str, error: EvidenceFormatError) -> ProviderError:
    """Return the error for what a device gave and nobody can read."""
    return ProviderError(f"{provider} gave no evidence that can be read: {error}")
