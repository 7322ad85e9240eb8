"""
X.509 certificates and revocation lists (RFC 5280), read strictly and only as far as vendors' go.

Nothing is verified here. `Certificate.tbs` and `Crl.tbs` are the exact signed bytes; names are
compared as DER. A structure that is not DER, occurs twice or contradicts itself is refused; what an
extension means is read when it is asked for.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_public_key

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der
from pyenclave.formats.der import Der

__all__ = [
    "AlgorithmId",
    "BasicConstraints",
    "Certificate",
    "Crl",
    "Extension",
    "Name",
    "encode_pem",
    "pem_blocks",
]

OID_SUBJECT_KEY_ID: Final = "2.5.29.14"
OID_KEY_USAGE: Final = "2.5.29.15"
OID_BASIC_CONSTRAINTS: Final = "2.5.29.19"
OID_CRL_NUMBER: Final = "2.5.29.20"
OID_AUTHORITY_KEY_ID: Final = "2.5.29.35"
OID_COMMON_NAME: Final = "2.5.4.3"

MAX_CERTIFICATE: Final = 1 << 16
MAX_CHAIN: Final = 16
MAX_CRL: Final = 4 << 20

#: What stands before X and Y in the SubjectPublicKeyInfo of a P-256 key (RFC 5480).
P256_SPKI: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")

_KEY_USAGES: Final = (
    "digitalSignature",
    "contentCommitment",
    "keyEncipherment",
    "dataEncipherment",
    "keyAgreement",
    "keyCertSign",
    "cRLSign",
    "encipherOnly",
    "decipherOnly",
)
_SHORT: Final = {
    "2.5.4.3": "CN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
}
_TEXTS: Final = {0x0C: "utf-8", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", 0x1E: "utf-16-be"}


@dataclass(frozen=True, slots=True)
class AlgorithmId:
    """AlgorithmIdentifier: the dotted object identifier, and its parameters as DER."""

    oid: str
    parameters: bytes | None


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension; ``value`` is what is inside its OCTET STRING."""

    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True)
class BasicConstraints:
    """Whether it is a CA, and how many CAs may follow below it."""

    ca: bool
    path_length: int | None


@dataclass(frozen=True, slots=True)
class Name:
    """A distinguished name: object identifiers and texts, in their order."""

    attributes: tuple[tuple[str, str], ...]

    @property
    def common_name(self) -> str | None:
        """The common name, if there is exactly one."""
        found = [text for oid, text in self.attributes if oid == OID_COMMON_NAME]
        return found[0] if len(found) == 1 else None

    @property
    def text(self) -> str:
        """A form for people: ``CN=…,O=…``."""
        return ",".join(f"{_SHORT.get(oid, oid)}={text}" for oid, text in self.attributes)

    @classmethod
    def from_bytes(cls, data: bytes) -> Name:
        """
        Read a DER Name.

        Raises:
            EvidenceFormatError: Malformed.

        """
        outer = Der(data, "distinguished name")
        names = outer.sequence()
        outer.end()
        found: list[tuple[str, str]] = []
        while names.more:
            relative = names.read(der.SET)
            while relative.more:
                pair = relative.sequence()
                oid = pair.oid()
                tag = pair.tag or 0
                value = pair.content(tag)
                pair.end()
                try:
                    text = value.decode(_TEXTS[tag]) if tag in _TEXTS else value.hex()
                except UnicodeDecodeError:
                    raise pair.fail("a name is no text of its type") from None
                found.append((oid, text))
        return cls(tuple(found))


def _algorithm(cursor: Der) -> AlgorithmId:
    inner = cursor.sequence()
    oid = inner.oid()
    parameters = inner.element() if inner.more else None
    inner.end()
    return AlgorithmId(oid, parameters)


def _extensions(cursor: Der) -> Mapping[str, Extension]:
    """Read SEQUENCE OF Extension; one that occurs twice is refused."""
    found: dict[str, Extension] = {}
    items = cursor.sequence()
    cursor.end()
    while items.more:
        item = items.sequence()
        oid = item.oid()
        # DER leaves a default FALSE out; certificates that write it exist, and it says the same.
        critical = item.boolean() if item.tag == der.BOOLEAN else False
        value = item.octet_string()
        item.end()
        if oid in found:
            raise item.fail("an extension occurs twice", found=oid)
        found[oid] = Extension(critical, value)
    return MappingProxyType(found)


def _signed(data: bytes, what: str) -> tuple[bytes, Der, AlgorithmId, bytes]:
    """Read SIGNED{}: the signed bytes, a cursor into them, the algorithm and the signature."""
    outer = Der(data, what)
    body = outer.sequence()
    outer.end()
    tbs = body.element(der.SEQUENCE)
    algorithm = _algorithm(body)
    signature = body.bit_string()
    body.end()
    inner = Der(tbs, what).sequence()
    return tbs, inner, algorithm, signature


def _key_id(extensions: Mapping[str, Extension]) -> bytes | None:
    found = extensions.get(OID_AUTHORITY_KEY_ID)
    if found is None:
        return None
    outer = Der(found.value, "authority key identifier")
    body = outer.sequence()
    outer.end()
    return body.content(0x80) if body.tag == 0x80 else None


@lru_cache(maxsize=256)
def _load_key(spki: bytes) -> Any:
    return load_der_public_key(spki)


@lru_cache(maxsize=256)
def _read_name(name: bytes) -> Name:
    return Name.from_bytes(name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certificate:
    """
    An X.509 certificate.

    Attributes:
        der: The whole certificate.
        tbs: What is signed.
        version: 1 to 3.
        issuer: DER of the issuer's name; `issuer_name` reads it.
        subject: DER of the subject's name.
        spki: DER of the SubjectPublicKeyInfo.
        mark: What the reader knows of it besides.
    """

    der: bytes
    tbs: bytes = field(repr=False)
    version: int
    serial: int
    issuer: bytes = field(repr=False)
    subject: bytes = field(repr=False)
    not_before: datetime
    not_after: datetime
    spki: bytes = field(repr=False)
    signature_algorithm: AlgorithmId
    signature: bytes = field(repr=False)
    extensions: Mapping[str, Extension] = field(repr=False)
    mark: Any = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Certificate) and self.der == other.der

    def __hash__(self) -> int:
        return hash(self.der)

    @classmethod
    def from_der(cls, data: bytes) -> Certificate:
        """
        Read a certificate.

        Raises:
            EvidenceFormatError: Not a certificate in DER, or larger than 64 KiB.

        """
        _capped(data, MAX_CERTIFICATE, "certificate")
        data = bytes(data)
        tbs, body, algorithm, signature = _signed(data, "certificate")
        version = 1
        explicit = body.optional(der.context(0))
        if explicit is not None:
            version = explicit.integer() + 1
            explicit.end()
            if version not in (2, 3):
                raise body.fail("unknown version of certificates", found=version)
        # RFC 5280 wants 1 to 20 bytes and positive; AMD's chip certificates have zero.
        serial = body.integer(nonneg=True)
        if serial >> 160:
            raise body.fail("the serial number has more than 20 bytes")
        if _algorithm(body) != algorithm:
            raise body.fail("the two signature algorithms differ")
        issuer = body.element(der.SEQUENCE)
        validity = body.sequence()
        not_before, not_after = validity.time(), validity.time()
        validity.end()
        subject = body.element(der.SEQUENCE)
        spki = body.element(der.SEQUENCE)
        for tag in (der.context(1, constructed=False), der.context(2, constructed=False)):
            body.optional(tag)
        wrapped = body.optional(der.context(3))
        extensions: Mapping[str, Extension] = MappingProxyType({})
        if wrapped is not None:
            if version != 3:
                raise body.fail("extensions in a certificate of version", expected=3, found=version)
            extensions = _extensions(wrapped)
        body.end()
        return cls(
            der=data,
            tbs=tbs,
            version=version,
            serial=serial,
            issuer=issuer,
            subject=subject,
            not_before=not_before,
            not_after=not_after,
            spki=spki,
            signature_algorithm=algorithm,
            signature=signature,
            extensions=extensions,
        )

    @classmethod
    def from_pem_chain(cls, data: bytes, *, limit: int = MAX_CHAIN) -> tuple[Certificate, ...]:
        """
        Read PEM certificates in their order; one NUL byte and white space may follow.

        Args:
            data: The text.
            limit: How many there may be.

        Raises:
            EvidenceFormatError: None, too many, or anything between them that is no certificate.

        """
        blocks = pem_blocks(data, "CERTIFICATE", limit=limit)
        return tuple(cls.from_der(block) for block in blocks)

    @classmethod
    def from_bytes(cls, data: bytes) -> Certificate:
        """
        Read one certificate in DER or PEM.

        Raises:
            EvidenceFormatError: Neither, or several.

        """
        if bytes(data[:11]).lstrip().startswith(b"-----"):
            return cls.from_pem_chain(data, limit=1)[0]
        return cls.from_der(data)

    @property
    def subject_name(self) -> Name:
        """The subject's name."""
        return _read_name(self.subject)

    @property
    def issuer_name(self) -> Name:
        """The issuer's name."""
        return _read_name(self.issuer)

    @property
    def common_name(self) -> str | None:
        """The subject's common name."""
        return self.subject_name.common_name

    @property
    def subject_text(self) -> str:
        """The subject for people."""
        return self.subject_name.text

    @property
    def issuer_text(self) -> str:
        """The issuer for people."""
        return self.issuer_name.text

    @property
    def spki_sha256(self) -> bytes:
        """SHA-256 of the SubjectPublicKeyInfo: what a pinned root is known by."""
        return hashlib.sha256(self.spki).digest()

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the whole certificate."""
        return hashlib.sha256(self.der).digest()

    @property
    def p256_point(self) -> bytes | None:
        """X and Y, 64 bytes, of a key that says it is one of P-256; whether it is, is not asked."""
        spki = self.spki
        return spki[27:] if len(spki) == 91 and spki.startswith(P256_SPKI) else None

    def public_key(self) -> Any:
        """
        Return the key as an object of ``cryptography``.

        Raises:
            EvidenceFormatError: No key, a point that is not on its curve, or an unknown kind.

        """
        try:
            return _load_key(self.spki)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise EvidenceFormatError(
                f"certificate of {self.subject_text}: its public key is not usable",
                found=str(error),
            ) from None

    @property
    def basic_constraints(self) -> BasicConstraints | None:
        """The extension of that name."""
        found = self.extensions.get(OID_BASIC_CONSTRAINTS)
        if found is None:
            return None
        outer = Der(found.value, "basic constraints")
        body = outer.sequence()
        outer.end()
        ca = body.boolean() if body.tag == der.BOOLEAN else False
        limit = body.integer(nonneg=True) if body.more else None
        body.end()
        return BasicConstraints(ca, limit)

    @property
    def key_usage(self) -> frozenset[str] | None:
        """What the key may be used for, by the names of RFC 5280, 4.2.1.3."""
        found = self.extensions.get(OID_KEY_USAGE)
        if found is None:
            return None
        outer = Der(found.value, "key usage")
        unused, content = outer.bits()
        outer.end()
        count = min(8 * len(content) - unused, len(_KEY_USAGES))
        return frozenset(
            name
            for index, name in enumerate(_KEY_USAGES[:count])
            if content[index // 8] & 0x80 >> index % 8
        )

    @property
    def authority_key_id(self) -> bytes | None:
        """The identifier of the key that signed it."""
        return _key_id(self.extensions)

    @property
    def subject_key_id(self) -> bytes | None:
        """The identifier of its own key."""
        found = self.extensions.get(OID_SUBJECT_KEY_ID)
        if found is None:
            return None
        outer = Der(found.value, "subject key identifier")
        value = outer.octet_string()
        outer.end()
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Crl:
    """
    A certificate revocation list.

    Attributes:
        der: The whole list.
        tbs: What is signed.
        next_update: When a newer one is due; ``None`` if it does not say.
        revoked: Serial numbers.
        extensions: Of the list. One of an entry that is critical is refused when reading.
    """

    der: bytes = field(repr=False)
    tbs: bytes = field(repr=False)
    version: int
    issuer: bytes = field(repr=False)
    this_update: datetime
    next_update: datetime | None
    revoked: frozenset[int] = field(repr=False)
    signature_algorithm: AlgorithmId
    signature: bytes = field(repr=False)
    extensions: Mapping[str, Extension] = field(repr=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> Crl:
        """
        Read a list in DER, PEM, or hexadecimal digits (as caching services hand it out).

        Raises:
            EvidenceFormatError: None of these, malformed, or larger than 4 MiB.

        """
        # In digits it is twice as long.
        _capped(data, 2 * MAX_CRL, "revocation list")
        raw = bytes(data)
        text = raw.strip()
        if text.startswith(b"-----"):
            (raw,) = pem_blocks(raw, "X509 CRL", limit=1, size=2 * MAX_CRL)
        elif text[:2] == b"30" and len(text) % 2 == 0:
            try:
                raw = binascii.unhexlify(text)
            except binascii.Error:
                raise EvidenceFormatError("revocation list: not hexadecimal digits") from None
        _capped(raw, MAX_CRL, "revocation list")
        return cls._from_der(raw)

    @classmethod
    def _from_der(cls, data: bytes) -> Crl:
        tbs, body, algorithm, signature = _signed(data, "revocation list")
        version = 1
        if body.tag == der.INTEGER:
            version = body.integer() + 1
            if version != 2:
                raise body.fail("unknown version of revocation lists", found=version)
        if _algorithm(body) != algorithm:
            raise body.fail("the two signature algorithms differ")
        issuer = body.element(der.SEQUENCE)
        this_update = body.time()
        next_update = body.time() if body.tag in (der.UTC_TIME, der.GENERALIZED_TIME) else None
        revoked: set[int] = set()
        entries = body.optional(der.SEQUENCE)
        while entries is not None and entries.more:
            entry = entries.sequence()
            revoked.add(entry.integer(nonneg=True))
            entry.time()
            if entry.more:
                for oid, extension in _extensions(entry).items():
                    if extension.critical:
                        raise entry.fail("an entry has a critical extension", found=oid)
        wrapped = body.optional(der.context(0))
        extensions = _extensions(wrapped) if wrapped is not None else MappingProxyType({})
        body.end()
        return cls(
            der=data,
            tbs=tbs,
            version=version,
            issuer=issuer,
            this_update=this_update,
            next_update=next_update,
            revoked=frozenset(revoked),
            signature_algorithm=algorithm,
            signature=signature,
            extensions=extensions,
        )

    @property
    def issuer_name(self) -> Name:
        """The issuer's name."""
        return _read_name(self.issuer)

    @property
    def issuer_text(self) -> str:
        """The issuer for people."""
        return self.issuer_name.text

    @property
    def crl_number(self) -> int | None:
        """The number of this issue."""
        found = self.extensions.get(OID_CRL_NUMBER)
        if found is None:
            return None
        outer = Der(found.value, "CRL number")
        number = outer.integer(nonneg=True)
        outer.end()
        return number

    @property
    def authority_key_id(self) -> bytes | None:
        """The identifier of the key that signed it."""
        return _key_id(self.extensions)


def _capped(data: bytes, limit: int, what: str) -> None:
    if len(data) > limit:
        raise EvidenceFormatError(
            f"{what}: too large", expected=f"at most {limit} bytes", found=f"{len(data)} bytes"
        )


_BLOCK: Final = re.compile(
    rb"\s*-----BEGIN ([A-Z0-9 ]{1,32})-----\r?\n([A-Za-z0-9+/=\r\n]+)"
    rb"-----END ([A-Z0-9 ]{1,32})-----"
)


def encode_pem(data: bytes, label: str = "CERTIFICATE") -> bytes:
    """Return DER as PEM in its one canonical form: lines of 64 characters (RFC 7468, 2)."""
    text = binascii.b2a_base64(data, newline=False)
    lines = b"\n".join(text[at : at + 64] for at in range(0, len(text), 64))
    name = label.encode()
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (name, lines, name)


def pem_blocks(
    data: bytes, label: str, *, limit: int, size: int = MAX_CERTIFICATE * MAX_CHAIN
) -> tuple[bytes, ...]:
    """
    Return the contents of PEM blocks of *label* that follow each other.

    Args:
        data: The text; white space between the blocks, and one NUL byte at the end, are no matter.
        label: What stands after BEGIN.
        limit: How many blocks there may be.
        size: How long the text may be.

    Raises:
        EvidenceFormatError: No block, too many, another label, or anything between them.

    """
    _capped(data, size, label)
    text = bytes(data)
    text = text[:-1] if text.endswith(b"\0") else text
    blocks: list[bytes] = []
    position = 0
    while match := _BLOCK.match(text, position):
        if match[1] != label.encode() or match[3] != match[1]:
            raise EvidenceFormatError(
                "PEM: wrong label", expected=label, found=match[1].decode("ascii")
            )
        if len(blocks) == limit:
            raise EvidenceFormatError(f"PEM: more than {limit} of {label}")
        try:
            body = match[2].replace(b"\n", b"").replace(b"\r", b"")
            blocks.append(binascii.a2b_base64(body, strict_mode=True))
        except binascii.Error as error:
            raise EvidenceFormatError(f"PEM: {label} is not base64", found=str(error)) from None
        position = match.end()
    if not blocks or text[position:].strip():
        raise EvidenceFormatError(
            f"PEM: not only blocks of {label}", found=f"offset {position} of {len(text)}"
        )
    return tuple(blocks)
