"""
Certificates that carry evidence (RA-TLS): the interoperable form, and older ones.

The interoperable form is an extension with tagged CBOR: ``60000([evidence, claims])``, where the
report data of the evidence is the hash of the claims, and the claims hold the hash of the
certificate's public key. Older forms put a quote into extensions of their own and hash the key
straight into the report data; they are read, marked as legacy, and never written. A certificate
with the interoperable extension is judged by that one only.

Layouts: the project's notes on RA-TLS, 7.1 and 7.3.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor, der
from pyenclave.formats.cbor import Tag
from pyenclave.formats.der import Der
from pyenclave.formats.x509 import Certificate

__all__ = [
    "HASHES",
    "OID_ENDORSEMENTS",
    "OID_EVIDENCE",
    "TAG_QUOTE",
    "Form",
    "RaTlsCertificate",
    "claims_buffer",
    "endorsement_files",
    "evidence_extension",
    "key_forms",
    "named_key",
    "open_enclave_evidence",
    "open_enclave_quote",
]

OID_EVIDENCE: Final = "2.23.133.5.4.9"
OID_ENDORSEMENTS: Final = "2.23.133.5.4.2"
# Gramine's identifier with its tag and length encoded inside (its certificates are all so), and
# as it was meant.
OIDS_GRAMINE: Final = ("0.6.9.42.840.113741.1337.6", "1.2.840.113741.1337.6")
OIDS_OPEN_ENCLAVE: Final = ("1.2.840.113556.10.1.1", "1.3.6.1.4.1.311.105.1")
OIDS_OPEN_ENCLAVE_EVIDENCE: Final = ("1.2.840.113556.10.1.2", "1.3.6.1.4.1.311.105.2")

# Version, format (ECDSA of SGX), and size of what follows; four bytes align the size.
_OE_EVIDENCE: Final = Struct("<I16s4xQ")
_OE_VERSION: Final = 3
_OE_SGX_ECDSA: Final = bytes.fromhex("a3a21e871b4d4014b70aa125d2fbcd8c")
_QUOTE_HEAD: Final = 436  # of an SGX quote: header, report body, and size of the rest

TAG_QUOTE: Final = 60000
_OTHER_TAGS: Final = {60001: "a TDREPORT or report of type 2", 60002: "an SGX report"}
MAX_EVIDENCE: Final = 64 * 1024
# IANA Named Information hash algorithms.
HASHES: Final = {1: hashlib.sha256, 7: hashlib.sha384, 8: hashlib.sha512}

Form = Literal["dice", "gramine", "open-enclave"]

_ENDORSEMENT_FILES: Final = (
    "tcb-info.json",
    "tcb-info-issuer-chain.pem",
    "pck-crl.der",
    "root-ca-crl.der",
    "pck-crl-issuer-chain.pem",
    "qe-identity.json",
    "qe-identity-issuer-chain.pem",
)


def _wrong(what: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"RA-TLS: {what}", expected=expected, found=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaTlsCertificate:
    """
    A certificate and the evidence in it.

    Attributes:
        certificate: The certificate.
        form: ``dice`` is the interoperable one; the others are legacy.
        quote: The DCAP quote.
        claims_buffer: The bytes that the report data is the hash of. Legacy forms have none, but
            for Open Enclave's evidence, where they are the key in one of its forms.
        claims: The same, read; of the interoperable form only.
        endorsements: Collateral that came along, by file name. It still has to be verified.
    """

    certificate: Certificate
    form: Form
    quote: bytes = field(repr=False)
    claims_buffer: bytes | None = field(default=None, repr=False)
    claims: Mapping[Any, Any] = field(default_factory=dict)
    endorsements: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def legacy(self) -> bool:
        """Whether it is one of the older forms."""
        return self.form != "dice"

    @property
    def nonce(self) -> bytes | None:
        """The nonce among the claims."""
        value = self.claims.get("nonce")
        return value if isinstance(value, bytes) else None

    @property
    def key_hash(self) -> tuple[int, bytes]:
        """
        The algorithm and hash of the public key among the claims.

        Raises:
            EvidenceFormatError: None, malformed, or of an unknown algorithm.

        """
        raw = self.claims.get("pubkey-hash")
        if not isinstance(raw, bytes):
            raise _wrong("pubkey-hash", "the hash of the public key", type(raw).__name__)
        value = cbor.loads(raw, "RA-TLS: pubkey-hash", form="definite", max_size=256)
        if not isinstance(value, list) or [type(item) for item in value] != [int, bytes]:
            raise _wrong("pubkey-hash", "[algorithm, hash]", type(value).__name__)
        algorithm, digest = value
        if algorithm not in HASHES:
            raise _wrong("pubkey-hash", "algorithm 1, 7 or 8", algorithm)
        size = HASHES[algorithm]().digest_size
        if len(digest) != size:
            raise _wrong("pubkey-hash", f"{size} bytes", f"{len(digest)} bytes")
        return algorithm, digest

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a certificate, DER or PEM.

        Raises:
            EvidenceFormatError: No certificate, no evidence in it, or malformed evidence. If the
                interoperable extension is there and malformed, older ones are not looked at.

        """
        return cls.from_certificate(Certificate.from_bytes(data))

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> Self:
        """Find the evidence in *certificate*; errors as in `from_bytes`."""
        extensions = certificate.extensions
        if OID_EVIDENCE in extensions:
            quote, buffer, claims = _tagged(extensions[OID_EVIDENCE].value)
            carried: Mapping[str, bytes] = {}
            if OID_ENDORSEMENTS in extensions:
                carried = endorsement_files(extensions[OID_ENDORSEMENTS].value)
            return cls(
                certificate=certificate,
                form="dice",
                quote=quote,
                claims_buffer=buffer,
                claims=claims,
                endorsements=carried,
            )
        for oid in OIDS_GRAMINE:
            if oid in extensions:
                return cls(
                    certificate=certificate, form="gramine", quote=_capped(extensions[oid].value)
                )
        for oid in OIDS_OPEN_ENCLAVE:
            if oid in extensions:
                quote = open_enclave_quote(extensions[oid].value)
                return cls(certificate=certificate, form="open-enclave", quote=quote)
        for oid in OIDS_OPEN_ENCLAVE_EVIDENCE:
            if oid in extensions:
                quote, buffer = open_enclave_evidence(extensions[oid].value)
                return cls(
                    certificate=certificate,
                    form="open-enclave",
                    quote=quote,
                    claims_buffer=buffer,
                )
        raise _wrong("the certificate", f"extension {OID_EVIDENCE}", "no evidence")


def _capped(value: bytes) -> bytes:
    if not 0 < len(value) <= MAX_EVIDENCE:
        raise _wrong("evidence", f"1 to {MAX_EVIDENCE} bytes", f"{len(value)} bytes")
    return value


def _tagged(value: bytes) -> tuple[bytes, bytes, Mapping[Any, Any]]:
    """Read ``60000([evidence, claims])``."""
    item = cbor.loads(_capped(value), "RA-TLS evidence", form="definite", max_size=MAX_EVIDENCE)
    if not isinstance(item, Tag):
        raise _wrong("evidence", f"tag {TAG_QUOTE}", type(item).__name__)
    if item.number != TAG_QUOTE:
        found = _OTHER_TAGS.get(item.number, "unknown")
        raise _wrong("evidence", f"tag {TAG_QUOTE}, a quote", f"tag {item.number}: {found}")
    parts = item.value
    if not isinstance(parts, list) or [type(part) for part in parts] != [bytes, bytes]:
        raise _wrong("evidence", "two byte strings", type(parts).__name__)
    quote, buffer = parts
    claims = cbor.loads(buffer, "RA-TLS claims", form="definite", max_size=MAX_EVIDENCE)
    if not isinstance(claims, dict) or not claims:
        raise _wrong("claims", "a map that is not empty", type(claims).__name__)
    if "nonce" in claims and not isinstance(claims["nonce"], bytes):
        raise _wrong("nonce", "a byte string", type(claims["nonce"]).__name__)
    return _capped(quote), buffer, MappingProxyType(claims)


def endorsement_files(value: bytes) -> Mapping[str, bytes]:
    """
    Return the collateral in an extension of endorsements, by the names that `Endorsements` has.

    Raises:
        EvidenceFormatError: Malformed.

    """
    item = cbor.loads(value, "RA-TLS endorsements", form="definite")
    parts = item.value if isinstance(item, Tag) and item.number == TAG_QUOTE else None
    if not isinstance(parts, list) or len(parts) not in (8, 9) or type(parts[0]) is not int:
        raise _wrong("endorsements", f"tag {TAG_QUOTE} of 8 or 9 items", type(item).__name__)
    files = parts[1:8]
    if not all(isinstance(part, bytes) for part in files):
        raise _wrong("endorsements", "byte strings", "other items")
    # Open Enclave hands its texts around with the NUL that ends them.
    return {
        name: part.rstrip(b"\0") if name.endswith((".json", ".pem")) else part
        for name, part in zip(_ENDORSEMENT_FILES, files, strict=True)
    }


def open_enclave_quote(value: bytes) -> bytes:
    """
    Return the quote in an extension of Open Enclave: bare, or after the header of a report.

    Raises:
        EvidenceFormatError: Empty, or a header that does not fit.

    """
    raw = _capped(value)
    if raw[0] == der.OCTET_STRING:
        cursor = Der(raw, "Open Enclave report")
        raw = _capped(cursor.octet_string())
        cursor.end()
    if raw[:4] != b"\1\0\0\0":
        return raw
    kind, size = int.from_bytes(raw[4:8], "little"), int.from_bytes(raw[8:16], "little")
    if kind != 2 or size != len(raw) - 16:
        raise _wrong(
            "Open Enclave report", f"type 2, {len(raw) - 16} bytes", f"type {kind}, {size}"
        )
    return _capped(raw[16:])


def open_enclave_evidence(value: bytes) -> tuple[bytes, bytes]:
    """
    Return quote and custom claims of Open Enclave's evidence (``oe_attestation_header_t``).

    Raises:
        EvidenceFormatError: A header that does not fit, another format than SGX quotes, or no
            claims: then nothing says whose the quote is.

    """
    raw = _capped(value)
    if raw[0] == der.OCTET_STRING:
        cursor = Der(raw, "Open Enclave evidence")
        raw = _capped(cursor.octet_string())
        cursor.end()
    if len(raw) < _OE_EVIDENCE.size + _QUOTE_HEAD:
        raise _wrong("Open Enclave evidence", "a header and a quote", f"{len(raw)} bytes")
    version, kind, size = _OE_EVIDENCE.unpack_from(raw)
    body = raw[_OE_EVIDENCE.size :]
    if (version, kind, size) != (_OE_VERSION, _OE_SGX_ECDSA, len(body)):
        raise _wrong(
            "Open Enclave evidence",
            f"version {_OE_VERSION}, format {_OE_SGX_ECDSA.hex()}, {len(body)} bytes",
            f"version {version}, format {kind.hex()}, {size} bytes",
        )
    end = _QUOTE_HEAD + int.from_bytes(body[_QUOTE_HEAD - 4 : _QUOTE_HEAD], "little")
    if end >= len(body):
        raise _wrong("Open Enclave evidence", "claims behind the quote", f"{len(body)} bytes")
    return body[:end], body[end:]


def named_key(claims: bytes, spki: bytes) -> str | None:
    """Return in which form the custom *claims* name the key *spki*; None if they do not."""
    for name, data in key_forms(spki).items():
        if hmac.compare_digest(claims, data):
            return name
        if hmac.compare_digest(claims, hashlib.sha256(data).digest()):
            return f"sha256({name})"
    return None


def key_forms(spki: bytes) -> Mapping[str, bytes]:
    """Return the forms of a public key whose SHA-256 a legacy report data may be, by name."""
    body = "\n".join(textwrap.wrap(base64.b64encode(spki).decode("ascii"), 64))
    pem = f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n".encode("ascii")
    return {"pem+nul": pem + b"\0", "pem": pem, "der": spki}


def evidence_extension(quote: bytes, *, claims_buffer: bytes) -> bytes:
    """Return the content of the interoperable extension."""
    return cbor.dumps(Tag(TAG_QUOTE, [quote, claims_buffer]))


def claims_buffer(spki: bytes, *, nonce: bytes | None = None, algorithm: int = 1) -> bytes:
    """
    Return the claims that bind the key *spki* (DER); the report data is their SHA-256 and zeros.

    Args:
        spki: SubjectPublicKeyInfo of the certificate.
        nonce: The verifier's challenge.
        algorithm: 1 SHA-256, 7 SHA-384, 8 SHA-512.
    """
    claims: dict[str, bytes] = {
        "pubkey-hash": cbor.dumps([algorithm, HASHES[algorithm](spki).digest()])
    }
    if nonce is not None:
        claims["nonce"] = nonce
    return cbor.dumps(claims, canonical=True)
