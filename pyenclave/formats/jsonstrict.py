"""
JSON as RFC 8259 has it, with nothing that two readers could understand differently.

Refused: a name that occurs twice, NaN and Infinity, numbers that no 64 bits hold, text that is not
UTF-8, a byte order mark, lone surrogates, bytes after the value, and nesting or sizes beyond the
caps. What was signed is handed out byte by byte by `member_bytes`.
"""

from __future__ import annotations

import json
import re
from json.decoder import JSONDecodeError
from typing import Any, Final, NoReturn

from pyenclave.errors import EnclaveError, EvidenceFormatError

__all__ = ["MAX_DEPTH", "MAX_SIZE", "loads", "member_bytes", "object_of"]

MAX_DEPTH: Final = 32
MAX_SIZE: Final = 4 << 20  # bytes
_MIN_INT: Final = -(1 << 63)
_MAX_INT: Final = (1 << 64) - 1
_MAX_NUMBER: Final = 64  # characters of one number
_SHORT: Final = 32 << 10  # characters
# A string, also one that never ends: the pattern always matches at a quote, so that hostile text
# costs one pass.
_STRING: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS: Final = re.compile(r"[^\[\]{}]+")
_LONG_NUMBER: Final = re.compile(r"[-+.0-9eE]{19,}")
_EXPONENT: Final = re.compile(r"[0-9][eE]")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE: Final = re.compile(r"[ \t\n\r]*+")


class _RefusedError(Exception):
    """Carries what was wrong out of the decoder."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _RefusedError("each name once", f"{double[:40]!r} twice")
    return value


def _no_constant(text: str) -> NoReturn:
    raise _RefusedError("a number", text)


def _integer(text: str) -> int:
    if len(text) > _MAX_NUMBER:
        raise _RefusedError("an integer of 64 bits", f"{len(text)} digits")
    value = int(text)
    if not _MIN_INT <= value <= _MAX_INT:
        raise _RefusedError("an integer of 64 bits", text)
    return value


def _fraction(text: str) -> float:
    if len(text) > _MAX_NUMBER:
        raise _RefusedError("a number", f"{len(text)} digits")
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _RefusedError("a finite number", text)
    return value


_FAST: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_CAREFUL: Final = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_constant,
    parse_int=_integer,
    parse_float=_fraction,
)
_SKIPPING: Final = json.JSONDecoder()  # only for text that was checked before


def _text(data: bytes | str, what: str, error: type[EnclaveError], max_size: int) -> str:
    if not isinstance(data, bytes | bytearray | memoryview | str):
        raise TypeError(f"{what} is bytes or str, not {type(data).__name__}")
    if len(data) > max_size:
        raise error(
            f"{what}: too large", expected=f"at most {max_size} bytes", found=f"{len(data)} bytes"
        )
    if isinstance(data, str):
        return data
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{what}: not UTF-8", expected="UTF-8", found=f"a wrong byte at {problem.start}"
        ) from None


def _few_brackets(text: str, most: int) -> bool:
    """Whether *text* opens at most so many objects and arrays; strings count like the rest."""
    found = 0
    for bracket in "{[":
        at = text.find(bracket)
        while at >= 0:
            found += 1
            if found > most:
                return False
            at = text.find(bracket, at + 1)
    return True


def _check_depth(bare: str, what: str, error: type[EnclaveError], max_depth: int) -> None:
    depth = deepest = 0
    for bracket in _BRACKETS.sub("", bare):
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    if deepest > max_depth:
        raise error(f"{what}: nested too deeply", expected=f"at most {max_depth}", found=deepest)


def loads(
    data: bytes | str,
    what: str = "JSON",
    error: type[EnclaveError] = EvidenceFormatError,
    *,
    max_depth: int = MAX_DEPTH,
    max_size: int = MAX_SIZE,
) -> Any:
    """
    Read one JSON value.

    Args:
        data: The bytes, or text.
        what: What is read, for errors.
        error: Class of the errors.
        max_depth: How many objects and arrays may be nested.
        max_size: How many bytes (or characters of text) are looked at.

    Returns:
        dict, list, str, int, float, bool or None.

    Raises:
        EnclaveError: Of class *error*, if anything is malformed or ambiguous.

    """
    text = _text(data, what, error, max_size)
    # So few brackets, in strings or not, cannot nest too deeply; and in a short text looking for
    # doubtful numbers costs more than reading each of them with care.
    careful = len(text) <= _SHORT and _few_brackets(text, max_depth)
    if not careful:
        bare = _STRING.sub('""', text)
        _check_depth(bare, what, error, max_depth)
        careful = bool(_LONG_NUMBER.search(bare) or _EXPONENT.search(bare))
    try:
        value = (_CAREFUL if careful else _FAST).decode(text)
        if "\\" in text and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _RefusedError as refused:
        raise error(
            f"{what}: ambiguous or out of range", expected=refused.expected, found=refused.found
        ) from None
    except JSONDecodeError as problem:
        raise error(
            f"{what}: malformed JSON", expected="JSON", found=f"{problem.msg} at {problem.pos}"
        ) from None
    except UnicodeEncodeError:
        raise error(
            f"{what}: malformed JSON", expected="whole characters", found="half a surrogate pair"
        ) from None
    return value


def object_of(
    data: bytes | str,
    what: str = "JSON",
    error: type[EnclaveError] = EvidenceFormatError,
    *,
    max_depth: int = MAX_DEPTH,
    max_size: int = MAX_SIZE,
) -> dict[str, Any]:
    """Read one JSON object; the arguments and errors are those of `loads`."""
    value = loads(data, what, error, max_depth=max_depth, max_size=max_size)
    if not isinstance(value, dict):
        raise error(f"{what}: not an object", expected="an object", found=type(value).__name__)
    return value


def member_bytes(
    data: bytes,
    name: str,
    what: str = "JSON",
    error: type[EnclaveError] = EvidenceFormatError,
    *,
    max_depth: int = MAX_DEPTH,
    max_size: int = MAX_SIZE,
) -> bytes:
    """
    Return the bytes of member *name* of the object *data*, exactly as they stand there.

    Signatures of collateral are over these bytes, without the space around the value.

    Raises:
        EnclaveError: Of class *error*: what `loads` refuses, not an object, or no such member.

    """
    object_of(data, what, error, max_depth=max_depth, max_size=max_size)
    text = bytes(data).decode("utf-8")
    at = _after_space(text, text.index("{") + 1)
    while text[at] == '"':
        key, at = _SKIPPING.raw_decode(text, at)
        at = _after_space(text, _after_space(text, at) + 1)
        _, end = _SKIPPING.raw_decode(text, at)
        if key == name:
            return text[at:end].encode("utf-8")
        at = _after_space(text, end)
        if text[at] == "}":
            break
        at = _after_space(text, at + 1)
    raise error(f"{what}: a member is missing", expected=name, found="none of that name")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
