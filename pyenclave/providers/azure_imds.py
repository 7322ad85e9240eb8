"""
Azure's metadata service, for the one thing that evidence of a TDX VM needs of it: the TD quote.

A TDREPORT can be verified by its own machine only; the service below the VM has it quoted. It
answers at a link-local address over plain HTTP, and what it says is signed by the hardware and
compared with the TDREPORT by whoever verifies. The project's notes on evidence providers, 1.6.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from typing import Final
from urllib.parse import urlsplit

from pyenclave.errors import EvidenceFormatError, ProviderError
from pyenclave.formats import jsonstrict
from pyenclave.formats.hcl import TD_REPORT_SIZE, base64url

__all__ = ["IMDS", "quote_td_report"]

IMDS: Final = "http://169.254.169.254"
_PATH: Final = "/acc/tdquote"
_MAX_SIZE: Final = 64 << 10
_PAUSE: Final = 0.5  # seconds; the service is the host's, and throttles
_BUSY: Final = frozenset(
    (404, 410, 429, 500, 503)
)  # that its documentation says to ask again after


def quote_td_report(report: bytes, *, base: str = IMDS, timeout: float = 10.0) -> bytes:
    """
    Have this Azure VM's TDREPORT quoted.

    Args:
        report: The TDREPORT of the HCL report, 1,024 bytes.
        base: The service's address. No proxy is asked.
        timeout: Seconds for all of it.

    Returns:
        The TD quote; zeros may follow it.

    Raises:
        ProviderError: No answer, or not one of the documented form.
        ValueError: No TDREPORT, or no address of a service.

    """
    if len(report) != TD_REPORT_SIZE:
        raise ValueError(f"a TDREPORT has {TD_REPORT_SIZE} bytes, not {len(report)}")
    parts = urlsplit(base)
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.username is not None:
        raise ValueError(f"not the address of a metadata service: {base!r} (http://HOST[:PORT])")
    text = base64.urlsafe_b64encode(report).rstrip(b"=").decode("ascii")
    request = json.dumps({"report": text}).encode("ascii")
    path = parts.path.rstrip("/") + _PATH
    deadline = time.monotonic() + timeout
    while True:
        status, body = _ask(parts.hostname, parts.port or 80, path, request, deadline)
        if status == 200:
            return _quote_in(body, base)
        if status not in _BUSY or time.monotonic() + _PAUSE >= deadline:
            raise _unanswered(base, f"status {status}")
        time.sleep(_PAUSE)


def _ask(host: str, port: int, path: str, request: bytes, deadline: float) -> tuple[int, bytes]:
    """Ask once, and return the status and the body; all of it ends at the deadline."""
    left = max(0.001, deadline - time.monotonic())
    connection = http.client.HTTPConnection(host, port, timeout=left)
    try:
        connection.connect()
        # A server that says a byte now and then would keep every single read from timing out.
        guard = threading.Timer(left, _shut, (connection.sock,))
        guard.daemon = True
        try:
            guard.start()  # Ctrl-C may come when it runs already
            connection.request(
                "POST",
                path,
                body=request,
                headers={"Metadata": "true", "Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            body = answer.read(_MAX_SIZE + 1)
        finally:
            guard.cancel()
    except (OSError, http.client.HTTPException) as error:
        raise _unanswered(f"http://{host}:{port}", str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if time.monotonic() >= deadline:  # what was cut off may look like an end
        raise _unanswered(f"http://{host}:{port}", "no whole answer in time")
    if len(body) > _MAX_SIZE:
        raise ProviderError(
            "the metadata service's answer is too long", expected=f"at most {_MAX_SIZE} bytes"
        )
    return answer.status, body


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _quote_in(body: bytes, base: str) -> bytes:
    name = f"{base}{_PATH}"
    value = jsonstrict.loads(body, name, error=ProviderError, max_size=_MAX_SIZE)
    if not isinstance(value, dict) or not isinstance(value.get("quote"), str):
        raise ProviderError(f"{name}: wrong members", expected="quote")
    try:
        return base64url(value["quote"], "quote", max_size=_MAX_SIZE)
    except EvidenceFormatError as error:
        raise ProviderError(f"{name}: not a quote", found=str(error)[:200]) from None


def _unanswered(base: str, found: str) -> ProviderError:
    return ProviderError(
        "Azure's metadata service made no quote of the TDREPORT",
        expected="status 200 and a whole answer",
        found=found[:200],
        advice=f"It answers inside Azure's VMs only, at {IMDS}; asked was {base[:100]}.",
    )
