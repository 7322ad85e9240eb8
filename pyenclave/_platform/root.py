"""
What the platform derives from its root secret: keys by purpose, and its own chain of trust.

Every value is HKDF-SHA-256 of the root with a purpose and the level in the info, so no purpose and
no level shares a key with another. The chain (root CA, intermediate CA, leaf) and the attestation
key are derived too, with fixed dates and deterministic ECDSA (RFC 6979): the same root gives the
same certificates for ever, so a relying party that enrolled the fingerprint keeps it.
"""

from __future__ import annotations

import datetime as dt
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from pyenclave._core import SecretMemory, hkdf_expand, hmac_sha256

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["PLATFORM_SVN", "Chain", "PlatformRoot", "raw_public_key", "raw_signature"]

#: Security version of this platform code. It goes up when a flaw in it is repaired; keys of a
#: higher version are not derived for a request of a lower one and the other way round is allowed.
PLATFORM_SVN: Final = 1

_ROOT_SALT: Final = b"pyenclave/root/1"
_SEAL_SALT: Final = b"pyenclave/seal/1"
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_NOT_BEFORE: Final = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER: Final = dt.datetime(2049, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
_SHA256: Final = hashes.SHA256()
_SIGN: Final = ec.ECDSA(_SHA256, deterministic_signing=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The platform's certificates: the leaf signs the QE report, the root is enrolled."""

    leaf: x509.Certificate
    intermediate: x509.Certificate
    root: x509.Certificate

    def to_pem(self) -> bytes:
        """Return leaf, intermediate and root as PEM (DCAP certification data type 5)."""
        from cryptography.hazmat.primitives import serialization

        return b"".join(
            certificate.public_bytes(serialization.Encoding.PEM)
            for certificate in (self.leaf, self.intermediate, self.root)
        )


class PlatformRoot:
    """
    The derived keys of one platform, held in secret memory.

    The root itself is not kept: only the HKDF pseudo-random keys of its two salts.

    Args:
        secret: The 32-byte root; it is wiped before the constructor returns.
        level: ``embedded`` or ``service``; part of every derivation.
        ephemeral: The root lives in memory only.

    Attributes:
        tee: The TEE whose hardware vouches for this platform, or ``none``.
        machine: What that hardware says (`formats.machine`), for all evidence; else empty.

    """

    def __init__(self, secret: bytearray, *, level: str, ephemeral: bool) -> None:
        if len(secret) != 32:
            raise ValueError("the root secret has 32 bytes")
        self.level = level
        self.tee: Literal["none", "sev-snp", "tdx"] = "none"
        self.machine = b""
        self.ephemeral = ephemeral
        self._memory = SecretMemory(64)
        # HKDF-Extract (RFC 5869 section 2.2) is HMAC(salt, secret).
        self._memory.write(0, hmac_sha256(_ROOT_SALT, secret))
        self._memory.write(32, hmac_sha256(_SEAL_SALT, secret))
        for index in range(len(secret)):
            secret[index] = 0
        self.attestation_key = self._private_key("attestation")
        self._leaf_key = self._private_key("pck")

    @functools.cached_property
    def chain(self) -> Chain:
        """The certificates. Made when they are first asked for: a launch needs none."""
        return self._make_chain()

    def derive(self, purpose: str, length: int) -> bytes:
        """Return *length* bytes for *purpose*, bound to the level."""
        info = _prefixed(purpose.encode()) + _prefixed(self.level.encode())
        return hkdf_expand(self._memory.read(0, 32), info, length)

    def derive_seal_key(self, dependencies: bytes, *, debug: bool) -> bytes:
        """
        Return the 256-bit seal key for an EGETKEY dependency structure.

        HKDF-SHA-256 with the salt ``pyenclave/seal/1`` and the info dependencies ‖ level (with
        its length before it) ‖ debug.
        """
        info = dependencies + _prefixed(self.level.encode()) + bytes([debug])
        return hkdf_expand(self._memory.read(32, 32), info, 32)

    def sign(self, data: bytes) -> bytes:
        """Sign with the attestation key: raw R ‖ S, 64 bytes."""
        return raw_signature(self.attestation_key.sign(data, _SIGN))

    def sign_qe_report(self, body: bytes) -> bytes:
        """Sign a QE report body with the leaf's key: raw R ‖ S, 64 bytes."""
        return raw_signature(self._leaf_key.sign(body, _SIGN))

    def close(self) -> None:
        """Wipe the derived secrets; may be called twice."""
        self._memory.close()

    def _private_key(self, purpose: str) -> ec.EllipticCurvePrivateKey:
        # FIPS 186-5 A.2.1: 64 bits more than the order, reduced, leave a bias below 2^-64.
        wide = int.from_bytes(self.derive(f"p256/{purpose}", 40), "big")
        return ec.derive_private_key(wide % (_P256_ORDER - 1) + 1, ec.SECP256R1())

    def _make_chain(self) -> Chain:
        root_key = self._private_key("root-ca")
        intermediate_key = self._private_key("intermediate-ca")
        # A name of its own for each platform, so that stores can hold several roots.
        mark = self.derive("name", 6).hex()
        root_name = _name(f"pyenclave platform root CA {mark} (software, no TEE)")
        intermediate_name = _name(f"pyenclave platform CA {mark}")
        leaf_name = _name(f"pyenclave quoting {mark}")
        root = self._certificate(root_name, root_key.public_key(), root_name, root_key, 1)
        intermediate = self._certificate(
            intermediate_name, intermediate_key.public_key(), root_name, root_key, 0
        )
        leaf = self._certificate(
            leaf_name, self._leaf_key.public_key(), intermediate_name, intermediate_key, None
        )
        return Chain(leaf=leaf, intermediate=intermediate, root=root)

    def _certificate(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        issuer: x509.Name,
        issuer_key: ec.EllipticCurvePrivateKey,
        path_length: int | None,
    ) -> x509.Certificate:
        from cryptography import x509

        authority = path_length is not None
        serial = int.from_bytes(self.derive(f"serial/{path_length}", 15), "big") | 1 << 118
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(serial)
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not authority,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=authority,
                    crl_sign=authority,
                    encipher_only=False,
                    decipher_only=False,
                ),
                True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
            )
        )
        return builder.sign(issuer_key, _SHA256, ecdsa_deterministic=True)


def _prefixed(data: bytes) -> bytes:
    # Lengths before the parts: no two different inputs give the same bytes.
    return len(data).to_bytes(4, "little") + data


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "pyenclave"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def raw_signature(der: bytes) -> bytes:
    """Turn a DER ECDSA P-256 signature into R ‖ S, 32 bytes each, big-endian."""
    r, s = decode_dss_signature(der)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_public_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return X ‖ Y, 32 bytes each, big-endian."""
    numbers = key.public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
