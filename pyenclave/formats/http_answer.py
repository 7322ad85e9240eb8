"""
One HTTP/1.1 answer from bytes, as they come (RFC 9112): nothing that two readers could read twice.

For what runs inside an enclave, where the host relays bytes of TLS and nothing else speaks HTTP.
Only answers to GET whose connection ends with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from pyenclave.errors import EvidenceFormatError

__all__ = ["MAX_HEAD", "AnswerReader", "http_date"]

MAX_HEAD: Final = 16 << 10  # bytes of status line and headers
_STATUS: Final = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD: Final = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*"
)
_LENGTH: Final = re.compile(rb"(?:0|[1-9][0-9]{0,9})")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e]*)?")
_END: Final = -2  # of a chunk, what is left is the end of its line
_MAX_LINE: Final = 256  # bytes of a chunk's line
_DATE: Final = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), ([0-9]{2}) ([A-Z][a-z]{2}) ([0-9]{4}) "
    r"([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT"
)
_MONTHS: Final = "JanFebMarAprMayJunJulAugSepOctNovDec"


def http_date(text: str) -> int | None:
    """Return the seconds since 1970 of an IMF-fixdate (RFC 9110, 5.6.7); None if it is none."""
    match = _DATE.fullmatch(text)
    month = _MONTHS.find(match[2]) if match else -1
    if match is None or month % 3:
        return None
    day, year, hour, minute, second = (int(match[index]) for index in (1, 3, 4, 5, 6))
    try:
        moment = datetime(year, month // 3 + 1, day, hour, minute, min(second, 59), tzinfo=UTC)
    except ValueError:
        return None
    return int(moment.timestamp())


class AnswerReader:
    """
    Takes an answer as it comes.

    Args:
        max_size: Bytes of body that are accepted.

    Attributes:
        status: The status; 0 as long as the head is not whole.
        headers: By name in lower case; each once.
        complete: The whole answer is there.

    """

    def __init__(self, max_size: int) -> None:
        self._max = max_size
        self._raw = bytearray()
        self._body = bytearray()
        self._left: int | None = None  # of the body, or of the chunk; None: until the end
        self._chunked = False
        self._trailer = False
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.complete = False

    @property
    def body(self) -> bytes:
        """The body as far as it came."""
        return bytes(self._body)

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes.

        Raises:
            EvidenceFormatError: Not HTTP/1.1, ambiguous, too large, or more than one answer.

        """
        self._raw += data
        if not self.status and not self._head():
            return
        if self._chunked:
            self._chunks()
        else:
            self._take()
            self.complete = self._left == 0
        if self.complete and self._raw:
            raise _wrong("bytes after its end")

    def end(self) -> None:
        """
        Take note that the peer said orderly that nothing follows.

        Raises:
            EvidenceFormatError: The answer is cut off.

        """
        if not self.status or self._chunked or self._left is not None:
            if not self.complete:
                raise _wrong("cut off")
            return
        self.complete = True

    def _head(self) -> bool:
        at = self._raw.find(b"\r\n\r\n")
        if at > MAX_HEAD or (at < 0 and len(self._raw) > MAX_HEAD):
            raise _wrong("the head is too long")
        if at < 0:
            return False
        first, *lines = bytes(self._raw[:at]).split(b"\r\n")
        del self._raw[: at + 4]
        match = _STATUS.fullmatch(first)
        if match is None:
            raise _wrong("the status line")
        found: dict[str, str] = {}
        for line in lines:
            field = _FIELD.fullmatch(line)
            name = field[1].decode("ascii").lower() if field else ""
            if field is None:
                raise _wrong("a header line")
            if name in found and name in ("content-length", "transfer-encoding", "date"):
                raise _wrong(f"two headers {name}")
            found[name] = field[2].decode("latin-1")
        self.headers = found
        self._length(found)
        self.status = int(match[1])
        return True

    def _length(self, found: Mapping[str, str]) -> None:
        length, coding = found.get("content-length"), found.get("transfer-encoding")
        if found.get("content-encoding", "identity").lower() != "identity":
            raise _wrong("a coding that was not asked for")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise _wrong("its length in two ways, or an unknown one")
            self._chunked = True
            self._left = 0
        elif length is not None:
            if not _LENGTH.fullmatch(length.encode("latin-1")):
                raise _wrong("content-length")
            self._left = int(length)
            if self._left > self._max:
                raise _wrong("too large")

    def _take(self) -> None:
        size = len(self._raw) if self._left is None else min(self._left, len(self._raw))
        if len(self._body) + size > self._max:
            raise _wrong("too large")
        self._body += self._raw[:size]
        del self._raw[:size]
        if self._left is not None:
            self._left -= size

    def _line(self) -> bytes | None:
        at = self._raw.find(b"\r\n")
        if at > _MAX_LINE or (at < 0 and len(self._raw) > _MAX_LINE):
            raise _wrong("a chunk's line")
        if at < 0:
            return None
        line = bytes(self._raw[:at])
        del self._raw[: at + 2]
        return line

    def _chunks(self) -> None:
        while not self.complete:
            if self._trailer:
                line = self._line()
                if line is None:
                    return
                if line:
                    raise _wrong("trailers")
                self.complete = True
            elif self._left == _END:
                if len(self._raw) < 2:
                    return
                if self._raw[:2] != b"\r\n":
                    raise _wrong("a chunk's end")
                del self._raw[:2]
                self._left = 0
            elif self._left:
                self._take()
                if self._left:
                    return
                self._left = _END
            else:
                line = self._line()
                if line is None:
                    return
                match = _CHUNK.fullmatch(line)
                if match is None:
                    raise _wrong("a chunk's length")
                self._left = int(match[1], 16)
                self._trailer = self._left == 0


def _wrong(what: str) -> EvidenceFormatError:
    return EvidenceFormatError(f"HTTP answer: {what}")
