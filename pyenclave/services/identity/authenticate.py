"""Who asks: from the Authorization header to a `Caller`, or 401 with the challenge."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from pyenclave.errors import ServiceError
from pyenclave.formats import jose
from pyenclave.services.identity import tokens
from pyenclave.services.identity.caller import Caller
from pyenclave.services.identity.keys import Fetch, KeySource
from pyenclave.services.identity.reasons import REASONS, TokenRefused
from pyenclave.services.identity.trust import Challenge, TrustedIssuer, check_tenants

if TYPE_CHECKING:
    from pyenclave.services.web.config import ServiceConfig

__all__ = ["Authenticator"]

_MAX_REMEMBERED: Final = 4096
_REMEMBER_SECONDS: Final = 600.0
_MAX_LEEWAY: Final = 300.0
_BEARER: Final = re.compile(r"(?i:bearer) +([\x21-\x7e][\x20-\x7e]*)")


@dataclass(frozen=True, slots=True)
class _Remembered:
    caller: Caller
    not_before: int
    until: float  # monotonic
    source: KeySource
    generation: int


class Authenticator:
    """
    Validates bearer tokens of pinned issuers.

    Args:
        issuers: Whose tokens are believed.
        audiences: What ``aud`` must be.
        challenge: What the one without a token is told.
        leeway: Seconds that clocks may differ by, at most 300.
        clock: Seconds since 1970.
        monotonic: Seconds that never go back.
        fetch: Gets documents of issuers; for tests.

    Raises:
        ValueError: No issuer, no audience, too much leeway, or two issuers that share a tenant.

    """

    def __init__(
        self,
        issuers: Sequence[TrustedIssuer],
        audiences: Sequence[str],
        *,
        challenge: Challenge | None,
        leeway: float = 60.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        fetch: Fetch | None = None,
    ) -> None:
        if not issuers:
            raise ValueError("without an issuer nobody could be let in")
        check_tenants(issuers)
        if isinstance(audiences, str) or not audiences or not all(audiences):
            raise ValueError("audiences is a sequence of text, and has at least one")
        if not 0 <= leeway <= _MAX_LEEWAY:
            raise ValueError(f"leeway is 0 to {_MAX_LEEWAY:g} seconds")
        self._issuers = tuple(issuers)
        self._audiences = frozenset(audiences)
        self._challenge = challenge
        self._leeway = leeway
        self._clock = clock
        self._monotonic = monotonic
        self._sources = {
            id(issuer): KeySource(issuer, fetch=fetch, monotonic=monotonic)
            for issuer in self._issuers
        }
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def configured(cls, config: ServiceConfig) -> Self:
        """Return what the configuration of a service says; close it with the service."""
        return cls(config.issuers, config.audiences, challenge=config.challenge)

    def remembered(self, headers: Mapping[str, str]) -> Caller | None:
        """Return the caller of a token that was validated within ten minutes and still holds."""
        value = headers.get("authorization")
        if value is None or value[:7] != "Bearer ":
            return None
        held = self._remembered.get(hashlib.sha256(value[7:].encode("latin-1")).digest())
        if held is None:
            return None
        now = self._clock()
        if (
            now >= held.caller.expires + self._leeway
            or now < held.not_before - self._leeway
            or self._monotonic() >= held.until
            or held.source.generation != held.generation
        ):
            return None
        return held.caller

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """
        Return who asks. May fetch an issuer's keys, and then takes as long as that.

        Args:
            headers: The request's, names in lower case.

        Raises:
            ServiceError: 401 with the challenge; 503 if the issuer's keys cannot be had.

        """
        caller = self.remembered(headers)
        if caller is not None:
            return caller
        try:
            token, claims, digest = self._read(headers)
            return self._validate(token, claims, digest)
        except TokenRefused as refused:
            self._refuse(refused)

    async def authenticated(self, headers: Mapping[str, str]) -> Caller:
        """As `authenticate`; what has to be fetched is fetched in a thread."""
        caller = self.remembered(headers)
        if caller is not None:
            return caller
        try:
            token, claims, digest = self._read(headers)
            issuer = tokens.match_issuer(claims, self._issuers)
            if not self._sources[id(issuer)].blocks(token.kid or ""):
                return self._validate(token, claims, digest)
            if self._pool is None:
                self._pool = ThreadPoolExecutor(4, thread_name_prefix="pye-tokens")
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._validate, token, claims, digest)
        except TokenRefused as refused:
            self._refuse(refused)

    def _read(self, headers: Mapping[str, str]) -> tuple[jose.Jws, dict[str, Any], bytes]:
        value = headers.get("authorization")
        if value is None:
            raise ServiceError(
                "a bearer token is needed",
                status=401,
                error_code="Unauthorized",
                challenge=self._header(),
            )
        if len(value) > tokens.MAX_TOKEN + 64:
            raise TokenRefused("oversized", f"{len(value)} bytes")
        found = _BEARER.fullmatch(value)
        if found is None:
            raise TokenRefused("scheme")
        token, claims = tokens.read(found[1])
        return token, claims, hashlib.sha256(found[1].encode("latin-1")).digest()

    def _validate(self, token: jose.Jws, claims: dict[str, Any], digest: bytes) -> Caller:
        issuer = tokens.match_issuer(claims, self._issuers)
        if token.algorithm not in issuer.algorithms:
            raise TokenRefused("algorithm", token.algorithm)
        source = self._sources[id(issuer)]
        key, generation = source.find(token.kid or "")
        if token.algorithm not in key.algorithms:
            raise TokenRefused("key_algorithm", token.algorithm)
        if not key.verify(token, allowed=issuer.algorithms):
            raise TokenRefused("signature")
        verdict = tokens.judge(
            claims, issuer, self._audiences, now=self._clock(), leeway=self._leeway
        )
        caller = Caller(
            tenant=verdict.tenant,
            object_id=verdict.object_id,
            client_id=verdict.client_id,
            kind=verdict.kind,
            token_digest=digest.hex(),
            expires=float(verdict.expires),
        )
        until = self._monotonic() + _REMEMBER_SECONDS
        self._remembered[digest] = _Remembered(
            caller, verdict.not_before, until, source, generation
        )
        while len(self._remembered) > _MAX_REMEMBERED:
            try:
                self._remembered.popitem(last=False)
            except KeyError:  # another thread emptied it
                break
        return caller

    def _header(self) -> str:
        return "Bearer" if self._challenge is None else self._challenge.header

    def _refuse(self, refused: TokenRefused) -> NoReturn:
        text = REASONS[refused.reason]
        if refused.reason in ("keys_unavailable", "keys_expired"):
            raise ServiceError(
                f"the token cannot be judged: {text}",
                status=503,
                error_code="ServiceUnavailable",
                inner=refused.reason,
                retry_after=15,
                found=refused.found,
            ) from None
        raise ServiceError(
            f"the token is refused: {text}",
            status=401,
            error_code="Unauthorized",
            inner=refused.reason,
            challenge=f'{self._header()}{"," if self._challenge else ""} error="invalid_token"',
            found=refused.found,
        ) from None

    def close(self) -> None:
        """End the threads that fetch, if there are any."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for source in self._sources.values():
            source.close()
