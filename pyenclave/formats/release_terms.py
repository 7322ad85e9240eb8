"""
What binds an exportable key of a vault to the attestation services that may speak for it ↔ bytes.

A vault's enclave believes no key set on its host's word. Which services there are, and how their
keys are known (by the roots of their TLS, or by themselves), is written into the wrapped key when
it is made or its policy is set, and comes back authenticated. ``docs/formats/wrapped-key.md``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import msgspec
from cryptography.hazmat.primitives import serialization

from pyenclave.errors import AttestationError, EvidenceFormatError
from pyenclave.formats.jwk import Jwk
from pyenclave.formats.release_decision import LOOPBACK, MAX_SKEW
from pyenclave.formats.release_policy import authority_host, normal_authority

__all__ = ["MAX_TERMS", "Anchor", "ReleaseTerms", "key_digest"]

Kind = Literal["system", "roots", "keys"]
MAX_TERMS: Final = 16 << 10  # bytes
MAX_AUTHORITIES: Final = 64
MAX_DIGESTS: Final = 64  # of one authority
MAX_URL: Final = 1024
_TERMS: Final = b"PYERTRM\x01"
_TERMS_WITH_SHA1: Final = b"PYERTRM\x02"
_ANCHOR: Final = b"PYEANCH\x01"


class _AnchorForm(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    url: str
    kind: Kind
    digests: list[bytes]


class _TermsForm(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    skew: int
    strict: bool
    authorities: list[_AnchorForm]
    loopback: list[bytes]


class _WithSha1Form(_TermsForm, array_like=True, forbid_unknown_fields=True):
    sha1: bool


_READ_ANCHOR: Final = msgspec.msgpack.Decoder(_AnchorForm)
_READ_TERMS: Final = msgspec.msgpack.Decoder(_TermsForm)
_READ_WITH_SHA1: Final = msgspec.msgpack.Decoder(_WithSha1Form)


def key_digest(key: Jwk) -> bytes:
    """Return the SHA-256 of all that judging a signature by *key* depends on."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    name = key.x5c[0].common_name if key.x5c else None
    parts = (
        b"" if key.kid is None else b"=" + key.kid.encode(),
        key.key.public_bytes(serialization.Encoding.DER, form),
        " ".join(sorted(key.algorithms)).encode(),
        b"" if name is None else b"=" + name.encode(),
    )
    digest = hashlib.sha256(b"pyenclave/authority-key/1")
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """
    How the keys of one attestation service are known.

    Attributes:
        url: Its address as `normal_authority` writes it.
        kind: ``keys``: only these keys, by `key_digest`; ``roots``: what its address shows over TLS
            under one of these root certificates, by the SHA-256 of their DER; ``system``: the
            same under the authorities that are measured into the vault's enclave.
        digests: 32 bytes each; none of ``system``.

    Raises:
        EvidenceFormatError: A member is not what it must be.

    """

    url: str
    kind: Kind
    digests: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        try:
            plain = normal_authority(self.url) == self.url and len(self.url) <= MAX_URL
        except AttestationError:
            plain = False
        if not plain:
            raise _wrong("the address of an authority", self.url)
        if self.kind not in ("system", "roots", "keys"):
            raise _wrong("the kind of an authority", self.kind)
        if (self.kind == "system") != (not self.digests):
            raise _wrong("an authority with nothing to know it by, or too much", self.kind)
        _check_digests(self.digests)

    def to_bytes(self) -> bytes:
        """Return the one encoding of these members."""
        return _ANCHOR + msgspec.msgpack.encode(self._form())

    def _form(self) -> _AnchorForm:
        return _AnchorForm(self.url, self.kind, list(self.digests))

    @classmethod
    def _of(cls, form: _AnchorForm) -> Self:
        return cls(url=form.url, kind=form.kind, digests=tuple(form.digests))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read what `to_bytes` wrote.

        Raises:
            EvidenceFormatError: Anything else.

        """
        found = cls._of(_read(_READ_ANCHOR, _ANCHOR, data))
        if found.to_bytes() != data:
            raise _wrong("not its one encoding", f"{len(data)} bytes")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseTerms:
    """
    What a key's releases are judged by besides its policy.

    Attributes:
        authorities: The attestation services that were configured, each address once.
        loopback: Development: SHA-256 of the roots under which any service of this machine is one.
        strict: The policy is compared by exact JSON type.
        skew: Seconds that an authority's clock may differ, at most 300.
        sha1: The key may be wrapped by OAEP over SHA-1, too.

    Raises:
        EvidenceFormatError: A member is not what it must be, or there are too many.

    """

    authorities: tuple[Anchor, ...] = ()
    loopback: tuple[bytes, ...] = ()
    strict: bool = False
    skew: int = 60
    sha1: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.skew <= MAX_SKEW:
            raise _wrong(f"clocks differ by 0 to {MAX_SKEW} seconds", self.skew)
        if len(self.authorities) > MAX_AUTHORITIES:
            raise _wrong(f"at most {MAX_AUTHORITIES} authorities", len(self.authorities))
        if len({item.url for item in self.authorities}) != len(self.authorities):
            raise _wrong("one authority twice", len(self.authorities))
        _check_digests(self.loopback)

    def anchor(self, authority: str) -> Anchor | None:
        """
        Return how the keys of *authority* are known; None if it is none of these.

        Args:
            authority: As `normal_authority` writes it.

        """
        for item in self.authorities:
            if item.url == authority:
                return item
        try:
            local = bool(self.loopback) and authority_host(authority)[0] in LOOPBACK
        except AttestationError:
            return None
        if not local or len(authority) > MAX_URL:
            return None
        return Anchor(url=authority, kind="roots", digests=self.loopback)

    def to_bytes(self) -> bytes:
        """
        Return the one encoding of these members.

        Raises:
            EvidenceFormatError: They are longer than `MAX_TERMS`.

        """
        listed = [item._form() for item in self.authorities]  # noqa: SLF001 - its own module
        members = self.skew, self.strict, listed, list(self.loopback)
        if self.sha1:
            data = _TERMS_WITH_SHA1 + msgspec.msgpack.encode(_WithSha1Form(*members, sha1=True))
        else:
            data = _TERMS + msgspec.msgpack.encode(_TermsForm(*members))
        if len(data) > MAX_TERMS:
            raise _wrong(f"at most {MAX_TERMS} bytes", f"{len(data)} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read what `to_bytes` wrote.

        Raises:
            EvidenceFormatError: Anything else.

        """
        sha1 = data.startswith(_TERMS_WITH_SHA1)
        magic, decoder = (_TERMS_WITH_SHA1, _READ_WITH_SHA1) if sha1 else (_TERMS, _READ_TERMS)
        form = _read(decoder, magic, data)
        found = cls(
            authorities=tuple(Anchor._of(item) for item in form.authorities),  # noqa: SLF001
            loopback=tuple(form.loopback),
            strict=form.strict,
            skew=form.skew,
            sha1=sha1,
        )
        if found.to_bytes() != data:
            raise _wrong("not its one encoding", f"{len(data)} bytes")
        return found


def _check_digests(digests: tuple[bytes, ...]) -> None:
    if len(digests) > MAX_DIGESTS or any(len(item) != 32 for item in digests):
        raise _wrong(f"at most {MAX_DIGESTS} SHA-256", f"{len(digests)} items")
    if list(digests) != sorted(set(digests)):
        raise _wrong("digests in order, each once", f"{len(digests)} items")


def _read(decoder: msgspec.msgpack.Decoder[Any], magic: bytes, data: bytes) -> Any:
    if len(data) > MAX_TERMS or not data.startswith(magic):
        raise _wrong("not these bytes", f"{len(data)} bytes")
    try:
        return decoder.decode(data[len(magic) :])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _wrong("not readable", type(error).__name__) from None


def _wrong(what: str, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"release terms: {what}", found=repr(found)[:80])
