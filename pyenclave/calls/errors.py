"""
Errors that cross from the enclave to the host, as bytes.

An exception crosses as its type's name and a correlation id. Its text crosses only if the class
says that it is public, in a debug enclave, or if the call was not made at all: then the text
comes from this package and is about the signature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec

from pyenclave._core import msgpack_check
from pyenclave.errors import (
    ArgumentError,
    CallError,
    EcallError,
    OcallError,
    UnknownFunctionError,
)

__all__ = ["MAX_TEXT", "ErrorFrame", "cut", "from_frame", "to_frame"]

MAX_TEXT = 4096
MAX_FIELDS = 4096  # bytes of a public error's fields, encoded

_CODES = {cls.code: cls for cls in (CallError, ArgumentError, UnknownFunctionError)}


class ErrorFrame(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """What an error frame says; all texts are capped."""

    code: str
    message: str
    type: str = ""
    id: str = ""
    advice: str | None = None
    public: bool = False
    fields: bytes = b""  # a MessagePack map, of a public error


_decoder = msgspec.msgpack.Decoder(ErrorFrame, strict=True)


@functools.cache
def _fields_hooks() -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    # Needs NumPy, which the platform, who has no such fields, starts much sooner without.
    from pyenclave.calls.types import hooks

    return hooks(dict[str, Any])


def cut(text: str, most: int = MAX_TEXT) -> str:
    """Return *text* in at most *most* bytes of UTF-8, lone surrogates replaced."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def to_frame(error: BaseException, *, called: bool, show: bool, correlation: str) -> bytes:
    """
    Describe *error* for the host.

    Args:
        error: What was raised inside.
        called: Whether the trusted function was entered; before that, errors are this package's.
        show: Debug: let the text cross.
        correlation: Id under which a debug enclave's log has the traceback.

    """
    kind = type(error)
    if isinstance(error, EcallError) and not called:  # a native function's status
        frame = ErrorFrame(code=EcallError.code, message="", type=cut(error.type), id=correlation)
        return msgspec.msgpack.encode(frame)
    if isinstance(error, CallError) and not called:
        details = [error.message]
        if error.expected is not None:
            details.append(f"expected {error.expected}")
        if error.found is not None:
            details.append(f"found {error.found}")
        frame = ErrorFrame(
            code=error.code if error.code in _CODES else CallError.code,
            message=cut("; ".join(details)),
            advice=None if error.advice is None else cut(error.advice),
        )
        return msgspec.msgpack.encode(frame)
    if isinstance(error, OcallError) and error.from_host:
        # What it says is what the host did itself, and the name of a declared function.
        frame = ErrorFrame(
            code=OcallError.code,
            message=cut(error.message),
            type=cut(error.type, 128),
            id=correlation,
        )
        return msgspec.msgpack.encode(frame)
    public = getattr(kind, "public", False) is True
    text = ""
    if show or public:
        try:
            text = str(error)
        except Exception:
            text = ""
    frame = ErrorFrame(
        code=EcallError.code,
        message=cut(text),
        type=cut(kind.__name__, 128),
        id=correlation,
        public=public,
        fields=_fields_of(error) if public else b"",
    )
    return msgspec.msgpack.encode(frame)


def _fields_of(error: BaseException) -> bytes:
    """Return the declared fields of a public error; none if they do not cross or are too long."""
    declared = getattr(error, "public_fields", None)
    if not callable(declared):
        return b""
    try:
        data = _fields_hooks()[0](declared())
    except Exception:  # of trusted code, and it must not hide what was raised
        return b""
    return data if len(data) <= MAX_FIELDS else b""


def _read_fields(data: bytes) -> dict[str, Any]:
    if not data or len(data) > MAX_FIELDS or not msgpack_check(data):
        return {}
    try:
        found: dict[str, Any] = _fields_hooks()[1](data)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OverflowError):
        return {}
    return found


def from_frame(data: bytes, note: str = "") -> CallError:
    """
    Return the exception that an error frame of the enclave describes.

    Args:
        data: The frame; untrusted.
        note: The id that the host gave the call, which then is the error's; a debug enclave's log
            has it too.

    """
    try:
        frame = _decoder.decode(data) if len(data) <= 4 * MAX_TEXT else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        frame = None
    if frame is None:
        return CallError("the enclave answered with an error that cannot be read")
    if frame.code == OcallError.code:
        return OcallError(frame.message, type=frame.type, id=frame.id)
    if frame.code in _CODES:
        return _CODES[frame.code](frame.message, advice=frame.advice)
    shown = f"{frame.type}: {frame.message}" if frame.message else frame.type
    correlation = note or frame.id
    return EcallError(
        f"the trusted function raised {shown}" + (f" [{correlation}]" if correlation else ""),
        type=frame.type,
        id=correlation,
        public=frame.public,
        fields=_read_fields(frame.fields) if frame.public else {},
    )
