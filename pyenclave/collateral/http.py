"""
A small HTTP client for collateral: nothing that a hostile server can make large.

TLS certificates are always checked. Plain HTTP is for this machine and the cloud's metadata address
alone. A redirect is never followed. Sizes and the whole time are capped, also against a server that
sends a byte now and then. No proxy is taken from the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from pyenclave._files import read_file
from pyenclave._locks import Lock
from pyenclave.errors import CollateralError
from pyenclave.formats.retry_after import retry_after

__all__ = ["METADATA_HOST", "Client", "Response"]

_DAY: Final = 86_400.0  # seconds
METADATA_HOST: Final = "169.254.169.254"
_RETRIED: Final = frozenset({429, 500, 502, 503, 504})
_CHUNK: Final = 64 << 10
_MAX_CA: Final = 4 << 20  # bytes of a file of authorities
# What PCCS means by its statuses (Intel's PCCS, "status codes"); others speak for themselves.
_MEANING: Final = {
    400: "the request is not understood",
    401: "not authorised",
    403: "refused",
    404: "nothing is known of this platform",
    410: "this version of the interface is retired",
    413: "too large",
    429: "too many requests",
    460: "the service's integrity check failed",
    461: "the platform is unknown",
    462: "the certificates of this platform are not there",
}


@dataclass(frozen=True, slots=True)
class Response:
    """An answer with status 200; header names are in lower case."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(slots=True)
class Client:
    """
    How to ask.

    Attributes:
        timeout: Seconds for one `get`, all attempts and pauses included.
        attempts: How often a busy or broken server is asked.
        pause: Seconds before the second attempt; doubled each time, and with chance in it.
        ca_file: PEM file of the authorities that are trusted *instead of* the system's, for a
            caching service of one's own.
        ca_data: The same as PEM text.
    """

    timeout: float = 30.0
    attempts: int = 4
    pause: float = 0.5
    ca_file: str | None = None
    ca_data: str | None = field(default=None, repr=False)
    _context: ssl.SSLContext | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _DAY:
            raise ValueError(
                f"timeout: expected seconds, above 0 and at most {_DAY:,.0f}, found {self.timeout}"
            )
        if self.attempts < 1 or not 0 <= self.pause <= _DAY:
            raise ValueError("attempts at least 1, pause not negative and at most a day")

    async def get(
        self, url: str, *, max_size: int, headers: Mapping[str, str] | None = None
    ) -> Response:
        """
        Get *url*.

        Args:
            url: An https address; http on this machine and for the cloud's metadata service.
            max_size: Bytes of body that are accepted.
            headers: Further request headers.

        Raises:
            CollateralError: No answer in time, an answer that is refused, or one too large.

        """
        deadline = time.monotonic() + self.timeout
        for attempt in range(1, self.attempts + 1):
            request = _Request(self, url, max_size, headers or {}, deadline)
            work = asyncio.get_running_loop().run_in_executor(None, request.run)
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                request.abort()  # the thread ends with its socket
                raise
            if isinstance(answer, Response):
                return answer
            wait = max(answer.wait, self.pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))  # noqa: S311
            last = attempt == self.attempts or not answer.retry
            if last or time.monotonic() + wait >= deadline:
                tries = f" (after {attempt} attempts)" if attempt > 1 else ""
                raise CollateralError(
                    f"{url.partition('?')[0]}: no collateral{tries}",
                    expected="status 200 and a whole answer",
                    found=answer.found,
                    advice=answer.advice,
                )
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def context(self) -> ssl.SSLContext:
        """Return the TLS settings: certificates and names are checked, TLS 1.2 or later."""
        if self._context is None:
            try:
                trusted = self.ca_data
                if self.ca_file is not None:
                    text = read_file(self.ca_file, limit=_MAX_CA).decode("ascii", "replace")
                    trusted = f"{trusted or ''}\n{text}"  # never empty: that is the system's
                context = ssl.create_default_context(cadata=trusted)
            except (OSError, ValueError) as error:
                raise CollateralError(
                    "the file of trusted authorities cannot be read", found=str(error)
                ) from None
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            # A person's certificate of the same authority may have any common name (RFC 9525, 2).
            context.hostname_checks_common_name = False
            self._context = context
        return self._context


@dataclass(frozen=True, slots=True)
class _Failure:
    found: str
    retry: bool
    wait: float = 0.0
    advice: str | None = None


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Request:
    """One attempt, in a thread of its own."""

    def __init__(
        self,
        client: Client,
        url: str,
        max_size: int,
        headers: Mapping[str, str],
        deadline: float,
    ) -> None:
        self._client = client
        self._max_size = max_size
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._deadline = deadline
        self._lock = Lock()
        self._aborted = False
        # http.client forgets the socket once an answer has begun that ends with the connection.
        self._socket: socket.socket | None = None
        self._connection = self._connect(url)

    def _connect(self, url: str) -> http.client.HTTPConnection:
        if not url.isascii() or not url.isprintable() or " " in url:
            raise CollateralError("not an address", found=repr(url)[:200])
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise CollateralError("not an address", found=url[:200]) from None
        host = parts.hostname
        if not host or parts.username is not None or parts.fragment:
            raise CollateralError("not an address of a service", found=url[:200])
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        timeout = max(0.001, self._deadline - time.monotonic())
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=timeout, context=self._client.context()
            )
        if parts.scheme == "http" and (_is_local(host) or host == METADATA_HOST):
            return http.client.HTTPConnection(host, port, timeout=timeout)
        raise CollateralError(
            "collateral is fetched over TLS only",
            expected="https (http: this machine or the cloud's metadata address)",
            found=f"{parts.scheme}://{host}"[:200],
        )

    def abort(self) -> None:
        """End the attempt, from any thread."""
        with self._lock:
            self._aborted = True
            sock = self._socket or self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                sock.shutdown(socket.SHUT_RDWR)

    def run(self) -> Response | _Failure:
        """Ask once. The whole attempt ends at the deadline, however slowly the server speaks."""
        guard = threading.Timer(max(0.001, self._deadline - time.monotonic()), self.abort)
        guard.daemon = True
        try:
            guard.start()  # Ctrl-C may come when it runs already
            return self._run()
        except ssl.SSLCertVerificationError as error:
            return _Failure(
                f"the server's certificate is refused: {error.verify_message}",
                retry=False,
                advice="For a caching service with its own authority name that with ca_file.",
            )
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= self._deadline or self._aborted:
                return _Failure(f"no whole answer in {self._client.timeout:g} s", retry=False)
            return _Failure(str(error) or type(error).__name__, retry=True)
        finally:
            guard.cancel()
            self._connection.close()

    def _run(self) -> Response | _Failure:
        self._connection.connect()
        with self._lock:
            self._socket = self._connection.sock
            if self._aborted:
                raise TimeoutError
        self._connection.request("GET", self._path, headers=self._headers)
        answer = self._connection.getresponse()
        status = answer.status
        if 300 <= status < 400:
            target = (answer.getheader("Location") or "")[:200]
            return _Failure(f"a redirect to {target!r}, which is not followed", retry=False)
        if status != 200:
            wait = retry_after(answer.getheader("Retry-After"))
            asked = f" (asks to wait {wait:g} s)" if wait else ""
            return _Failure(
                f"status {status}: {_MEANING.get(status, answer.reason)}"[:200] + asked,
                retry=status in _RETRIED,
                wait=wait,
            )
        length = answer.length
        if length is not None and length > self._max_size:
            return _Failure(f"{length} bytes, more than {self._max_size}", retry=False)
        body = bytearray()
        while chunk := answer.read(_CHUNK):
            body += chunk
            if len(body) > self._max_size:
                return _Failure(f"more than {self._max_size} bytes", retry=False)
        if self._aborted:
            raise TimeoutError
        if length is not None and len(body) != length:
            return _Failure(f"{len(body)} of {length} bytes", retry=True)
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Response(bytes(body), headers)
