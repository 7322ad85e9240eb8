"""
What the vault asks of whoever keeps its keys: the key-encryption backend.

A backend makes keys, and hands their private halves out in wrapped form only: bytes that mean
nothing without the backend, and that open only together with the *context* under which they were
wrapped (`pyenclave.formats.key_context`: name, version, kind, exportability, policy). The database
keeps those bytes. Whatever takes a private half happens in the backend.

Fields of ``perform``, each of bytes (Azure Key Vault's names where it has them):

============  =======================================  ========================================
operation     fields                                   answer
============  =======================================  ========================================
encrypt       value; iv (CBC), aad (GCM)               value; iv (GCM, CBC), tag, aad (GCM)
decrypt       value; iv (CBC, GCM), aad and tag (GCM)  value
wrapKey       value                                    value
unwrapKey     value                                    value
sign          value (the digest)                       value (the signature)
verify        digest, value (the signature)            value: one byte, 1: it holds; 0: not
============  =======================================  ========================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, runtime_checkable

from pyenclave.errors import ServiceError
from pyenclave.formats.release_outcome import Outcome

__all__ = [
    "KEK_PLACES",
    "MAX_RANDOM",
    "DecidesInside",
    "Encoding",
    "KeyBackend",
    "KeyMaterial",
    "KeySpec",
    "Operation",
    "ReleaseRequest",
    "Rewraps",
    "Verdict",
    "WrapsForTransfer",
    "bad_parameter",
    "kek_of",
    "unavailable",
]

Operation = Literal["encrypt", "decrypt", "wrapKey", "unwrapKey", "sign", "verify"]
Encoding = Literal["CKM_RSA_AES_KEY_WRAP", "RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384"]
MAX_RANDOM: Final = 128  # bytes of one request for random bytes, as Managed HSM has it


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySpec:
    """
    What key to make.

    Attributes:
        kty: ``RSA``, ``EC`` or ``oct``, with or without ``-HSM``.
        size: Bits of an RSA key (2048, 3072, 4096; default 2048) or of an oct key (128, 192, 256;
            default 256).
        crv: Curve of an EC key: ``P-256`` (the default), ``P-384``, ``P-521`` or ``P-256K``.
    """

    kty: str
    size: int | None = None
    crv: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaterial:
    """
    A key as the vault keeps it.

    Attributes:
        public: Members of the JWK that are public: ``n`` and ``e``; ``crv``, ``x`` and ``y``; none.
        wrapped: The private half, for the backend only.
    """

    public: Mapping[str, str]
    wrapped: bytes


@runtime_checkable
class KeyBackend(Protocol):
    """
    Keeper of private halves. Every method raises ServiceError, and nothing else, for what the
    caller's request or the backend's state makes impossible: 400 BadParameter, 403 Forbidden, 503
    ServiceUnavailable (try again: what was under way was lost).
    """

    name: str

    async def generate(self, spec: KeySpec, context: bytes) -> KeyMaterial:
        """Make a key, wrapped under *context*."""
        ...

    async def import_key(self, jwk: Mapping[str, Any], context: bytes) -> KeyMaterial:
        """Take a key that somebody else made: a JWK with its private members."""
        ...

    async def perform(
        self,
        wrapped: bytes,
        context: bytes,
        operation: Operation,
        algorithm: str,
        fields: Mapping[str, bytes],
    ) -> dict[str, bytes]:
        """Use a key; fields and answer are in the table above."""
        ...

    async def rebind(self, wrapped: bytes, context: bytes, new_context: bytes) -> bytes:
        """Wrap a key under another context, as when its policy changes."""
        ...

    async def random(self, count: int) -> bytes:
        """Return random bytes, 1 to 128."""
        ...

    async def close(self) -> None:
        """Give back what the backend holds. May be called twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """
    What a release is asked with.

    Attributes:
        policy: The key's release policy; None without one.
        target: The attestation token.
        enc: The construction to wrap by.
        enabled: Whether the key may be used.
        not_before: Seconds since 1970.
        expires: Seconds since 1970.
    """

    policy: bytes | None
    target: str = field(repr=False)
    enc: str
    enabled: bool = True
    not_before: int | None = None
    expires: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """
    What a backend that decides answers.

    Attributes:
        outcome: What came out; None if keys of an authority are asked for first.
        ciphertext: The wrapped key; empty if it is not released.
        needed: The authority whose keys are asked for (`pyenclave.formats.release_terms.Anchor`).
        missing: There are none at all; otherwise the token names another one, or they are old.
    """

    outcome: Outcome | None
    ciphertext: bytes = field(default=b"", repr=False)
    needed: bytes = b""
    missing: bool = False


@runtime_checkable
class WrapsForTransfer(Protocol):
    """A backend that takes the vault's word for whom a key is wrapped for."""

    async def release(
        self, wrapped: bytes, context: bytes, *, modulus: bytes, exponent: int, enc: str
    ) -> bytes:
        """
        Wrap a key for an RSA public key: RSA-OAEP of a fresh AES-256 key, then AES-KWP of the key.

        The key is PKCS #8 (RSA, EC) or its plain bytes (oct).
        """
        ...


@runtime_checkable
class DecidesInside(Protocol):
    """A backend that releases to nobody but whom it decided for itself (`EnclaveBackend`)."""

    async def decide_release(
        self, wrapped: bytes, context: bytes, request: ReleaseRequest, *, final: bool
    ) -> Verdict:
        """Decide, and wrap; *final*: by the authority's keys that are at hand."""
        ...

    async def authority_keys(self, anchor: bytes, jwks: bytes) -> int:
        """Hand in the key set of an authority that is known by its keys; how many are its."""
        ...

    async def authority_connect(self, anchor: bytes, roots: list[bytes]) -> tuple[int, bytes]:
        """Begin TLS to an authority; return the session, and what to send first."""
        ...

    async def authority_answer(
        self, session: int, data: bytes, *, ended: bool
    ) -> tuple[bytes, bool]:
        """Hand in what came; return what to send, and whether the keys are there."""
        ...


# What wrapped keys begin with, and where they name their key-encryption key
# (docs/formats/wrapped-key.md): magic, offset, size.
KEK_PLACES: Final = (
    (b"PYEVKEY\x01", 8, 16),
    (b"PYEVKEY\x02", 8, 16),
    (b"PYEHSMK\x01", 8, 8),
)


def kek_of(wrapped: bytes) -> bytes | None:
    """Return the id of the key-encryption key that a wrapped key names; None of other backends."""
    for magic, start, size in KEK_PLACES:
        if wrapped.startswith(magic) and len(wrapped) >= start + size:
            return wrapped[start : start + size]
    return None


@runtime_checkable
class Rewraps(Protocol):
    """A backend whose key-encryption key can be replaced."""

    async def keks(self) -> tuple[bytes, ...]:
        """Return the ids of its key-encryption keys as they are now; the last one wraps."""
        ...

    async def rotate_kek(self) -> bytes:
        """Make a new one, durably before anything is wrapped with it, and return its id."""
        ...

    async def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
        """Return a key wrapped with the newest one; None if it is already."""
        ...

    async def destroy_keks(self, ids: Collection[bytes]) -> None:
        """Destroy key-encryption keys, those that are there; never the newest."""
        ...


def bad_parameter(message: str, **details: Any) -> ServiceError:
    """Return the error for a request that no key could serve."""
    return ServiceError(message, status=400, error_code="BadParameter", **details)


def unavailable(message: str, *, retry_after: int = 1) -> ServiceError:
    """Return the error for a backend that was lost meanwhile; the next request may succeed."""
    return ServiceError(
        message, status=503, error_code="ServiceUnavailable", retry_after=retry_after
    )
