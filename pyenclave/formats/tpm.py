"""
TPM 2.0 structures of a quote: TPMS_ATTEST, TPMT_SIGNATURE, TPMT_PUBLIC, PCR selections and values.

Layouts of the TCG's TPM 2.0 Library, part 2 (10.12, 11.3, 12.2). All integers are big-endian.
Nothing is verified here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jsonstrict

__all__ = [
    "ALG_ECC",
    "ALG_ECDSA",
    "ALG_NULL",
    "ALG_RSA",
    "ALG_RSAPSS",
    "ALG_RSASSA",
    "HASHES",
    "MAX_PCR",
    "PcrSelection",
    "TpmCertification",
    "TpmPublic",
    "TpmQuote",
    "TpmSignature",
    "pcr_digest",
    "read_pcr_values",
]

ALG_RSA: Final = 0x0001
ALG_NULL: Final = 0x0010
ALG_RSASSA: Final = 0x0014
ALG_RSAPSS: Final = 0x0016
ALG_ECDSA: Final = 0x0018
ALG_ECC: Final = 0x0023
#: TPM_ALG_ID of each hash that is understood, and its name.
HASHES: Final[Mapping[int, str]] = {
    0x0004: "sha1",
    0x000B: "sha256",
    0x000C: "sha384",
    0x000D: "sha512",
}
_HASH_IDS: Final = {name: number for number, name in HASHES.items()}

MAX_PCR: Final = 32  # four bytes of selection; PC clients have 24
_MAGIC: Final = 0xFF544347  # TPM_GENERATED_VALUE
_TYPE_QUOTE: Final = 0x8018  # TPM_ST_ATTEST_QUOTE
_TYPE_CERTIFY: Final = 0x8017  # TPM_ST_ATTEST_CERTIFY
_CLOCK_SIZE: Final = 25  # TPMS_CLOCK_INFO and the version of the firmware
_MAX_SIZE: Final = 4096
_MAX_BANKS: Final = 16
_MAX_PCRS_FILE: Final = 1 << 16


class _Cursor:
    """Takes big-endian parts off the front of bytes."""

    __slots__ = ("_data", "_offset", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        if len(data) > _MAX_SIZE:
            raise EvidenceFormatError(
                f"{what} is too long", expected=f"at most {_MAX_SIZE} bytes", found=len(data)
            )
        self._data = bytes(data)
        self._what = what
        self._offset = 0

    def take(self, size: int, name: str) -> bytes:
        left = len(self._data) - self._offset
        if size > left:
            raise EvidenceFormatError(
                f"{self._what}: {name} at offset {self._offset} does not fit",
                expected=f"{size} bytes",
                found=f"{left} bytes",
            )
        part = self._data[self._offset : self._offset + size]
        self._offset += size
        return part

    def number(self, size: int, name: str) -> int:
        return int.from_bytes(self.take(size, name), "big")

    def sized(self, name: str) -> bytes:
        """Take a TPM2B: two bytes of size, then that many."""
        return self.take(self.number(2, f"size of {name}"), name)

    def demand(self, name: str, wanted: int, size: int) -> None:
        found = self.number(size, name)
        if found != wanted:
            raise self.wrong(name, f"{wanted:#x}", f"{found:#x}")

    def wrong(self, name: str, expected: object, found: object) -> EvidenceFormatError:
        return EvidenceFormatError(f"{self._what}: {name} is wrong", expected=expected, found=found)

    def hash_name(self, name: str) -> str:
        found = self.number(2, name)
        if found not in HASHES:
            raise self.wrong(name, "a hash that is known", f"{found:#x}")
        return HASHES[found]

    def end(self) -> None:
        left = len(self._data) - self._offset
        if left:
            raise EvidenceFormatError(
                f"{self._what}: bytes follow the end", expected="nothing", found=f"{left} bytes"
            )


def _sized(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """
    Selected PCRs of one bank.

    Attributes:
        bank: Name of the hash: sha1, sha256, sha384 or sha512.
        indices: Ascending.
        size: Bytes of the bitmap, 1 to 4.
    """

    bank: str
    indices: tuple[int, ...]
    size: int = 3

    @property
    def bank_id(self) -> int:
        """TPM_ALG_ID of the bank."""
        return _HASH_IDS[self.bank]

    def to_bytes(self) -> bytes:
        """Write a TPMS_PCR_SELECTION."""
        bits = sum(1 << index for index in self.indices)
        return (
            self.bank_id.to_bytes(2, "big")
            + bytes([self.size])
            + bits.to_bytes(self.size, "little")
        )


def _selections(cursor: _Cursor) -> tuple[PcrSelection, ...]:
    count = cursor.number(4, "number of PCR selections")
    if count > _MAX_BANKS:
        raise cursor.wrong("number of PCR selections", f"at most {_MAX_BANKS}", count)
    found = []
    for _ in range(count):
        bank = cursor.hash_name("PCR bank")
        size = cursor.number(1, "size of the PCR selection")
        if not 1 <= size <= MAX_PCR // 8:
            raise cursor.wrong("size of the PCR selection", "1 to 4 bytes", size)
        bits = int.from_bytes(cursor.take(size, "PCR selection"), "little")
        indices = tuple(index for index in range(8 * size) if bits >> index & 1)
        found.append(PcrSelection(bank, indices, size))
    banks = [item.bank for item in found]
    if len(set(banks)) != len(banks):
        raise cursor.wrong("PCR selection", "each bank once", banks)
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmQuote:
    """
    A TPMS_ATTEST of type TPM_ST_ATTEST_QUOTE.

    Attributes:
        qualified_signer: Qualified name of the key that signed.
        extra_data: What the caller gave: the nonce.
        clock: Milliseconds that the TPM was powered.
        reset_count: Number of TPM resets.
        restart_count: Number of restarts and resumes.
        safe: Whether no higher clock value was reported before.
        firmware: Version of the firmware.
        selections: The quoted PCRs.
        pcr_digest: Hash over their values, in the hash of the signing scheme.
    """

    qualified_signer: bytes
    extra_data: bytes
    clock: int = 0
    reset_count: int = 0
    restart_count: int = 0
    safe: bool = True
    firmware: int = 0
    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> TpmQuote:
        """
        Read a TPMS_ATTEST, without a size in front.

        Raises:
            EvidenceFormatError: Not made by a TPM (magic), no quote (type), or malformed.
        """
        cursor = _Cursor(data, "TPMS_ATTEST")
        cursor.demand("magic", _MAGIC, 4)
        cursor.demand("type", _TYPE_QUOTE, 2)
        signer = cursor.sized("qualifiedSigner")
        extra = cursor.sized("extraData")
        clock, resets, restarts = (cursor.number(size, "clockInfo") for size in (8, 4, 4))
        safe = cursor.number(1, "clockInfo.safe")
        if safe > 1:
            raise cursor.wrong("clockInfo.safe", "0 or 1", safe)
        firmware = cursor.number(8, "firmwareVersion")
        selections = _selections(cursor)
        digest = cursor.sized("pcrDigest")
        cursor.end()
        return cls(
            qualified_signer=signer,
            extra_data=extra,
            clock=clock,
            reset_count=resets,
            restart_count=restarts,
            safe=bool(safe),
            firmware=firmware,
            selections=selections,
            pcr_digest=digest,
        )

    def to_bytes(self) -> bytes:
        """Write the TPMS_ATTEST."""
        return b"".join(
            (
                _MAGIC.to_bytes(4, "big"),
                _TYPE_QUOTE.to_bytes(2, "big"),
                _sized(self.qualified_signer),
                _sized(self.extra_data),
                self.clock.to_bytes(8, "big"),
                self.reset_count.to_bytes(4, "big"),
                self.restart_count.to_bytes(4, "big"),
                bytes([self.safe]),
                self.firmware.to_bytes(8, "big"),
                len(self.selections).to_bytes(4, "big"),
                *(selection.to_bytes() for selection in self.selections),
                _sized(self.pcr_digest),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmCertification:
    """
    A TPMS_ATTEST of type TPM_ST_ATTEST_CERTIFY: a key of this TPM has this name.

    Attributes:
        qualified_signer: Qualified name of the key that signed.
        extra_data: What the caller gave.
        name: Name of the key that is certified: the hash of its public area.
        qualified_name: The same, with its parents.
    """

    qualified_signer: bytes = b""
    extra_data: bytes = b""
    name: bytes
    qualified_name: bytes = b""

    @classmethod
    def from_bytes(cls, data: bytes) -> TpmCertification:
        """
        Read a TPMS_ATTEST, without a size in front.

        Raises:
            EvidenceFormatError: Not made by a TPM (magic), no certification (type), or malformed.
        """
        cursor = _Cursor(data, "TPMS_ATTEST")
        cursor.demand("magic", _MAGIC, 4)
        cursor.demand("type", _TYPE_CERTIFY, 2)
        signer = cursor.sized("qualifiedSigner")
        extra = cursor.sized("extraData")
        cursor.take(_CLOCK_SIZE, "clockInfo and firmwareVersion")
        name = cursor.sized("name")
        qualified = cursor.sized("qualifiedName")
        cursor.end()
        return cls(qualified_signer=signer, extra_data=extra, name=name, qualified_name=qualified)

    def to_bytes(self) -> bytes:
        """Write the TPMS_ATTEST; clock and firmware version are zero."""
        return b"".join(
            (
                _MAGIC.to_bytes(4, "big"),
                _TYPE_CERTIFY.to_bytes(2, "big"),
                _sized(self.qualified_signer),
                _sized(self.extra_data),
                bytes(_CLOCK_SIZE),
                _sized(self.name),
                _sized(self.qualified_name),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmSignature:
    """
    A TPMT_SIGNATURE of RSASSA, RSAPSS or ECDSA.

    Attributes:
        scheme: ALG_RSASSA, ALG_RSAPSS or ALG_ECDSA.
        hash: Name of the hash.
        value: The signature of RSA; R and S, equally wide, of ECDSA.
    """

    scheme: int = ALG_RSASSA
    hash: str = "sha256"
    value: bytes

    @classmethod
    def from_bytes(cls, data: bytes, *, raw_size: int | None = None) -> TpmSignature:
        """
        Read a signature.

        Args:
            data: A TPMT_SIGNATURE, or the bare RSASSA signature with SHA-256.
            raw_size: Bytes of a bare signature: the size of the key's modulus.

        Raises:
            EvidenceFormatError: Another scheme or hash, or malformed.
        """
        if raw_size is not None and len(data) == raw_size:
            return cls(value=bytes(data))
        cursor = _Cursor(data, "TPMT_SIGNATURE")
        scheme = cursor.number(2, "sigAlg")
        if scheme not in (ALG_RSASSA, ALG_RSAPSS, ALG_ECDSA):
            raise cursor.wrong("sigAlg", "RSASSA, RSAPSS or ECDSA", f"{scheme:#x}")
        name = cursor.hash_name("hash")
        value = cursor.sized("signature")
        if scheme == ALG_ECDSA:
            second = cursor.sized("signature S")
            width = max(len(value), len(second))
            value = value.rjust(width, b"\0") + second.rjust(width, b"\0")
        cursor.end()
        return cls(scheme=scheme, hash=name, value=value)

    def to_bytes(self) -> bytes:
        """Write the TPMT_SIGNATURE."""
        head = self.scheme.to_bytes(2, "big") + _HASH_IDS[self.hash].to_bytes(2, "big")
        if self.scheme != ALG_ECDSA:
            return head + _sized(self.value)
        half = len(self.value) // 2
        return head + _sized(self.value[:half]) + _sized(self.value[half:])


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmPublic:
    """
    A TPMT_PUBLIC of an RSA or ECC key.

    Attributes:
        type: ALG_RSA or ALG_ECC.
        name_hash: The hash of the key's name.
        attributes: TPMA_OBJECT.
        auth_policy: Policy digest, or empty.
        symmetric: Algorithm, key bits and mode of the protection of children; only ALG_NULL
            stands alone.
        scheme: Signing scheme, or ALG_NULL.
        scheme_hash: Name of its hash, ``None`` with ALG_NULL.
        bits: Bits of an RSA modulus, or the TPM_ECC_CURVE.
        exponent: RSA's; 0 stands for 65537.
        unique: The modulus, or X and Y, equally wide.
    """

    type: int = ALG_RSA
    name_hash: str = "sha256"
    attributes: int
    auth_policy: bytes = b""
    symmetric: tuple[int, ...] = (ALG_NULL,)
    scheme: int = ALG_RSASSA
    scheme_hash: str | None = "sha256"
    bits: int = 2048
    exponent: int = 0
    unique: bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> TpmPublic:
        """
        Read a TPMT_PUBLIC, without a size in front.

        Raises:
            EvidenceFormatError: Another type, scheme or hash, or malformed.
        """
        cursor = _Cursor(data, "TPMT_PUBLIC")
        kind = cursor.number(2, "type")
        if kind not in (ALG_RSA, ALG_ECC):
            raise cursor.wrong("type", "RSA or ECC", f"{kind:#x}")
        name_hash = cursor.hash_name("nameAlg")
        attributes = cursor.number(4, "objectAttributes")
        policy = cursor.sized("authPolicy")
        symmetric: tuple[int, ...] = (cursor.number(2, "symmetric"),)
        if symmetric != (ALG_NULL,):
            symmetric += (cursor.number(2, "keyBits"), cursor.number(2, "mode"))
        scheme = cursor.number(2, "scheme")
        if scheme not in (ALG_NULL, ALG_RSASSA, ALG_RSAPSS, ALG_ECDSA):
            raise cursor.wrong("scheme", "RSASSA, RSAPSS, ECDSA or none", f"{scheme:#x}")
        scheme_hash = None if scheme == ALG_NULL else cursor.hash_name("hash of the scheme")
        bits = cursor.number(2, "keyBits or curve")
        exponent = 0
        if kind == ALG_RSA:
            exponent = cursor.number(4, "exponent")
        else:
            cursor.demand("kdf", ALG_NULL, 2)
        unique = cursor.sized("unique")
        if kind == ALG_ECC:
            second = cursor.sized("unique Y")
            if len(second) != len(unique):  # padded here, the key would get another name
                raise cursor.wrong("unique Y", f"{len(unique)} bytes", f"{len(second)} bytes")
            unique += second
        elif len(unique) * 8 != bits:
            raise cursor.wrong("unique", f"{bits} bits", f"{len(unique)} bytes")
        cursor.end()
        return cls(
            type=kind,
            name_hash=name_hash,
            attributes=attributes,
            auth_policy=policy,
            symmetric=symmetric,
            scheme=scheme,
            scheme_hash=scheme_hash,
            bits=bits,
            exponent=exponent,
            unique=unique,
        )

    def to_bytes(self) -> bytes:
        """Write the TPMT_PUBLIC."""
        words = [*self.symmetric, self.scheme]
        if self.scheme_hash is not None:
            words.append(_HASH_IDS[self.scheme_hash])
        words.append(self.bits)
        tail = b"".join(word.to_bytes(2, "big") for word in words)
        if self.type == ALG_RSA:
            tail += self.exponent.to_bytes(4, "big") + _sized(self.unique)
        else:
            half = len(self.unique) // 2
            tail += ALG_NULL.to_bytes(2, "big")
            tail += _sized(self.unique[:half]) + _sized(self.unique[half:])
        return b"".join(
            (
                self.type.to_bytes(2, "big"),
                _HASH_IDS[self.name_hash].to_bytes(2, "big"),
                self.attributes.to_bytes(4, "big"),
                _sized(self.auth_policy),
                tail,
            )
        )

    @property
    def name(self) -> bytes:
        """The key's name: its hash algorithm, then the hash of the public area (part 1, 16)."""
        digest = hashlib.new(self.name_hash, self.to_bytes()).digest()
        return _HASH_IDS[self.name_hash].to_bytes(2, "big") + digest


PcrValues = Mapping[str, Mapping[int, bytes]]


def read_pcr_values(data: bytes) -> PcrValues:
    """
    Read PCR values: JSON ``{"sha256": {"0": "hex", …}}``, banks by the names of their hashes.

    Raises:
        EvidenceFormatError: Malformed, an unknown bank, no index of a PCR, or a wrong length.
    """
    what = "PCR values"
    banks = jsonstrict.object_of(data, what, max_depth=2, max_size=_MAX_PCRS_FILE)
    found: dict[str, dict[int, bytes]] = {}
    for bank, values in banks.items():
        if bank not in _HASH_IDS or not isinstance(values, dict):
            raise EvidenceFormatError(
                f"{what}: a bank is wrong", expected=", ".join(_HASH_IDS), found=bank[:40]
            )
        found[bank] = dict(_pcr(bank, *item) for item in values.items())
    return found


def _pcr(bank: str, index: str, value: object) -> tuple[int, bytes]:
    # "07" and "7" would be one PCR twice: only the plain decimal form is an index.
    if index not in _INDICES:
        raise EvidenceFormatError(
            "PCR values: no index of a PCR", expected=f"0 to {MAX_PCR - 1}", found=index[:40]
        )
    size = 2 * hashlib.new(bank, usedforsecurity=False).digest_size
    if not isinstance(value, str) or len(value) != size or not set(value) <= _HEX:
        raise EvidenceFormatError(
            f"PCR values: PCR {index} of {bank} is wrong", expected=f"{size} hexadecimal digits"
        )
    return int(index), bytes.fromhex(value)


_INDICES: Final = frozenset(str(index) for index in range(MAX_PCR))
_HEX: Final = frozenset("0123456789abcdefABCDEF")


def pcr_digest(
    values: PcrValues, selections: tuple[PcrSelection, ...], hash_name: str
) -> bytes | None:
    """
    Return the digest over the selected *values* (part 3, 18.4), ``None`` if one is not there.

    Args:
        values: From `read_pcr_values`.
        selections: From the quote: the order of the banks counts.
        hash_name: The hash of the signing scheme.
    """
    digest = hashlib.new(hash_name)
    for selection in selections:
        bank = values.get(selection.bank, {})
        for index in selection.indices:
            if index not in bank:
                return None
            digest.update(bank[index])
    return digest.digest()
