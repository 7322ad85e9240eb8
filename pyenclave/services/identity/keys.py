"""
The keys of an issuer: found by discovery, kept, fetched anew seldom.

An unknown key name starts at most one fetch in five minutes, whoever sends it; many that wait share
one. If a fetch fails, the last good set goes on for a day. Only https, only hosts that were
configured, no redirects, bounded documents (OpenID Connect Discovery 1.0, section 4.3).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from pyenclave.collateral.http import Client
from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import jsonstrict
from pyenclave.formats.jwk import Jwk, Jwks
from pyenclave.services.identity.reasons import TokenRefused
from pyenclave.services.identity.trust import TrustedIssuer
from pyenclave.services.web.logs import clean, logger

__all__ = ["Fetch", "KeySource"]

REFRESH_SECONDS: Final = 3600.0  # a set is looked at again
FLOOD_SECONDS: Final = 300.0  # between fetches, whatever the reason
FIRST_SECONDS: Final = 15.0  # between fetches as long as there is no set at all
STALE_SECONDS: Final = 86400.0  # a set that cannot be had anew ends
_MAX_METADATA: Final = 64 << 10
_MAX_KEYS: Final = 256 << 10
_TIMEOUT: Final = 10.0

Fetch = Callable[[str, int], bytes]  # address, most bytes → body


def _fetcher(ca_file: str | None) -> Fetch:
    def fetch(url: str, most: int) -> bytes:
        client = Client(timeout=_TIMEOUT, attempts=2, ca_file=ca_file)
        return asyncio.run(client.get(url, max_size=most)).body

    return fetch


@dataclass(frozen=True, slots=True)
class _Held:
    keys: Jwks
    at: float
    generation: int


class KeySource:
    """
    Finds the keys of one issuer.

    Args:
        issuer: Whose.
        fetch: Gets a document; for tests.
        monotonic: Seconds that never go back.

    Attributes:
        generation: Rises with each set that differs from the one before.

    """

    def __init__(
        self,
        issuer: TrustedIssuer,
        *,
        fetch: Fetch | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._fetch = fetch or _fetcher(issuer.ca_file)
        self._clock = monotonic
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self._tried: float | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.generation = 0
        if issuer.jwks is not None:
            self._held = _Held(Jwks.from_bytes(issuer.jwks), 0.0, 0)

    @property
    def _static(self) -> bool:
        return self._issuer.jwks is not None

    def _due(self, now: float) -> bool:
        if self._static:
            return False
        pause = FIRST_SECONDS if self._held is None else FLOOD_SECONDS
        return self._tried is None or now - self._tried >= pause

    def blocks(self, kid: str) -> bool:
        """Whether `find` would have to fetch before it can say anything."""
        held, now = self._held, self._clock()
        if held is None or now - held.at > STALE_SECONDS or held.keys.find(kid) is None:
            return self._due(now) or self._lock.locked()
        return False

    def find(self, kid: str) -> tuple[Jwk, int]:
        """
        Return the key of that name, and the generation of its set.

        Raises:
            TokenRefused: No such key, or no keys.

        """
        held, now = self._held, self._clock()
        key = None if held is None else held.keys.find(kid)
        if self._static:
            return self._named(self._held, kid)
        if held is not None and key is not None and now - held.at <= STALE_SECONDS:
            if now - held.at > REFRESH_SECONDS and self._due(now):
                self._in_background()
            return key, held.generation
        if self._due(now) or self._lock.locked():
            self._refresh(held)
        held, now = self._held, self._clock()
        if held is None:
            raise TokenRefused("keys_unavailable", self._issuer.issuer)
        if now - held.at > STALE_SECONDS:
            raise TokenRefused("keys_expired", self._issuer.issuer)
        return self._named(held, kid)

    def _named(self, held: _Held | None, kid: str) -> tuple[Jwk, int]:
        if held is None:
            raise AssertionError("a static set is there from the start")
        key = held.keys.find(kid)
        if key is not None:
            return key, held.generation
        for name, why in held.keys.ignored:
            if name == kid:
                raise TokenRefused("key_unusable", why)
        raise TokenRefused("unknown_kid", kid)

    def _in_background(self) -> None:
        if self._lock.locked():
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="pye-keys")
        self._pool.submit(self._refresh, self._held)

    def _refresh(self, seen: _Held | None) -> None:
        """Fetch once, however many ask; who waited takes what the first one got."""
        with self._lock:
            if self._held is not seen or not self._due(self._clock()):
                return
            self._tried = self._clock()
            try:
                keys = self._fetched()
            except (CollateralError, EvidenceFormatError) as error:
                logger.warning(
                    "keys of issuer %s: %s", clean(self._issuer.issuer), clean(error, 400)
                )
                return
            if seen is None or _names(seen.keys) != _names(keys):
                self.generation += 1
            self._held = _Held(keys, self._clock(), self.generation)

    def _fetched(self) -> Jwks:
        issuer = self._issuer
        text = self._fetch(issuer.discovery_url, _MAX_METADATA)
        metadata = jsonstrict.object_of(text, "issuer metadata", max_size=_MAX_METADATA)
        wanted = issuer.discovery_issuer or issuer.issuer
        if metadata.get("issuer") != wanted:
            raise EvidenceFormatError(
                "issuer metadata: another issuer", expected=wanted, found=metadata.get("issuer")
            )
        where = metadata.get("jwks_uri")
        if not isinstance(where, str) or not _allowed(where, issuer.hosts):
            raise EvidenceFormatError(
                "issuer metadata: jwks_uri",
                expected=f"https on {', '.join(sorted(issuer.hosts))}",
                found=where,
            )
        keys = Jwks.from_bytes(self._fetch(where, _MAX_KEYS), "issuer keys")
        if not keys.keys:
            raise EvidenceFormatError("issuer keys: none that can be used")
        return keys

    def close(self) -> None:
        """End the thread that fetches in the background, if there is one."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _allowed(url: str, hosts: frozenset[str]) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return (
        url.isascii()
        and url.isprintable()
        and parts.scheme == "https"
        and parts.hostname in hosts
        and parts.username is None
        and not parts.fragment
    )


def _names(keys: Jwks) -> frozenset[tuple[str | None, object, frozenset[str]]]:
    return frozenset(
        (
            key.kid,
            key.key.public_numbers() if hasattr(key.key, "public_numbers") else key.kid,
            key.algorithms,
        )
        for key in keys.keys
    )
