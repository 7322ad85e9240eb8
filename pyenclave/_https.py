"""
HTTPS to one service: what the clients of vaults and attestation services, and the relay, share.

Certificates and names are always checked, TLS 1.2 or later; a redirect is never followed; no proxy
is taken from the environment; sizes and the whole time are capped, also against a server that sends
a byte now and then. A credential is asked only for the scope of a domain that the service lies in,
whatever its challenge says (Key Vault's), unless the caller gives that check up.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import socket
import ssl
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast
from urllib.parse import quote, urlencode, urlsplit

from pyenclave._files import read_file
from pyenclave._locks import Lock
from pyenclave.errors import EvidenceFormatError, RemoteServiceError
from pyenclave.formats import jsonstrict
from pyenclave.formats.release import service_url
from pyenclave.formats.retry_after import retry_after

__all__ = [
    "Answer",
    "Challenge",
    "Credential",
    "Session",
    "StaticToken",
    "TokenFile",
    "bad_answer",
    "error_of",
    "json_of",
]

MAX_ANSWER: Final = 1 << 20  # bytes of a body, unless the caller allows less
RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
NO_ANSWER: Final = "NoAnswer"  # the error code where there is no status

_CHUNK: Final = 64 << 10
_IDLE: Final = 4  # connections that are kept
_IDLE_SECONDS: Final = 15.0  # a server closes idle ones sooner or later
_EARLY: Final = 60.0  # seconds before its end in which a token is renewed
_MAX_TOKEN: Final = 64 << 10
_MAX_CA: Final = 4 << 20  # bytes of a file of authorities
_MAX_WAIT: Final = 30.0
_PARAMETER: Final = re.compile(
    r'\s*([A-Za-z_-]{1,40})\s*=\s*(?:"([^"\\]{0,2000})"|([^\s",]{0,2000}))'
)
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
# A resource or scope whose host every reader finds at the same place: a name of two labels or more,
# without user, port, query, escapes and backslashes.
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_AUDIENCE: Final = re.compile(rf"https://({_LABEL}(?:\.{_LABEL})+)(?:/[A-Za-z0-9._~/-]*)?")


class Credential(Protocol):
    """What gives tokens: the objects of azure-identity, `StaticToken`, `TokenFile`, or your own."""

    def get_token(self, *scopes: str) -> Any:
        """Return an object with ``token`` (text) and ``expires_on`` (seconds since 1970)."""


@dataclass(frozen=True, slots=True)
class _Token:
    token: str
    expires_on: float

    def __repr__(self) -> str:
        return f"_Token(expires_on={self.expires_on})"


class StaticToken:
    """
    A token that one has already; it is not renewed.

    Args:
        token: The bearer token.

    Raises:
        ValueError: It is no token: empty, too long, or not printable ASCII.

    """

    def __init__(self, token: str) -> None:
        self._token = _checked_token(token.strip())

    def get_token(self, *scopes: str) -> _Token:
        """Return the token, whatever the scope."""
        return _Token(self._token, time.time() + 3600)

    def __repr__(self) -> str:
        return "StaticToken(…)"


class TokenFile:
    """
    A file that holds a token and is written anew before it ends, as workload identities have it.

    Args:
        path: The file; it is read when a token is needed.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def get_token(self, *scopes: str) -> _Token:
        """
        Return the token that the file holds now.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no token.

        """
        text = read_file(self._path, limit=_MAX_TOKEN + 2).decode("ascii", "replace")
        return _Token(_checked_token(text.strip()), time.time() + 120)

    def __repr__(self) -> str:
        return f"TokenFile({str(self._path)!r})"


def _checked_token(token: object) -> str:
    # What is sent in a header: a line break would begin another one.
    if not isinstance(token, str) or not 0 < len(token) <= _MAX_TOKEN:
        raise ValueError("a bearer token is a text of 1 to 65,536 characters")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a bearer token is printable ASCII without spaces")
    return token


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What a service answered.

    Attributes:
        status: The HTTP status.
        headers: By name in lower case.
        body: The whole body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Challenge:
    """
    What a service says of the tokens that it takes (RFC 6750, 3; notes on key release, 10.6).

    Attributes:
        authority: Who issues them; shown to people, and asked by nobody here.
        scope: What a credential is asked for.
    """

    authority: str
    scope: str

    @classmethod
    def read(cls, header: str, host: str, *, verify_resource: bool = True) -> Challenge:
        """
        Read a ``WWW-Authenticate`` header.

        Args:
            header: Its value.
            host: Host that the request went to.
            verify_resource: Whether the scope that a credential will be asked for, and the
                resource if there is one besides, must name a domain that *host* lies in, by whole
                labels and of two labels at least: otherwise any server that one asks could have a
                token for any service.

        Raises:
            RemoteServiceError: No bearer challenge, or for another domain.

        """
        kind, _, rest = header[:8192].strip().partition(" ")
        if kind.lower() != "bearer":
            raise RemoteServiceError(
                "the service asks for another kind of authentication",
                status=401,
                error_code="BadChallenge",
                expected="a Bearer challenge",
                found=repr(header[:80]),
            )
        found: dict[str, str] = {}
        for match in _PARAMETER.finditer(rest):
            found.setdefault(match[1].lower(), match[2] if match[2] is not None else match[3])
        authority = found.get("authorization") or found.get("authorization_uri") or ""
        resource = found.get("resource") or found.get("resource_id") or ""
        scope = found.get("scope") or (resource and resource.rstrip("/") + "/.default")
        if not scope:
            raise RemoteServiceError(
                "the service's challenge names no resource",
                status=401,
                error_code="BadChallenge",
                expected="resource or scope",
                found=repr(header[:80]),
            )
        if verify_resource:
            # What is judged is what the credential will be asked for, character by character.
            domain = _domain_of(scope)
            if not _lies_in(host.lower(), domain):
                raise _not_its_own(host, scope)
            if resource and _domain_of(resource) != domain:
                raise _not_its_own(host, resource)
        return cls(authority=authority, scope=scope)


def _domain_of(url: str) -> str | None:
    """Return the host of a resource or scope; None if readers could differ about it."""
    match = _AUDIENCE.fullmatch(url)
    return None if match is None else match[1].lower()


def _lies_in(host: str, domain: str | None) -> bool:
    if domain is None:
        return False
    # An address has no domains: 0.1 is none of 127.0.0.1.
    return host == domain or (
        host.endswith(f".{domain}") and not domain.rpartition(".")[2].isdigit()
    )


def _not_its_own(host: str, found: str) -> RemoteServiceError:
    return RemoteServiceError(
        "the service asks for a token of a domain that it does not lie in",
        status=401,
        error_code="BadChallenge",
        expected=f"one resource, https and a name of two labels or more, that {host} belongs to",
        found=repr(found[:80]),
        advice="For a vault of your own give verify_challenge_resource=False.",
    )


_Kept = tuple[int, float, http.client.HTTPSConnection]  # whose, since when, what


def _close_all(idle: list[_Kept]) -> None:
    while idle:
        idle.pop()[2].close()


class _Socket(ssl.SSLSocket):
    """A connection whose every read and write ends at one moment, however slow the peer is."""

    deadline: float | None = None

    def _left(self) -> None:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the deadline passed")
            self.settimeout(left)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self._left()
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        self._left()
        return super().send(*args, **kwargs)


def _context(ca: str | bytes | os.PathLike[str] | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificates and names
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A person's certificate of the same authority may have any common name (RFC 9525, 2).
    context.hostname_checks_common_name = False
    context.sslsocket_class = _Socket
    if ca is None:
        context.load_default_certs()
        return context
    if isinstance(ca, bytes | bytearray):
        ca = bytes(ca).decode("ascii", "replace")
    try:
        if isinstance(ca, str) and "-----BEGIN" in ca:
            context.load_verify_locations(cadata=ca)
        else:
            text = read_file(ca, limit=_MAX_CA).decode("ascii", "replace")
            context.load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:
        raise ValueError(f"ca: no certificates of authorities can be read: {error}") from None
    return context


class Session:
    """
    Connections to one service, tokens for it, and patience with it. Thread-safe.

    Args:
        url: ``https://host[:port]``.
        credential: Gives bearer tokens; a text is a token; None: the service asks for none.
        ca: The authorities that are trusted *instead of* the system's: PEM, or a file of it.
        timeout: Seconds for one `ask`, all attempts and pauses included.
        attempts: How often a busy or broken service is asked.
        verify_challenge_resource: See `Challenge.read`.
        proxy: ``http://host:port`` that connections go through (CONNECT); none by default.
        what: What it is called in errors.

    Raises:
        ValueError: *url*, *ca*, *proxy* or a number is not usable.

    """

    def __init__(
        self,
        url: str,
        *,
        credential: Credential | str | None = None,
        ca: str | bytes | os.PathLike[str] | None = None,
        timeout: float = 30.0,
        attempts: int = 4,
        verify_challenge_resource: bool = True,
        proxy: str | None = None,
        what: str = "the service",
    ) -> None:
        if not timeout > 0 or attempts < 1:
            raise ValueError("timeout is positive and attempts at least 1")
        self.url, self.host = service_url(url, what)
        self.what = what
        self.timeout = timeout
        self.attempts = attempts
        parts = urlsplit(self.url)
        self._port = parts.port or 443
        self._prefix = parts.path
        self._context = _context(ca)
        self._credential = StaticToken(credential) if isinstance(credential, str) else credential
        self._verify_resource = verify_challenge_resource
        self._proxy = None
        if proxy is not None:
            through = urlsplit(proxy)
            if through.scheme != "http" or not through.hostname:
                raise ValueError(f"proxy: expected http://host:port, found {proxy!r:.200}")
            self._proxy = (through.hostname, through.port or 80)
        self._lock = Lock()
        self._idle: list[_Kept] = []
        weakref.finalize(self, _close_all, self._idle)
        self._challenge: Challenge | None = None
        self._token: _Token | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def close(self) -> None:
        """Close the connections that are kept, and forget the token. It may be used again."""
        with self._lock:
            self._token = None
            _close_all(self._idle)

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        max_size: int = MAX_ANSWER,
        repeatable: bool = True,
        timeout: float | None = None,
    ) -> Answer:
        """
        Ask, with a token where the service wants one, and again while it is busy or broken.

        Args:
            method: The HTTP method.
            path: From the root of the service, quoted already.
            query: Parameters behind it.
            body: JSON, or None.
            headers: Further headers.
            max_size: Bytes of body that are accepted.
            repeatable: Whether it may be sent again when it is not known whether it was served.
            timeout: Seconds; the session's otherwise.

        Returns:
            The answer, whatever its status but a redirect.

        Raises:
            RemoteServiceError: No answer in time, or one that is refused.

        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        target = self._prefix + path + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        request = _Request(method, target, body, dict(headers or {}), max_size, repeatable)
        for attempt in range(1, self.attempts + 1):
            answer, failure = None, None
            try:
                answer = self._authorized(request, deadline)
                if answer.status not in RETRIED:
                    return answer
            except RemoteServiceError as error:
                if error.status or not error.transient or not repeatable:
                    raise
                failure = error
            pause = 0.1 * 3 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            if answer is not None:
                pause = max(pause, min(retry_after(answer.headers.get("retry-after")), _MAX_WAIT))
            last = attempt == self.attempts or time.monotonic() + pause >= deadline
            if last and answer is not None:
                return answer
            if last and failure is not None:
                raise failure
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _authorized(self, request: _Request, deadline: float) -> Answer:
        """Ask once, or more often where that is how one gets a token accepted."""
        if self._credential is None:
            return self._once(request, deadline, None)
        known = self._challenge
        if known is None:
            # What is to be said is not for a service that was not asked what tokens it takes.
            answer = self._once(request.without_body(), deadline, None)
            if answer.status != 401:
                bare = request.body is None
                return answer if bare else self._once(request, deadline, None)
            known = self._challenged(answer)
        answer = self._once(request, deadline, self._bearer(known))
        if answer.status != 401 or "www-authenticate" not in answer.headers:
            return answer
        again = self._challenged(answer)
        with self._lock:
            self._token = None
        return self._once(request, deadline, self._bearer(again))

    def _challenged(self, answer: Answer) -> Challenge:
        header = answer.headers.get("www-authenticate", "")
        found = Challenge.read(header, self.host, verify_resource=self._verify_resource)
        with self._lock:
            if found != self._challenge:
                self._challenge, self._token = found, None
        return found

    def _bearer(self, challenge: Challenge) -> str:
        if self._credential is None:
            raise AssertionError("no credential")
        with self._lock:
            token = self._token
        if token is None or token.expires_on - _EARLY <= time.time():
            given = self._credential.get_token(challenge.scope)
            try:
                token = _Token(_checked_token(given.token), float(given.expires_on))
            except (AttributeError, TypeError, ValueError) as error:
                raise TypeError(f"the credential gave no token: {error}") from None
            with self._lock:
                self._token = token
        return token.token

    def _once(self, request: _Request, deadline: float, token: str | None) -> Answer:
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "pyenclave",
            **request.headers,
        }
        if request.body is not None:
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            kept = self._kept()
            if kept is not None:
                try:
                    return self._exchange(kept, request, headers, deadline)
                except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError):
                    if not request.repeatable:
                        raise  # else: the server had closed it while it was idle
            return self._exchange(self._connect(deadline), request, headers, deadline)
        except ssl.SSLCertVerificationError as error:
            raise self._failed(
                f"its certificate is refused: {error.verify_message}",
                transient=False,
                advice="A service with an authority of its own needs ca= (--ca).",
            ) from None
        except TimeoutError:
            raise self._failed("no whole answer before the deadline") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(f"{error}"[:300] or type(error).__name__) from None

    def _failed(
        self, found: str, *, transient: bool = True, advice: str | None = None
    ) -> RemoteServiceError:
        error = RemoteServiceError(
            f"{self.what} ({self.url}) gave no answer",
            status=0,
            error_code=NO_ANSWER,
            found=found,
            advice=advice,
        )
        error.transient = transient
        return error

    def _kept(self) -> http.client.HTTPSConnection | None:
        late = time.monotonic() - _IDLE_SECONDS
        while True:
            with self._lock:
                if not self._idle:
                    return None
                pid, since, connection = self._idle.pop()
            # A forked child's copy is its parent's: two must not speak on one connection.
            if since > late and pid == os.getpid():
                return connection
            connection.close()

    def _connect(self, deadline: float) -> http.client.HTTPSConnection:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        host, port = self._proxy or (self.host, self._port)
        connection = http.client.HTTPSConnection(host, port, timeout=left, context=self._context)
        if self._proxy is not None:
            connection.set_tunnel(self.host, self._port)
        connection.connect()
        with contextlib.suppress(OSError):
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _exchange(
        self,
        connection: http.client.HTTPSConnection,
        request: _Request,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Answer:
        keep = False
        try:
            cast(_Socket, connection.sock).deadline = deadline
            connection.request(request.method, request.target, body=request.body, headers=headers)
            answer = connection.getresponse()
            found = self._read(answer, request.max_size)
            keep = not answer.will_close
            return found
        finally:
            with self._lock:
                keep = keep and len(self._idle) < _IDLE
                if keep:
                    self._idle.append((os.getpid(), time.monotonic(), connection))
            if not keep:
                connection.close()

    def _read(self, answer: http.client.HTTPResponse, max_size: int) -> Answer:
        status = answer.status
        if 300 <= status < 400:
            target = (answer.getheader("Location") or "")[:200]
            raise self._refused(status, "a redirect, which is not followed", repr(target))
        if answer.getheader("Content-Encoding", "identity").lower() != "identity":
            raise self._refused(status, "an encoded answer", answer.getheader("Content-Encoding"))
        length = answer.length
        if length is not None and length > max_size:
            raise self._refused(status, f"an answer of {length} bytes", f"more than {max_size}")
        body = bytearray()
        while chunk := answer.read(min(_CHUNK, max_size + 1 - len(body))):
            body += chunk
            if len(body) > max_size:
                raise self._refused(status, "too long an answer", f"more than {max_size} bytes")
        if length is not None and len(body) != length:
            raise http.client.IncompleteRead(bytes(body[:16]), length - len(body))
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(status, names, bytes(body))

    def _refused(self, status: int, what: str, found: object) -> RemoteServiceError:
        return bad_answer(f"{self.what} ({self.url}): {what}", status=status, found=found)


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    body: bytes | None
    headers: Mapping[str, str]
    max_size: int
    repeatable: bool

    def without_body(self) -> _Request:
        """Return the same without its content, for a first request."""
        empty = None if self.body is None else b""
        return _Request(
            self.method, self.target, empty, self.headers, self.max_size, self.repeatable
        )


def bad_answer(
    message: str, *, status: int = 200, expected: object = None, found: object = None
) -> RemoteServiceError:
    """Return the error for an answer that is none."""
    return RemoteServiceError(
        message, status=status, error_code="BadAnswer", expected=expected, found=found
    )


def json_of(answer: Answer, what: str) -> dict[str, Any]:
    """
    Return the JSON object of a good answer.

    Raises:
        RemoteServiceError: It is an error (`error_of`), or not one JSON object.

    """
    if not 200 <= answer.status < 300:
        raise error_of(answer, what)
    try:
        return jsonstrict.object_of(answer.body, what)
    except EvidenceFormatError as error:
        raise bad_answer(
            error.message, status=answer.status, expected=error.expected, found=error.found
        ) from None


def _plain(value: object, limit: int) -> str | None:
    """Return a text of the service as one line that is safe to print."""
    if not isinstance(value, str) or not value:
        return None
    return "".join(c if c.isprintable() else "·" for c in value[:limit])


def error_of(answer: Answer, what: str) -> RemoteServiceError:
    """
    Return the error that a service answered: ``{"error": {"code", "message", "innererror"}}``.

    What is no such body is reported by its status alone.
    """
    try:
        inside = jsonstrict.object_of(answer.body, what).get("error")
    except EvidenceFormatError:
        inside = None
    inside = inside if isinstance(inside, dict) else {}
    code = inside.get("code")
    inner = inside.get("innererror")
    inner = inner if isinstance(inner, dict) else {}
    known = isinstance(code, str) and _CODE.fullmatch(code)
    message = _plain(inside.get("message"), 2000) or f"status {answer.status}"
    reference = inner.get("reference") or inside.get("reference")
    return RemoteServiceError(
        f"{what}: {message}",
        status=answer.status,
        error_code=str(code) if known else "Unknown",
        inner=_plain(inner.get("code"), 100),
        retry_after=retry_after(answer.headers.get("retry-after")) or None,
        reference=_plain(reference, 100) or _plain(answer.headers.get("x-ms-request-id"), 100),
    )
