"""The way of a release through the host: asked again where that may help, and never believed."""

from __future__ import annotations

import time
from typing import Any, Final

from pyenclave.calls import services
from pyenclave.errors import EvidenceFormatError, KeyReleaseError, OcallError, UnknownFunctionError
from pyenclave.formats import jsonstrict, release
from pyenclave.trusted import _state

__all__ = ["ask", "object_of", "refusal"]

_TRANSIENT: Final = frozenset({0, 408, 429, 500, 502, 503, 504})
_ATTEMPTS: Final = 3  # beside those that the relay makes itself
_PAUSE: Final = 0.1


def ask(
    service: str,
    base: str,
    method: str,
    path: str,
    api_version: str,
    body: dict[str, Any],
    deadline: float,
) -> tuple[int, bytes]:
    """Ask through the host, again where that may help; status 0: no answer."""
    data = release.canonical(body)
    limit = _state.current().message_limit
    if len(data) > min(services.MAX_BODY, limit - 4096):
        raise KeyReleaseError(
            f"the request to the {service} is too long",
            check="relay.size",
            expected=f"{min(services.MAX_BODY, limit - 4096)} bytes",
            found=len(data),
        )
    for attempt in range(1, _ATTEMPTS + 1):
        left = deadline - time.monotonic()
        if left <= 0:
            raise KeyReleaseError(
                f"the {service} did not answer in time", check="deadline", transient=True
            )
        found = _relayed((service, base, method, path, api_version, data, left))
        pause = _PAUSE * 3 ** (attempt - 1)
        if found[0] not in _TRANSIENT or attempt == _ATTEMPTS:
            return found
        if time.monotonic() + pause >= deadline:
            return found
        time.sleep(pause)
    raise AssertionError("unreachable")


def _relayed(values: tuple[object, ...]) -> tuple[int, bytes]:
    from pyenclave.trusted._ocall import call_host

    try:
        answer = call_host(services.NAME, *values)
    except UnknownFunctionError:
        raise KeyReleaseError(
            "the image has no key release",
            check="relay.absent",
            advice="Say [release] in the manifest (Enclave.from_file: release=True).",
        ) from None
    except OcallError as error:
        raise KeyReleaseError(
            f"the host's relay refused: {error.type or error}",
            check="relay.refused",
            advice="Is pyenclave.relay(vault=…, attestation=…) given for these services?",
        ) from None
    status, body = answer
    if len(body) > services.MAX_BODY:
        raise KeyReleaseError(
            "the host's relay answers too much",
            check="relay.size",
            expected=f"{services.MAX_BODY} bytes",
            found=len(body),
        )
    return int(status), bytes(body)


def object_of(data: bytes, what: str, check: str) -> dict[str, Any]:
    """Read an answer that is one JSON object; KeyReleaseError by *check* otherwise."""
    try:
        return jsonstrict.object_of(data, what)
    except EvidenceFormatError as error:
        raise KeyReleaseError(
            error.message, check=check, expected=error.expected, found=error.found
        ) from None


def _line(value: object, limit: int = 300) -> str | None:
    """Return a text that came through the host as one line that is safe to print."""
    if not isinstance(value, str) or not value:
        return None
    return "".join(c if c.isprintable() else "·" for c in value[:limit])


def refusal(check: str, message: str, status: int, answer: bytes) -> KeyReleaseError:
    """Return the error for a refusal, with the words of the service as the host gives them."""
    try:
        said = jsonstrict.object_of(answer, "error").get("error")
    except EvidenceFormatError:
        said = None
    said = said if isinstance(said, dict) else {}
    inner = said.get("innererror")
    inner = inner if isinstance(inner, dict) else {}
    words = _line(said.get("message"))
    return KeyReleaseError(
        f"{message}: {words}" if words else message,
        check=check if status else "service.silent",
        found=f"status {status}" if status else "no answer",
        status=status,
        error_code=_line(said.get("code"), 100) or "",
        inner=_line(inner.get("code"), 100),
        reference=_line(inner.get("reference"), 100) or _line(said.get("reference"), 100),
        transient=status in _TRANSIENT,
    )
