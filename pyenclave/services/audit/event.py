"""What is written to the audit log: one event a decision."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from pyenclave.formats.audit_log import MAX_BODY

__all__ = ["Decision", "Event", "body_of"]

Decision = Literal["allowed", "refused", "failed"]

_MAX_DEPTH: Final = 24  # of what a caller's JSON may nest inside one member
_MAX_ITEMS: Final = 2_000
_MAX_TEXT: Final = 4_096
_SHORT: Final = 256
_I64: Final = -(1 << 63)
_U64: Final = (1 << 64) - 1


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """
    One decision, or one thing done.

    Everything may come from a stranger: what is no JSON is written as text, what is too long is
    cut or replaced by its digest, so that no input keeps a decision out of the log. Secrets and
    whole tokens do not belong here; their digests do.

    Attributes:
        action: What was asked, as Key Vault names it or ``service/verb``.
        decision: "allowed", "refused" (a rule said no) or "failed" (it could not be done).
        caller: Who asked: the identity's object id, or "" where there was none.
        resource: What it was about, as ``/keys/NAME/VERSION``.
        rule: The rule that decided: a role, a policy with its digest.
        condition: The condition that failed.
        expected: What that condition wanted.
        found: What it found.
        claims: The claims that were judged.
        evidence_digest: SHA-256 of the evidence or token, in hexadecimal.
        token_id: ``jti`` or digest of the caller's token.
        request_id: Id of the request, as the answer names it.
        details: Whatever else helps a reviewer.

    """

    action: str
    decision: Decision
    caller: str = ""
    resource: str = ""
    rule: str = ""
    condition: str = ""
    expected: Any = None
    found: Any = None
    claims: Mapping[str, Any] | None = None
    evidence_digest: str = ""
    token_id: str = ""
    request_id: str = ""
    details: Mapping[str, Any] | None = None


class _Body(msgspec.Struct, omit_defaults=True):
    """The hashed form: an event with its time and reference; members in alphabetical order."""

    action: str
    at: str
    decision: str
    reference: str
    caller: str = ""
    claims: Any = None
    condition: str = ""
    details: Any = None
    evidence_digest: str = ""
    expected: Any = None
    found: Any = None
    request_id: str = ""
    resource: str = ""
    rule: str = ""
    token_id: str = ""


_ENCODE: Final = msgspec.json.Encoder(order="sorted").encode


def body_of(event: Event, *, at: str, reference: str) -> bytes:
    """
    Return the canonical JSON of a row: members sorted, no space, UTF-8.

    Args:
        event: What happened.
        at: RFC 3339 time.
        reference: The row's reference id.

    """
    body = _Body(
        action=event.action,
        at=at,
        decision=event.decision,
        reference=reference,
        caller=event.caller,
        claims=event.claims if event.claims is None else _plain(event.claims),
        condition=event.condition,
        details=event.details if event.details is None else _plain(event.details),
        evidence_digest=event.evidence_digest,
        expected=event.expected if event.expected is None else _plain(event.expected),
        found=event.found if event.found is None else _plain(event.found),
        request_id=event.request_id,
        resource=event.resource,
        rule=event.rule,
        token_id=event.token_id,
    )
    try:
        encoded = _ENCODE(body)
        if len(encoded) <= MAX_BODY:
            return encoded
    except (UnicodeEncodeError, TypeError, RecursionError):
        pass
    return _ENCODE(_bounded(body))


def _bounded(body: _Body) -> _Body:
    """Make every member writable and the whole small: what is large becomes its digest."""
    for name in ("claims", "details", "expected", "found"):
        value = getattr(body, name)
        if value is not None:
            encoded = _ENCODE(value)
            if len(encoded) > MAX_BODY // 8:
                digest = hashlib.sha256(encoded).hexdigest()
                setattr(body, name, {"omitted_bytes": len(encoded), "sha256": digest})
    for name in _Body.__struct_fields__:
        value = getattr(body, name)
        if name not in {"claims", "details", "expected", "found"}:
            text = _text(value if isinstance(value, str) else repr(value), _SHORT)
            setattr(body, name, text)
    return body


def _text(value: str, limit: int = _MAX_TEXT) -> str:
    if len(value) > limit:
        value = value[:limit] + "…"
    # Half a surrogate pair is no character, and no UTF-8.
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def _plain(value: object, depth: int = 0) -> Any:
    """Return *value* as JSON that any reader takes; what is none becomes text."""
    if type(value) is str and len(value) <= _MAX_TEXT and value.isascii():
        return value  # nearly all there is
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return (
            int(value)
            if _I64 <= value <= _U64
            else _text(str(value) if value.bit_length() < 8_000 else hex(value))
        )
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _text(bytes(value).hex())
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        pairs = list(value.items())
        plain = {
            _text(name if isinstance(name, str) else repr(name), _SHORT): _plain(item, depth + 1)
            for name, item in pairs[:_MAX_ITEMS]
        }
        if len(pairs) > _MAX_ITEMS:
            plain["…"] = len(pairs) - _MAX_ITEMS
        return plain
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
        cut = [_plain(item, depth + 1) for item in items[:_MAX_ITEMS]]
        return [*cut, f"… {len(items) - _MAX_ITEMS} more"] if len(items) > _MAX_ITEMS else cut
    return _text(str(value), _SHORT)
