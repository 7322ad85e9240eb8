"""
Endorsements: what vendors say about their hardware, and the other files beside a piece of evidence.

Nothing here is believed because it was given: the checks verify each file up to a pinned root. A
root among the files is no anchor. Two files are exceptions, because nothing signs them. Giving
``jwks.json`` says "I fetched these keys from the issuer that I chose", and a token of one of them
is believed; ``cpak-pub.json`` says the same of the attestation key of an Arm platform. Take them
from no folder that came with the token.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final, Self

from pyenclave._files import read_file
from pyenclave.errors import CollateralError

__all__ = ["EMPTY", "KNOWN_NAMES", "MAX_FILE", "MAX_TOTAL", "Endorsements"]

MAX_FILE: Final = 4 << 20  # bytes; the largest seen is an Intel CRL of a few hundred KiB
MAX_TOTAL: Final = 64 << 20
_MAX_ENTRIES: Final = 10_000  # of a folder

# Name → what it is. The names are those of the command line's --endorsements.
KNOWN_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        # Intel
        "tcb-info.json": "TCB info as the PCS answers it",
        "qe-identity.json": "identity of the quoting enclave, as the PCS answers it",
        "pck-crl.der": "revocation list of the PCK CA",
        "root-ca-crl.der": "revocation list of Intel's root CA",
        "pck-chain.pem": "PCK certificate and its CA, where the quote has none",
        "issuer-chain.pem": "issuer chain of TCB info and QE identity",
        # AMD
        "vek.der": "VCEK or VLEK",
        "ask.pem": "ASK, or ASVK for a VLEK",
        "ark.pem": "ARK; compared with the pinned one",
        "crl.der": "revocation list of AMD, or of an issuer of NVIDIA's",
        # Azure
        "td-quote.bin": "TD quote beside an HCL report",
        "runtime-data.json": "runtime data of an HCL report",
        "tpm-quote.msg": "TPMS_ATTEST",
        "tpm-quote.sig": "its signature",
        "tpm-pcrs.json": "PCR values",
        "tpm-eventlog.bin": "TCG event log of the vTPM",
        "ak-cert.pem": "certificate of the vTPM's attestation key, and its issuers",
        "ak-cert-nv.der": "the same, as read from the vTPM",
        # tokens
        "jwks.json": "keys of a token's issuer, which whoever gives them vouches for",
        "claims.json": "claims of a token, to try a release policy on",
        # Arm
        "cpak-pub.json": "attestation key of a CCA platform, which whoever gives it vouches for",
        # NVIDIA
        "cert-chain.pem": "certificate of the GPU's attestation key, and its issuers",
        # event logs
        "quote.bin": "the quote that an event log or certificate belongs to",
    }
)
_PATTERNS: Final = ("*-issuer-chain.pem",)


def _is_known(name: str) -> bool:
    return name in KNOWN_NAMES or any(fnmatchcase(name, pattern) for pattern in _PATTERNS)


def _size_error(name: str, size: int) -> CollateralError:
    return CollateralError(
        f"endorsement {name} is too large",
        expected=f"at most {MAX_FILE} bytes",
        found=f"{size} bytes",
    )


def _read(path: str | os.PathLike[str], name: str) -> bytes | None:
    """Read file *name* of a folder up to the limit; None if it is no regular file."""
    # O_NONBLOCK: opening a FIFO that stands under a known name must not wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(os.path.join(path, name), flags)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return None
        if found.st_size > MAX_FILE:
            raise _size_error(name, found.st_size)
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise _size_error(name, len(data))
    return data


@dataclass(frozen=True, slots=True)
class Endorsements:
    """
    Endorsements by file name.

    Attributes:
        files: Name → bytes; only names of `KNOWN_NAMES` and ``*-issuer-chain.pem``.
        ignored: Names in the folder that mean nothing here.
        items: The same as `files`, in a form that can be a key.
    """

    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    ignored: tuple[str, ...] = ()
    items: tuple[tuple[str, bytes], ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        copied: dict[str, bytes] = {}
        total = 0
        for name, data in self.files.items():
            if not isinstance(name, str):
                raise TypeError(f"the name of an endorsement is text, not {type(name).__name__}")
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"endorsement {name} is bytes, not {type(data).__name__}")
            if not _is_known(name):
                import difflib

                near = difflib.get_close_matches(name, KNOWN_NAMES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"no endorsement is called {name!r}{hint}")
            if len(data) > MAX_FILE:
                raise _size_error(name, len(data))
            total += len(data)
            if total > MAX_TOTAL:
                raise CollateralError("endorsements are too large", expected=f"{MAX_TOTAL} bytes")
            copied[name] = bytes(data)
        object.__setattr__(self, "files", MappingProxyType(copied))
        object.__setattr__(self, "items", tuple(copied.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes have it: the view of the files does not pickle."""
        return type(self), (dict(self.files), self.ignored)

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> Self:
        """
        Return the endorsements in *files*, by the names of `KNOWN_NAMES`.

        Raises:
            CollateralError: Too large.
            ValueError: An unknown name: a misspelt one would silently skip its checks.

        """
        if not isinstance(files, Mapping):
            raise TypeError(f"endorsements are a mapping, not {type(files).__name__}")
        return cls(files)

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> Self:
        """
        Read the regular files with known names in folder *path*.

        Raises:
            CollateralError: A known file, or all of them, too large; or far too many files.
            OSError: The folder or a known file cannot be read.

        """
        files: dict[str, bytes] = {}
        ignored: list[str] = []
        total = 0
        names = []
        with os.scandir(path) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > _MAX_ENTRIES:
                    raise CollateralError(
                        "the folder of endorsements has too many files", expected=_MAX_ENTRIES
                    )
        for name in sorted(names):
            data = _read(path, name) if _is_known(name) else None
            if data is None:
                ignored.append(name)
                continue
            files[name] = data
            total += len(data)
            if total > MAX_TOTAL:
                raise CollateralError("endorsements are too large", expected=f"{MAX_TOTAL} bytes")
        return cls(files, tuple(ignored))

    @classmethod
    def from_bundle(cls, data: bytes) -> Self:
        """
        Read a bundle, as ``pyenclave collateral fetch`` writes it.

        Raises:
            CollateralError: Not a bundle, or a file in it that has no known name.

        """
        from pyenclave.formats.bundle import Bundle

        files = Bundle.from_bytes(data).files
        for name in files:
            if not _is_known(name):
                raise CollateralError("bundle: not an endorsement", found=name)
        return cls(files)

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> Self:
        """
        Read a folder of endorsements, or a bundle file.

        Raises:
            CollateralError: As `from_dir` and `from_bundle`.
            OSError: It cannot be read.

        """
        if os.path.isdir(path):
            return cls.from_dir(path)
        from pyenclave.formats.bundle import MAX_SIZE

        data = read_file(path, limit=MAX_SIZE)
        if not data.lstrip().startswith(b"{"):
            raise CollateralError(
                f"{os.fspath(path)} is no bundle",
                expected="a bundle, or a folder of the vendor's files",
                found=f"a file that begins with {data[:8].hex()}",
                advice="Give the folder that it lies in.",
            )
        return cls.from_bundle(data)

    def get(self, name: str) -> bytes | None:
        """Return the bytes of *name*, or None if it was not given."""
        return self.files.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


EMPTY: Final = Endorsements()
