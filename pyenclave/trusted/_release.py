"""
Having a key released to this enclave: evidence, token, request and answer.

The host carries the messages (`pyenclave.relay`) and is trusted with none of them. The transfer key
is made here and never leaves; evidence binds it to this code, the attestation service's token says
so to the vault, and the vault wraps the key to it. What comes back is judged in `_release_answer`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.calls import services
from pyenclave.errors import EvidenceFormatError, KeyReleaseError
from pyenclave.formats import jose, release
from pyenclave.trusted import _state
from pyenclave.trusted._release_answer import Expected, anchors_of, open_answer
from pyenclave.trusted._release_relay import ask, object_of, refusal
from pyenclave.trusted._released import ReleasedKey

__all__ = ["ReleasedKey", "Releases", "release_key"]

_EARLY: Final = 60.0  # seconds before its end in which a token is used no more
_PATIENCE: Final = 5.0  # seconds that a thread waits for another's release of the same key
_MOST_KEYS: Final = 64  # that are kept
_MAX_TOKEN: Final = 256 << 10
_LABEL: Final = b"pyenclave/release-nonce/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Who is asked for what; equal ones share a key that was released."""

    vault: str
    host: str
    name: str
    version: str
    attestation: str
    ca: str
    kind: str
    algorithm: str
    issuer: str
    transfer_bits: int
    require_nonce: bool
    api_version: str
    attestation_api_version: str


@dataclass(slots=True)
class _Attested:
    """A token, the key that it names, and until when it is used (`time.time`)."""

    token: str
    transfer: rsa.RSAPrivateKey
    until: float


@dataclass(slots=True)
class _Kept:
    """What was released, and when (`time.monotonic`)."""

    key: ReleasedKey
    since: float


@dataclass(slots=True)
class _Terms:
    """What one call wants besides."""

    evidence: Callable[[bytes], bytes] | None
    nonce: str | None
    server_nonce: bool
    at: dt.datetime | None
    ignore_dates: bool
    timeout: float
    deadline: float

    @property
    def relaxed(self) -> bool:
        """Whether dates are judged otherwise than by this machine's clock, now."""
        return self.ignore_dates or self.at is not None

    def again(self) -> _Terms:
        """Return the same for another request, from now on."""
        deadline = time.monotonic() + self.timeout
        return replace(self, nonce=None, deadline=deadline)


@dataclass(slots=True)
class Releases:
    """The released keys and the tokens of one enclave. Thread-safe: one request at a time each."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _flights: dict[_Asked, threading.Lock] = field(default_factory=dict)
    _keys: dict[_Asked, _Kept] = field(default_factory=dict)
    _tokens: dict[tuple[object, ...], _Attested] = field(default_factory=dict)
    _closed: bool = False

    def get(self, asked: _Asked, terms: _Terms, max_age: float, refresh: bool) -> ReleasedKey:
        """Return the key, released now or not long ago."""
        if terms.relaxed:
            # Kept or shared it would reach callers who want dates judged, now, as they are.
            key = self._release(asked, terms)
            key.other = lambda version: self.get(
                replace(asked, version=version), terms.again(), 0.0, refresh=True
            )
            return key
        begun = time.monotonic()
        with self._flight(asked, terms.deadline):
            with self._lock:
                kept = self._keys.get(asked)
            # Who waited for another thread's request has its answer, even if a new one is wanted.
            newest = begun if refresh else time.monotonic() - max_age
            if kept is not None and kept.since >= newest and _usable(kept.key):
                return kept.key
            key = self._release(asked, terms)
            key.other = lambda version: self.get(
                replace(asked, version=version), terms.again(), max_age, refresh=False
            )
            if max_age > 0 or refresh:
                self._keep(asked, key)
            return key

    def _keep(self, asked: _Asked, key: ReleasedKey) -> None:
        with self._lock:
            # One that is replaced may be in use elsewhere: it is wiped when nobody has it any more.
            self._keys.pop(asked, None)
            if not self._closed:
                self._keys[asked] = _Kept(key, time.monotonic())
            while len(self._keys) > _MOST_KEYS:
                self._keys.pop(next(iter(self._keys)))

    @contextlib.contextmanager
    def _flight(self, asked: _Asked, deadline: float) -> Iterator[None]:
        """
        Be the one that asks for this key, or wait for who is.

        Not for ever: a call whose caller gave up waits in the host, who may let it wait. Then this
        one goes on by itself, and others after it wait for it.
        """
        with self._lock:
            if len(self._flights) > 4 * _MOST_KEYS:
                self._flights = {k: v for k, v in self._flights.items() if v.locked()}
            flight = self._flights.setdefault(asked, threading.Lock())
        left = deadline - time.monotonic()
        if not flight.acquire(timeout=max(0.0, min(left, _PATIENCE))):
            if left <= _PATIENCE:
                raise KeyReleaseError(
                    f"another thread's release of {asked.name} did not end in time",
                    check="deadline",
                    transient=True,
                )
            with self._lock:
                if self._flights.get(asked) is flight:
                    self._flights[asked] = threading.Lock()
            with self._flight(asked, deadline):
                yield
            return
        try:
            yield
        finally:
            flight.release()

    def close(self) -> None:
        """Wipe every key that is kept, and forget tokens and transfer keys."""
        with self._lock:
            self._closed = True
            keys, self._keys = list(self._keys.values()), {}
            self._tokens.clear()
        for kept in keys:
            kept.key.close()

    def _release(self, asked: _Asked, terms: _Terms) -> ReleasedKey:
        reused, attested = self._attested(asked, terms, fresh=terms.nonce is not None)
        nonce = _fresh_nonce()
        status, answer = self._request(asked, terms, attested, nonce)
        if reused and status in (400, 401, 403):
            # The token may have ended earlier than it says, or the vault forgotten its signer.
            _, attested = self._attested(asked, terms, fresh=True)
            nonce = _fresh_nonce()
            status, answer = self._request(asked, terms, attested, nonce)
        if status != 200:
            raise refusal(
                "release.refused", f"the vault did not release {asked.name}", status, answer
            )
        found = object_of(answer, "the vault's answer", "answer.form")
        value = found.get("value")
        if not isinstance(value, str):
            raise KeyReleaseError("the vault's answer holds no token", check="answer.form")
        now = dt.datetime.now(dt.UTC) if terms.at is None else terms.at
        expected = Expected(
            vault=asked.vault,
            host=asked.host,
            name=asked.name,
            version=asked.version,
            algorithm=asked.algorithm,
            nonce=nonce,
            require_nonce=asked.require_nonce,
            at=None if terms.ignore_dates else now,
            now=None if terms.ignore_dates else now.timestamp(),
        )
        anchors = anchors_of(asked.ca)
        return open_answer(value, expected, anchors=anchors, transfer=attested.transfer)

    def _request(
        self, asked: _Asked, terms: _Terms, attested: _Attested, nonce: str
    ) -> tuple[int, bytes]:
        body = release.release_request(attested.token, nonce=nonce, enc=asked.algorithm)
        path = f"/keys/{asked.name}/{asked.version}/release"
        return ask(
            services.VAULT, asked.vault, "POST", path, asked.api_version, body, terms.deadline
        )

    def _attested(self, asked: _Asked, terms: _Terms, *, fresh: bool) -> tuple[bool, _Attested]:
        """Return a token, and whether it is one of before."""
        place = (
            asked.attestation,
            asked.kind,
            asked.issuer,
            asked.transfer_bits,
            asked.attestation_api_version,
            terms.evidence,
        )
        with self._lock:
            known = self._tokens.get(place)
        if known is not None and not fresh and known.until > time.time():
            return True, known
        made = _attest(asked, terms)
        with self._lock:
            if not self._closed and terms.nonce is None:
                self._tokens.pop(place, None)
                self._tokens[place] = made
                while len(self._tokens) > _MOST_KEYS:
                    self._tokens.pop(next(iter(self._tokens)))
        return False, made


def _usable(key: ReleasedKey) -> bool:
    return not key.closed and (key.expires is None or key.expires > time.time())


def _fresh_nonce() -> str:
    # Two sources, as for every secret of a launch: a generator that repeats is not enough.
    secret = _state.current().secret
    return jose.b64url_encode(hmac.digest(secret, _LABEL + os.urandom(32), "sha256"))


def _attest(asked: _Asked, terms: _Terms) -> _Attested:
    """Make a transfer key, and have a token say that this enclave has it."""
    transfer = rsa.generate_private_key(65537, asked.transfer_bits)
    numbers = transfer.public_key().public_numbers()
    nonce = _server_nonce(asked, terms) if terms.server_nonce else terms.nonce
    # In the runtime data evidence binds it; beside them anybody could put one.
    data = release.runtime_data(numbers.n, numbers.e, _fresh_nonce() if nonce is None else nonce)
    report_data = hashlib.sha256(data).digest() + bytes(32)
    make = terms.evidence or _state.current().attest_raw
    body = release.attest_request(asked.kind, make(report_data), runtime_data=data, nonce=nonce)
    status, answer = ask(
        services.ATTESTATION,
        asked.attestation,
        "POST",
        f"/attest/{asked.kind}",
        asked.attestation_api_version,
        body,
        terms.deadline,
    )
    if status != 200:
        what = "the attestation service gave this enclave no token"
        raise refusal("attest.refused", what, status, answer)
    token = object_of(answer, "the attestation service's answer", "attest.token").get("token")
    if not isinstance(token, str):
        raise KeyReleaseError("the attestation service's answer has no token", check="attest.token")
    return _Attested(token, transfer, _judge_token(token, asked.issuer, nonce))


def _server_nonce(asked: _Asked, terms: _Terms) -> str:
    """Have the attestation service give a nonce, which it takes back once."""
    status, answer = ask(
        services.ATTESTATION,
        asked.attestation,
        "POST",
        "/nonces",
        asked.attestation_api_version,
        {},
        terms.deadline,
    )
    if status != 200:
        what = "the attestation service gave no nonce"
        raise refusal("attest.refused", what, status, answer)
    nonce = object_of(answer, "the attestation service's nonce", "attest.token").get("nonce")
    if not isinstance(nonce, str) or not 16 <= len(nonce) <= 1024:
        raise KeyReleaseError("the attestation service's answer has no nonce", check="attest.token")
    return nonce


def _judge_token(token: str, issuer: str, nonce: str | None) -> float:
    """
    Refuse a token that cannot be meant for us; return until when it is used.

    Nothing about it is verified: that is the vault's, and the key is wrapped to nobody else. This
    finds mistakes where they are made.
    """
    try:
        claims = jose.Jws.from_bytes(token, "attestation token", max_size=_MAX_TOKEN).claims()
    except EvidenceFormatError as error:
        raise KeyReleaseError(
            error.message, check="attest.token", expected=error.expected, found=error.found
        ) from None
    said = claims.get("iss")
    if not isinstance(said, str) or said.rstrip("/") != issuer.rstrip("/"):
        raise KeyReleaseError(
            "the token is of another issuer",
            check="token.issuer",
            expected=issuer,
            found=repr(said)[:200],
        )
    if nonce is not None and claims.get("nonce") != nonce:
        raise KeyReleaseError(
            "the token repeats another nonce",
            check="token.nonce",
            expected=nonce,
            found=repr(claims.get("nonce"))[:200],
        )
    ends = claims.get("exp")
    if isinstance(ends, bool) or not isinstance(ends, int | float):
        return 0.0  # it is used once
    return ends - _EARLY


# ---- what trusted code calls --------------------------------------------------------------------


def release_key(
    vault: str | None,
    name: str,
    *,
    version: str = "",
    attestation: str | None = None,
    ca: str | None = None,
    algorithm: str = "RSA_AES_KEY_WRAP_256",
    kind: str = "PyEnclave",
    evidence: Callable[[bytes], bytes] | None = None,
    issuer: str | None = None,
    nonce: str | None = None,
    server_nonce: bool = False,
    max_age: float = 3600.0,
    refresh: bool = False,
    at: dt.datetime | None = None,
    dangerous_ignore_dates: bool = False,
    require_nonce: bool = True,
    transfer_bits: int = 3072,
    timeout: float = 60.0,
    api_version: str = "7.4",
    attestation_api_version: str = "2022-08-01",
) -> ReleasedKey:
    """
    Have a key vault release a key to this enclave, because its evidence satisfies the key's policy.

    Works in a thread that serves a call, and with `pyenclave.relay` as the host's part. What the
    host could do is refuse; whatever it changes is found. Keys are kept: another call for the same
    key, from any thread, returns the same object, and threads that ask at once wait for one answer;
    but not those that were released under dates of the caller's (*at*, *dangerous_ignore_dates*):
    each such call asks the vault, and nobody else gets its key.

    Args:
        vault: The vault's address; None: the manifest's ``[release] vault``. The answer must be
            signed for this host.
        name: Name of the key.
        version: Its version; empty: the newest.
        attestation: Address of the attestation service that the key's policy names; None: the
            manifest's.
        ca: PEM of the authorities that may vouch for the vault's name; None: the manifest's. Never
            from the host: whoever chooses it chooses the vault.
        algorithm: How the key is wrapped; also ``RSA_AES_KEY_WRAP_384``, and with SHA-1
            ``CKM_RSA_AES_KEY_WRAP``.
        kind: Kind of evidence, the last part of ``/attest/KIND``.
        evidence: Makes it, from 64 bytes of report data; needed where *kind* is not
            ``PyEnclave``.
        issuer: What the token must name as its issuer; the attestation service's address if None.
        nonce: Given to the attestation service, which repeats it in the token; a new token is made
            for it then.
        server_nonce: Ask the attestation service for a nonce that it takes back once; ours has
            such.
        max_age: Seconds for which a key that was released is used again; 0: never.
        refresh: Ask the vault now, for a version that is newer, say.
        at: When the vault's certificates and the key must be valid. By default now, by a clock
            that is the machine's: there is no trusted one.
        dangerous_ignore_dates: Do not judge dates at all.
        require_nonce: Whether the answer must repeat the request's nonce. One that repeats another
            is refused in any case.
        transfer_bits: Size of the transfer key, made anew for each token: 2048, 3072 or 4096.
        timeout: Seconds for all of it.
        api_version: Of the vault's interface.
        attestation_api_version: Of the attestation service's.

    Returns:
        The key.

    Raises:
        KeyReleaseError: Not released, or what came is refused; its ``check`` names what failed.
        NotInEnclaveError: Outside an enclave.
        ValueError: An argument is not usable.

    """
    runtime = _state.current()
    given = runtime.release
    if vault is None:
        vault = _needed(given, "vault")
    if attestation is None:
        attestation = _needed(given, "attestation")
    if ca is None:
        ca = _needed(given, "ca")
    if algorithm not in release.ALGORITHMS:
        raise ValueError(f"algorithm: one of {', '.join(release.ALGORITHMS)}, not {algorithm!r}")
    if transfer_bits not in (2048, 3072, 4096):
        raise ValueError(f"transfer_bits: 2048, 3072 or 4096, not {transfer_bits!r}")
    if kind != "PyEnclave" and evidence is None:
        raise ValueError(f"evidence: kind {kind} needs a function that makes it")
    if nonce is not None and server_nonce:
        raise ValueError("either a nonce or the service's own")
    if at is not None and at.tzinfo is None:
        raise ValueError("at: a moment with its time zone")
    vault, host = release.service_url(vault, "vault")
    attestation, _ = release.service_url(attestation, "attestation")
    kid = f"{vault}/keys/{name}/{version}" if version else f"{vault}/keys/{name}"
    if release.split_kid(kid) != (vault, name, version):
        raise ValueError(f"name and version of a key: letters, digits and -, not {name!r}")
    anchors_of(ca)
    path = f"/attest/{kind}"
    if not services.is_allowed(services.ATTESTATION, "POST", path, attestation_api_version):
        raise ValueError(f"kind or attestation_api_version: not usable: {kind!r}")
    path = f"/keys/{name}/{version}/release"
    if not services.is_allowed(services.VAULT, "POST", path, api_version):
        raise ValueError(f"api_version: not usable: {api_version!r}")
    asked = _Asked(
        vault=vault,
        host=host,
        name=name,
        version=version,
        attestation=attestation,
        ca=ca,
        kind=kind,
        algorithm=algorithm,
        issuer=attestation if issuer is None else issuer,
        transfer_bits=transfer_bits,
        require_nonce=require_nonce,
        api_version=api_version,
        attestation_api_version=attestation_api_version,
    )
    terms = _Terms(
        evidence=evidence,
        nonce=nonce,
        server_nonce=server_nonce,
        at=at,
        ignore_dates=dangerous_ignore_dates,
        timeout=timeout,
        deadline=time.monotonic() + timeout,
    )
    return _releases(runtime).get(asked, terms, max_age, refresh or nonce is not None)


_making = threading.Lock()


def _releases(runtime: Any) -> Releases:
    with _making:
        if runtime.released is None:
            runtime.released = Releases()
        found: Releases = runtime.released
        return found


def _needed(given: dict[str, str], key: str) -> str:
    value = given.get(key)
    if not value:
        raise ValueError(f"{key}: give it, or say it in the manifest: [release] {key} = …")
    return value
