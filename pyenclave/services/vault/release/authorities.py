"""
The keys of attestation services: fetched from the configured address, and from nowhere else.

A backend that decides inside gets them itself: this says which addresses it may ask, how often, and
what it binds keys to (`AuthorityKeys.terms`); `release.relay` carries the bytes.

What a token says about keys is not looked at. A key set is kept for a while and then replaced as a
whole, so that a withdrawn key is gone. A token with an unknown key makes one fetch an interval,
however many such tokens come, and one fetch at a time serves all who wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from pyenclave._files import read_file
from pyenclave.collateral.http import Client
from pyenclave.errors import (
    CollateralError,
    ConfigurationError,
    EvidenceFormatError,
    ServiceError,
)
from pyenclave.formats.jwk import Jwk, Jwks
from pyenclave.formats.release_decision import LOOPBACK
from pyenclave.formats.release_policy import normal_authority
from pyenclave.formats.release_terms import MAX_DIGESTS, Anchor, ReleaseTerms, key_digest

if TYPE_CHECKING:
    from pyenclave.services.web.config import Authority

__all__ = [
    "MAX_SIZE",
    "UNREACHED",
    "AuthorityKeys",
    "Fetch",
    "KnownAuthority",
    "certificates",
    "unreached",
]

Fetch = Callable[[str, bytes | None], Awaitable[bytes]]  # address, pinned authority (PEM) → body

UNREACHED: Final = "authority.reached"  # a condition of the audit log
MAX_SIZE: Final = 512 << 10  # bytes of a key set; Azure's, with certificates, has 60 KB
_FRESH: Final = 600.0  # seconds after which a key set is asked for again
_STALE: Final = 6 * 3600.0  # seconds after which a key set that cannot be renewed is dropped
_INTERVAL: Final = 10.0  # seconds between two fetches of one authority
_TIMEOUT: Final = 10.0
_MAX_LOOPBACK: Final = 32  # authorities of development that are remembered
_MAX_HANDED: Final = 256  # anchors whose supplies are counted; enclaves keep so many key sets
_LOG: Final = logging.getLogger("pyenclave.vault")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownAuthority:
    """
    An attestation service that is configured.

    Attributes:
        url: Its address as `normal_authority` writes it.
        ca_pem: What its TLS certificate must chain to; None: the system's authorities.
        jwks: Its keys, if they are configured: then nothing is fetched.
    """

    url: str
    ca_pem: bytes | None = None
    jwks: Jwks | None = None


@dataclass(slots=True)
class _Held:
    """A key set, when it came and when it was last asked for."""

    authority: KnownAuthority
    keys: Jwks | None = None
    came: float = float("-inf")
    tried: float = float("-inf")
    failed: bool = False  # the last time that keys were handed in
    times: int = 0  # that keys were handed in
    locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def lock(self) -> asyncio.Lock:
        return self.locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


class AuthorityKeys:
    """
    Key sets of the attestation services that a vault knows.

    Args:
        authorities: The configured ones.
        loopback_ca: In development: any authority on this machine whose TLS certificate chains to
            this one (PEM) is known too.
        fetch: Gets an address; for tests.
        clock: Seconds that only grow.

    """

    def __init__(
        self,
        authorities: Iterable[KnownAuthority] = (),
        *,
        loopback_ca: bytes | None = None,
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._held = {item.url: _Held(item) for item in authorities}
        self._loopback_ca = loopback_ca
        self._loopback: OrderedDict[str, _Held] = OrderedDict()
        self._handed: OrderedDict[tuple[str, bytes], _Held] = OrderedDict()
        self._fetch = _get if fetch is None else fetch
        self._clock = clock

    @classmethod
    def configured(
        cls, authorities: Iterable[Authority], *, loopback_ca: bytes | None = None
    ) -> AuthorityKeys:
        """
        Read what the service's configuration says.

        Raises:
            AttestationError: An address is none, or a key set is malformed.
            OSError: A file with keys cannot be read.

        """
        known = []
        for item in authorities:
            jwks = None
            if item.jwks_file is not None:
                data = read_file(item.jwks_file, limit=MAX_SIZE)
                jwks = Jwks.from_bytes(data, f"keys of {item.url}")
            url = normal_authority(item.url)
            known.append(KnownAuthority(url=url, ca_pem=item.ca_pem, jwks=jwks))
        return cls(known, loopback_ca=loopback_ca)

    def knows(self, authority: str) -> bool:
        """Whether *authority* (as `normal_authority` writes it) is configured."""
        return self._of(authority) is not None

    def terms(self, *, strict: bool = False, skew: int = 60, sha1: bool = False) -> ReleaseTerms:
        """
        Return what an enclave binds exportable keys to.

        Args:
            strict: Policies are compared by exact JSON type.
            skew: Seconds that an authority's clock may differ, at most 300.
            sha1: They may be wrapped by OAEP over SHA-1, too.

        Raises:
            ConfigurationError: An authority's certificates are none, or more than 64; or all that
                is too much.

        """
        loopback = self._loopback_ca
        try:
            return ReleaseTerms(
                authorities=tuple(_anchor(item.authority) for item in self._held.values()),
                loopback=() if loopback is None else _digests(certificates(loopback)),
                strict=strict,
                skew=skew,
                sha1=sha1,
            )
        except EvidenceFormatError as error:
            raise ConfigurationError(
                f"authorities: {error.message}",
                found=error.found,
                advice="Name the one certificate that an authority's TLS leads to, no bundle.",
            ) from None

    async def supply(
        self,
        authority: str,
        hand_in: Callable[[KnownAuthority], Awaitable[None]],
        *,
        missing: bool,
        anchor: bytes = b"",
    ) -> None:
        """
        Have an enclave get the keys of an authority, at most once an interval.

        Args:
            authority: As `normal_authority` writes it; nothing is done for an unknown one.
            hand_in: Does it; ServiceError, CollateralError and OSError: they could not be had.
            missing: The enclave has none: it is new, or was never given any. Then the interval
                counts only after a failure.
            anchor: What the enclave knows it by. Each is counted for itself: keys of a vault that
                are bound to what the authority was known by before cannot be released any more,
                and asking for them must not keep the others from their authority.

        """
        known = self._of(authority)
        if known is None:
            return
        held = self._handed.setdefault((authority, anchor), _Held(known.authority))
        self._handed.move_to_end((authority, anchor))
        while len(self._handed) > _MAX_HANDED:
            self._handed.popitem(last=False)
        times = held.times
        async with held.lock():
            # Whoever waited has what the one before got.
            counts = held.failed or not missing
            if held.times != times or (counts and self._clock() - held.tried < _INTERVAL):
                return
            held.tried, held.failed = self._clock(), True
            try:
                await hand_in(held.authority)
            except (ServiceError, CollateralError, OSError) as error:
                _LOG.warning("keys of %s: %s", authority, error)
            else:
                held.failed = False
            held.times += 1

    async def find(self, authority: str, kid: str | None) -> Jwk | None:
        """
        Return a key of an authority.

        Returns:
            None if the authority is not configured, or has no such key.

        Raises:
            ServiceError: 503: its keys cannot be had now.

        """
        held = self._of(authority)
        if held is None:
            return None
        if held.authority.jwks is not None:
            return held.authority.jwks.find(kid)
        found = self._current(held, kid)
        if found is None or self._clock() - held.came > _FRESH:
            async with held.lock():
                # Whoever waited finds what the one before fetched.
                found = self._current(held, kid)
                if found is None or self._clock() - held.came > _FRESH:
                    await self._renew(held)
                    found = self._current(held, kid)
        if held.keys is None:
            raise unreached(authority)
        return found

    def _of(self, authority: str) -> _Held | None:
        held = self._held.get(authority)
        if held is not None or self._loopback_ca is None:
            return held
        if urlsplit(authority).hostname not in LOOPBACK:
            return None
        held = self._loopback.get(authority)
        if held is None:
            known = KnownAuthority(url=authority, ca_pem=self._loopback_ca)
            held = self._loopback[authority] = _Held(known)
            while len(self._loopback) > _MAX_LOOPBACK:
                self._loopback.popitem(last=False)
        return held

    def _current(self, held: _Held, kid: str | None) -> Jwk | None:
        if held.keys is not None and self._clock() - held.came > _STALE:
            held.keys = None
        return None if held.keys is None else held.keys.find(kid)

    async def _renew(self, held: _Held) -> None:
        now = self._clock()
        if now - held.tried < _INTERVAL:
            return
        held.tried = now
        url = held.authority.url
        try:
            data = await self._fetch(f"{url}/certs", held.authority.ca_pem)
            keys = Jwks.from_bytes(data, f"keys of {url}")
        except (CollateralError, EvidenceFormatError) as error:
            _LOG.warning("keys of %s: %s", url, error)
            return
        held.keys, held.came = keys, now


def unreached(authority: str) -> ServiceError:
    """Return the error of an authority whose keys cannot be had now."""
    return ServiceError(
        "the attestation service cannot be reached",
        status=503,
        error_code="ServiceUnavailable",
        retry_after=_INTERVAL,
        found=authority,
    )


def certificates(pem: bytes) -> list[bytes]:
    """
    Return the certificates of a PEM text, in DER.

    Raises:
        ConfigurationError: It has none, or what is no certificate.

    """
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigurationError("authorities: certificates", found=str(error)[:200]) from None
    return [item.public_bytes(serialization.Encoding.DER) for item in found]


def _digests(items: Iterable[bytes]) -> tuple[bytes, ...]:
    return tuple(sorted({hashlib.sha256(item).digest() for item in items}))


def _anchor(authority: KnownAuthority) -> Anchor:
    if authority.jwks is not None:
        listed = tuple(sorted({key_digest(key) for key in authority.jwks.keys}))
        if len(listed) > MAX_DIGESTS or not listed:
            raise EvidenceFormatError("the keys of an authority", found=f"{len(listed)} keys")
        return Anchor(url=authority.url, kind="keys", digests=listed)
    if authority.ca_pem is not None:
        digests = _digests(certificates(authority.ca_pem))
        return Anchor(url=authority.url, kind="roots", digests=digests)
    return Anchor(url=authority.url, kind="system")


async def _get(url: str, ca_pem: bytes | None) -> bytes:
    # A pinned authority is trusted *instead of* the system's.
    trusted = None if ca_pem is None else ca_pem.decode("ascii")
    client = Client(timeout=_TIMEOUT, attempts=1, ca_data=trusted)
    return (await client.get(url, max_size=MAX_SIZE)).body
