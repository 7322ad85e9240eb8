"""
The written form of an appraisal policy: JSON or TOML, binary values as hexadecimal digits.

Digits are lower-case and of exactly the right number, names occur once, and an unknown field is an
error: a policy that is not understood whole must not be applied in part.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from pyenclave.attestation.references import Reference
from pyenclave.errors import EvidenceFormatError

if TYPE_CHECKING:
    from pyenclave.attestation.policy import AppraisalPolicy

__all__ = ["hint", "plain", "text_of", "values_of"]

_HEX: Final = re.compile(r"(?:[0-9a-f]{2})+")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,3}")
_WINDOW: Final = ("value", "not_before", "not_after")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_MAX_DEPTH: Final = 16
# Lists of what is accepted: without a word they would accept everything, which nobody means.
_NO_EMPTY: Final = frozenset({"issuers", "product_lines"})
# TOML: strings (four forms) and comments, so that only brackets of structure are counted. A string
# that does not end is malformed, and taken as far as it goes: looking for its end again from every
# later quote would take time with their square.
_TOML_OPAQUE: Final = re.compile(
    r'''
    """(?:[^"\\]|\\.?|"{1,2}(?!"))*+(?:"{3,5}|\Z)
    | \'{3}(?:[^\']|\'{1,2}(?!\'))*+(?:\'{3,5}|\Z)
    | "(?:[^"\\\n]|\\.?)*+(?:"|\Z|(?=\n))
    | \'[^\'\n]*+(?:\'|\Z|(?=\n))
    | \#[^\n]*
    ''',
    re.DOTALL | re.VERBOSE,
)


def values_of(text: str, *, form: str) -> dict[str, Any]:
    """
    Return the fields of a written policy, digits as bytes.

    Raises:
        ValueError: Not well-formed, or a value that is no value of its field.

    """
    from pyenclave.attestation.policy import REFERENCES, REGISTERS, WORDS

    if form not in ("json", "toml"):
        raise ValueError(f"policy: {form!r} is neither json nor toml")
    values = _toml(text) if form == "toml" else _json(text)
    if not isinstance(values, dict):
        raise ValueError("policy: not a table of fields")
    for name, value in values.items():
        if name in REFERENCES:
            values[name] = _listed(name, value, REFERENCES[name][0])
        elif name in REGISTERS:
            values[name] = _table(name, value, REGISTERS[name][0])
        elif name in WORDS and isinstance(value, list):
            if not value and name in _NO_EMPTY:
                raise ValueError(f"policy: {name} is empty and would demand nothing; leave it out")
            values[name] = tuple(value)
        elif value is None:
            raise ValueError(f"policy: {name} has no value; leave it out instead")
    return values


def hint(name: str, known: Collection[str]) -> str:
    """Return a question about what was probably meant, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _json(text: str) -> Any:
    from pyenclave.formats import jsonstrict

    try:
        return jsonstrict.loads(text, "policy", max_depth=_MAX_DEPTH)
    except EvidenceFormatError as error:
        raise ValueError(str(error)) from None


def _toml(text: str) -> Any:
    depth = dots = 0
    for character in _TOML_OPAQUE.sub("", text):
        if character == ".":
            # Every dot of a name is a table, and the library's time grows with their square.
            dots += 1
        elif character in "[{":
            depth += 1
            dots = 0
        elif character in "]}":
            depth -= 1
        elif character in "=,\n":
            dots = 0
        if max(depth, dots) > _MAX_DEPTH:
            raise ValueError("policy: nested too deeply")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"policy: malformed TOML: {error}") from None


def _digits(name: str, value: Any, sizes: tuple[int, ...]) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"policy: {name}: {type(value).__name__} is not hexadecimal digits")
    if len(value) not in [2 * size for size in sizes]:
        wanted = " or ".join(str(2 * size) for size in sizes)
        raise ValueError(f"policy: {name} has {wanted} hexadecimal digits, not {len(value)}")
    if not _HEX.fullmatch(value):
        advice = " (lower case)" if _HEX.fullmatch(value.lower()) else ""
        raise ValueError(f"policy: {name}: {value[:16]!r}… is not hexadecimal digits{advice}")
    return bytes.fromhex(value)


def _time(name: str, value: Any) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"policy: {name}: {value[:40]!r} is no RFC 3339 time") from None
    if not isinstance(value, datetime):
        raise ValueError(f"policy: {name} is a time with a zone, such as 2027-01-31T00:00:00Z")
    if value.tzinfo is None:
        raise ValueError(f"policy: {name} has no zone; end it in Z for UTC")
    return value


def _one(name: str, value: Any, sizes: tuple[int, ...]) -> Reference:
    if not isinstance(value, dict):
        return Reference(_digits(name, value, sizes))
    for key in value:
        if key not in _WINDOW:
            raise ValueError(f"policy: {name}: unknown member {key!r}{hint(key, _WINDOW)}")
    if "value" not in value:
        raise ValueError(f"policy: {name}: a table needs a value")
    try:
        return Reference(
            _digits(name, value["value"], sizes),
            not_before=_time(f"{name}.not_before", value.get("not_before")),
            not_after=_time(f"{name}.not_after", value.get("not_after")),
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("policy") else f"policy: {name}: {text}") from None


def _listed(name: str, value: Any, sizes: tuple[int, ...]) -> tuple[Reference, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(_one(name, item, sizes) for item in listed)


def _table(name: str, value: Any, sizes: tuple[int, ...]) -> dict[int, tuple[Reference, ...]]:
    if not isinstance(value, dict):
        raise ValueError(f"policy: {name} is a table of register numbers")
    found = {}
    for key, item in value.items():
        if not _NUMBER.fullmatch(key):
            raise ValueError(f"policy: {name}: {key[:16]!r} is no register number")
        found[int(key)] = _listed(f"{name}.{key}", item, sizes)
    return found


# ---- writing ----------------------------------------------------------------------------------


def plain(policy: AppraisalPolicy) -> dict[str, Any]:
    """Return the fields of *policy* that differ from their defaults, as JSON values."""
    found: dict[str, Any] = {}
    for item in fields(policy):
        value = getattr(policy, item.name)
        if value != item.default:
            found[item.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Reference):
        if value.not_before is None and value.not_after is None:
            return value.value.hex()
        times = {"not_before": value.not_before, "not_after": value.not_after}
        return {"value": value.value.hex()} | {k: t.isoformat() for k, t in times.items() if t}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def text_of(policy: AppraisalPolicy, *, form: str) -> str:
    """Return *policy* as JSON or TOML, ending in a line feed."""
    values = plain(policy)
    if form == "json":
        return json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    if form != "toml":
        raise ValueError(f"{form!r} is neither json nor toml")
    lines = [f"{name} = {_toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _toml_text(key)


def _toml_text(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    members = (f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items())
    return "{ " + ", ".join(members) + " }"
