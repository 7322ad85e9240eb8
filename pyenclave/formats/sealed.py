"""
Sealed blobs: header ↔ bytes, no I/O and no cryptography.

The byte-exact description is ``docs/formats/blob.md``. The header is one fixed block; it names
the key by the parameters of an EGETKEY request (``KEYREQUEST``, Intel SDM vol. 3D; the project's
notes on SGX structures, 2.4) and never holds the key. Every field is authenticated; the fields are
still checked here one by one, because they choose the key with which they are checked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from pyenclave.errors import UnsealError

__all__ = [
    "HEADER_SIZE",
    "KEYNAME_SEAL",
    "KEYREQUEST_SIZE",
    "MAGIC",
    "MAX_DATA",
    "POLICY_ANY",
    "POLICY_MRENCLAVE",
    "POLICY_MRSIGNER",
    "TAG_SIZE",
    "SealedHeader",
    "split",
]

MAGIC: Final = b"PYESEAL\x01"
HEADER_SIZE: Final = 224
AUTHENTICATED_SIZE: Final = 192  # what the commitment covers; the commitment itself follows
TAG_SIZE: Final = 16
KEYREQUEST_SIZE: Final = 512
MAX_DATA: Final = (1 << 31) - 1 - TAG_SIZE  # bytes of plaintext, or of additional data

KEYNAME_SEAL: Final = 4
POLICY_ANY: Final = 0x0000
POLICY_MRENCLAVE: Final = 0x0001
POLICY_MRSIGNER: Final = 0x0002
_POLICIES: Final = (POLICY_MRENCLAVE, POLICY_MRSIGNER, POLICY_ANY)

_FLAG_AAD: Final = 0x0001
_FLAG_COUNTER: Final = 0x0002
_FLAG_DEBUG: Final = 0x0004
_KNOWN_FLAGS: Final = _FLAG_AAD | _FLAG_COUNTER | _FLAG_DEBUG

_HEADER = struct.Struct("<8s 8H 16s 16s I 4x 32s 32s 16s QQQ 24s 32s")
_KEYREQUEST = struct.Struct("<HHH2x16s16s32sIH434x")
if _HEADER.size != HEADER_SIZE or _KEYREQUEST.size != KEYREQUEST_SIZE:  # pragma: no cover
    raise AssertionError("layout of the blob header")


def _refuse(what: str, *, expected: object, found: object) -> UnsealError:
    return UnsealError(f"the sealed blob's {what} is wrong", expected=expected, found=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedHeader:
    """
    Header of a sealed blob. Lengths are in bytes.

    Attributes:
        key_policy: KEYPOLICY bits: one of the ``POLICY_`` constants.
        security_version: ISVSVN that an enclave needs at least to open the blob.
        product_id: ISVPRODID of the enclave that sealed.
        cpu_svn: 16 bytes, the platform's version at sealing.
        attribute_mask: 16 bytes; masked attributes enter the key (INIT and DEBUG always do).
        misc_mask: MISCMASK of the key request.
        key_id: 32 bytes, new for each blob.
        identity: 32 bytes, MRENCLAVE or MRSIGNER by the policy, zero when any enclave may open.
        debug: Sealed by a debug enclave.
        aad_length: Length of the additional data, or None if there is none at all.
        length: Length of the plaintext.
        counter_id: 16 bytes of the monotonic counter that dates this blob, or None.
        counter_value: The counter's value that makes this blob the current one.
        commitment: 32 bytes that commit to key, header and additional data.
    """

    key_policy: int
    security_version: int
    product_id: int
    cpu_svn: bytes
    attribute_mask: bytes
    misc_mask: int
    key_id: bytes
    identity: bytes
    debug: bool
    aad_length: int | None
    length: int
    counter_id: bytes | None = None
    counter_value: int = 0
    commitment: bytes = bytes(32)

    def to_bytes(self) -> bytes:
        """Return the 224 bytes of the header."""
        flags = (
            (_FLAG_AAD if self.aad_length is not None else 0)
            | (_FLAG_COUNTER if self.counter_id is not None else 0)
            | (_FLAG_DEBUG if self.debug else 0)
        )
        return _HEADER.pack(
            MAGIC,
            flags,
            KEYNAME_SEAL,
            self.key_policy,
            self.security_version,
            0,
            self.product_id,
            HEADER_SIZE,
            0,
            self.cpu_svn,
            self.attribute_mask,
            self.misc_mask,
            self.key_id,
            self.identity,
            self.counter_id or bytes(16),
            self.counter_value,
            self.aad_length or 0,
            self.length,
            bytes(24),
            self.commitment,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Parse a header and check every field that has only some legal values.

        Raises:
            UnsealError: Not a header of this version, or a field is impossible.

        """
        if len(data) < HEADER_SIZE:
            raise _refuse("size", expected=f"at least {HEADER_SIZE} bytes", found=len(data))
        (
            magic,
            flags,
            keyname,
            key_policy,
            security_version,
            config_svn,
            product_id,
            header_size,
            reserved,
            cpu_svn,
            attribute_mask,
            misc_mask,
            key_id,
            identity,
            counter_id,
            counter_value,
            aad_length,
            length,
            reserved_tail,
            commitment,
        ) = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise _refuse("magic or version", expected=MAGIC.hex(), found=magic.hex())
        checks: tuple[tuple[str, bool, object, object], ...] = (
            ("flags", not flags & ~_KNOWN_FLAGS, f"bits of {_KNOWN_FLAGS:#x}", f"{flags:#x}"),
            ("key name", keyname == KEYNAME_SEAL, KEYNAME_SEAL, keyname),
            ("key policy", key_policy in _POLICIES, _POLICIES, key_policy),
            ("CONFIGSVN", config_svn == 0, 0, config_svn),
            ("header size", header_size == HEADER_SIZE, HEADER_SIZE, header_size),
            (
                "reserved bytes",
                reserved == 0 and not any(reserved_tail) and not any(data[60:64]),
                "zero",
                "others",
            ),
            (
                "identity",
                any(identity) == (key_policy != POLICY_ANY),
                "an identity exactly where the policy names one",
                identity.hex(),
            ),
            (
                "counter",
                bool(flags & _FLAG_COUNTER) or (counter_value == 0 and not any(counter_id)),
                "zero without the counter flag",
                counter_value,
            ),
            (
                "additional data length",
                aad_length <= MAX_DATA and (bool(flags & _FLAG_AAD) or aad_length == 0),
                f"at most {MAX_DATA}, and zero without the flag",
                aad_length,
            ),
            ("length", length <= MAX_DATA, f"at most {MAX_DATA}", length),
        )
        for what, holds, expected, found in checks:
            if not holds:
                raise _refuse(what, expected=expected, found=found)
        return cls(
            key_policy=key_policy,
            security_version=security_version,
            product_id=product_id,
            cpu_svn=cpu_svn,
            attribute_mask=attribute_mask,
            misc_mask=misc_mask,
            key_id=key_id,
            identity=identity,
            debug=bool(flags & _FLAG_DEBUG),
            aad_length=aad_length if flags & _FLAG_AAD else None,
            length=length,
            counter_id=counter_id if flags & _FLAG_COUNTER else None,
            counter_value=counter_value,
            commitment=commitment,
        )

    def key_request(self) -> bytes:
        """Return the 512-byte KEYREQUEST that names this blob's key."""
        return _KEYREQUEST.pack(
            KEYNAME_SEAL,
            self.key_policy,
            self.security_version,
            self.cpu_svn,
            self.attribute_mask,
            self.key_id,
            self.misc_mask,
            0,
        )


def split(blob: bytes | memoryview) -> tuple[SealedHeader, memoryview]:
    """
    Split *blob* into its header and the ciphertext with its tag.

    Raises:
        UnsealError: The header is wrong, or the lengths do not add up exactly.

    """
    view = memoryview(blob).cast("B")
    header = SealedHeader.from_bytes(bytes(view[:HEADER_SIZE]))
    whole = HEADER_SIZE + header.length + TAG_SIZE
    if len(view) != whole:
        raise _refuse("size", expected=f"{whole} bytes", found=len(view))
    return header, view[HEADER_SIZE:]
