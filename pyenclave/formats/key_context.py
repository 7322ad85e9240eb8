"""
The context of a vault's key ↔ bytes: what a wrapped private half is bound to.

The vault writes it, the key-encryption backend authenticates it with the private half, and the
enclave that is such a backend reads it: so a database that was changed cannot make a key
exportable, give it another policy, or another key's name. ``docs/formats/wrapped-key.md`` has it
byte by byte.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final, Self

from pyenclave.errors import EvidenceFormatError

__all__ = ["KINDS", "MAX_CONTEXT", "KeyContext"]

KINDS: Final = ("RSA", "RSA-HSM", "EC", "EC-HSM", "oct", "oct-HSM")
MAX_CONTEXT: Final = 1024  # bytes
_MAGIC: Final = b"PYEKCTX\x01"
_NAME: Final = re.compile(r"[0-9A-Za-z-]{1,127}")
_VERSION: Final = re.compile(r"[0-9a-f]{32}")
_EXPORTABLE: Final = 1
_IMMUTABLE: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyContext:
    """
    What a private half is bound to.

    Attributes:
        name: The key's name.
        version: Its version, 32 hexadecimal digits.
        kty: ``RSA``, ``EC`` or ``oct``, with or without ``-HSM``.
        exportable: Whether it may be released at all.
        policy_hash: SHA-256 of its release policy (the JSON as it was given); None without one.
        immutable: Whether the policy can never be replaced.

    Raises:
        EvidenceFormatError: A member is not what it must be, or they contradict each other.

    """

    name: str
    version: str
    kty: str
    exportable: bool = False
    policy_hash: bytes | None = None
    immutable: bool = False

    def __post_init__(self) -> None:
        def wrong(what: str, found: object) -> EvidenceFormatError:
            return EvidenceFormatError(f"key context: {what}", found=repr(found)[:80])

        if not _NAME.fullmatch(self.name):
            raise wrong("the name", self.name)
        if not _VERSION.fullmatch(self.version):
            raise wrong("the version", self.version)
        if self.kty not in KINDS:
            raise wrong("the kind", self.kty)
        if self.policy_hash is not None and len(self.policy_hash) != 32:
            raise wrong("the policy's SHA-256", self.policy_hash)
        if self.exportable != (self.policy_hash is not None):
            raise wrong("exportable and a policy need each other", self.exportable)
        if self.immutable and self.policy_hash is None:
            raise wrong("an immutable policy that there is not", self.immutable)

    def to_bytes(self) -> bytes:
        """Return the one encoding of these members."""
        flags = _EXPORTABLE * self.exportable | _IMMUTABLE * self.immutable
        parts = (
            self.name.encode("ascii"),
            self.version.encode("ascii"),
            self.kty.encode("ascii"),
            bytes([flags]),
            self.policy_hash or b"",
        )
        return _MAGIC + b"".join(struct.pack("<H", len(part)) + part for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read what `to_bytes` wrote.

        Raises:
            EvidenceFormatError: Anything else.

        """
        if len(data) > MAX_CONTEXT or not data.startswith(_MAGIC):
            raise EvidenceFormatError("key context: not one", found=f"{len(data)} bytes")
        parts: list[bytes] = []
        at = len(_MAGIC)
        while at < len(data):
            end = at + 2 + int.from_bytes(data[at : at + 2], "little")
            parts.append(data[at + 2 : end])
            at = end
        try:
            name, version, kty = (part.decode("ascii") for part in parts[:3])
            flags, policy = parts[3:]
        except (ValueError, UnicodeDecodeError):
            raise EvidenceFormatError("key context: its parts", found=len(parts)) from None
        number = int.from_bytes(flags, "little")
        context = cls(
            name=name,
            version=version,
            kty=kty,
            exportable=bool(number & _EXPORTABLE),
            policy_hash=policy or None,
            immutable=bool(number & _IMMUTABLE),
        )
        if context.to_bytes() != data:  # another encoding: reserved flags, lengths beyond the end
            raise EvidenceFormatError("key context: not its one encoding")
        return context
