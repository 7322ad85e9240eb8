"""
Paths and queries in their one canonical form, and the way from a path to its handler.

Anything that two readers of a path could understand differently is refused before it is routed:
dot segments, encoded slashes, dots and backslashes, encodings of what needs none, control bytes and
bytes beyond ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Final, Generic, TypeVar
from urllib.parse import unquote_to_bytes

from pyenclave.errors import ServiceError

__all__ = ["Router", "form_of", "query_of", "segments_of"]

T = TypeVar("T")

_PLAIN: Final = re.compile(rb"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)+")
_ENCODED: Final = re.compile(rb"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)+")
# RFC 3986, 2.2: what may stand encoded in a segment and mean the same.
_MAY_BE_ENCODED: Final = frozenset(b"!$&'()*+,;=:@")
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_QUERY: Final = re.compile(rb"(?:[A-Za-z0-9._~!$'()*+,;=:@/?&-]|%[0-9A-Fa-f]{2})*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MAX_SEGMENTS: Final = 16
_MAX_PARAMETERS: Final = 32


def _refused(message: str, found: object = None) -> ServiceError:
    return ServiceError(message, status=400, error_code="BadParameter", found=found)


def segments_of(raw: bytes, limit: int) -> list[str]:
    """
    Return the segments of a path as it was sent.

    Args:
        raw: The path's bytes, without the query.
        limit: Bytes that it may have.

    Raises:
        ServiceError: 414 too long, 400 not in its canonical form.

    """
    if len(raw) > limit:
        raise ServiceError("the path is too long", status=414, error_code="BadParameter")
    if not _PLAIN.fullmatch(raw):
        if not _ENCODED.fullmatch(raw):
            raise _refused("the path has characters that no path has", found=raw[:80])
        for code in _ESCAPE.findall(raw):
            if int(code, 16) not in _MAY_BE_ENCODED:
                raise _refused("the path is not in its canonical form", found=raw[:80])
        raw = unquote_to_bytes(raw)
    segments = raw[1:].decode("ascii").split("/")
    if len(segments) > _MAX_SEGMENTS:
        raise _refused("the path has too many segments", found=len(segments))
    if "." in segments or ".." in segments:
        raise _refused("the path has dot segments", found=raw[:80])
    return segments


@lru_cache(maxsize=256)
def query_of(raw: bytes, limit: int) -> Mapping[str, str]:
    """
    Return the parameters of a query as it was sent; each occurs once.

    Raises:
        ServiceError: 414 too long, 400 malformed, or a name that occurs twice.

    """
    if not raw:
        return MappingProxyType({})
    if len(raw) > limit:
        raise ServiceError("the query is too long", status=414, error_code="BadParameter")
    if not _QUERY.fullmatch(raw):
        raise _refused("the query has characters that no query has")
    parts = raw.split(b"&")
    if len(parts) > _MAX_PARAMETERS:
        raise _refused("the query has too many parameters", found=len(parts))
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = (_decoded(piece) for piece in part.partition(b"="))
        if not name or not equals:
            raise _refused("the query has a parameter without name or value")
        if name in found:
            raise _refused("the query names a parameter twice", found=name[:40])
        found[name] = value
    return MappingProxyType(found)


def _decoded(piece: bytes) -> str:
    try:
        text = unquote_to_bytes(piece.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise _refused("the query is not UTF-8") from None
    if _CONTROL.search(text):
        raise _refused("the query has control characters")
    return text


class _Node(Generic[T]):
    __slots__ = ("any", "fixed", "methods")

    def __init__(self) -> None:
        self.fixed: dict[str, _Node[T]] = {}
        self.any: _Node[T] | None = None
        self.methods: dict[str, tuple[T, tuple[str, ...]]] = {}


class Router(Generic[T]):
    """Finds what was added for a path: a fixed segment goes before ``{name}``."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()

    def add(self, method: str, pattern: str, target: T) -> None:
        """
        Add *target* for *method* and *pattern* (``/keys/{name}//release``).

        Raises:
            ValueError: Not a pattern, or there is one for the same paths and method.

        """
        if not pattern.startswith("/") or not method.isupper():
            raise ValueError(f"not a route: {method} {pattern}")
        node = self._root
        names: list[str] = []
        for segment in pattern[1:].split("/"):
            if segment.startswith("{") and segment.endswith("}"):
                names.append(segment[1:-1])
                if node.any is None:
                    node.any = _Node()
                node = node.any
            else:
                node = node.fixed.setdefault(segment, _Node())
        if method in node.methods or len(set(names)) != len(names):
            raise ValueError(f"twice the same: {method} {pattern}")
        node.methods[method] = (target, tuple(names))

    def find(
        self, method: str, segments: Sequence[str]
    ) -> tuple[T, dict[str, str]] | frozenset[str]:
        """Return target and parameters; or the methods that this path has (none: no such path)."""
        # The nodes are a tree, so each is seen once at most.
        open_: list[tuple[_Node[T], int, tuple[str, ...]]] = [(self._root, 0, ())]
        others: set[str] = set()
        while open_:
            node, at, values = open_.pop()
            if at == len(segments):
                hit = node.methods.get(method)
                if hit is not None:
                    return hit[0], dict(zip(hit[1], values, strict=True))
                others.update(node.methods)
                continue
            segment = segments[at]
            if node.any is not None and segment:
                open_.append((node.any, at + 1, (*values, segment)))
            fixed = node.fixed.get(segment)
            if fixed is not None:
                open_.append((fixed, at + 1, values))
        return frozenset(others)


def form_of(raw: bytes, limit: int) -> dict[str, str]:
    """Return the fields of a form (`application/x-www-form-urlencoded`); nothing of it is kept."""
    return dict(query_of.__wrapped__(raw, limit))
