"""
DER, strictly (X.690): what certificates, revocation lists and keys are made of.

`Der` is a cursor over the elements of one constructed value; reading descends only where the caller
says so, so no input decides how deep. Lengths are minimal and inside their parent, integers and
object identifiers minimal, booleans 00 or FF. The writers are for evidence that this package makes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from pyenclave.errors import EvidenceFormatError

if TYPE_CHECKING:
    from pyenclave.errors import EnclaveError

__all__ = [
    "BIT_STRING",
    "BOOLEAN",
    "ENUMERATED",
    "GENERALIZED_TIME",
    "INTEGER",
    "NULL",
    "OBJECT_IDENTIFIER",
    "OCTET_STRING",
    "SEQUENCE",
    "SET",
    "UTC_TIME",
    "Der",
    "context",
    "encode",
    "encode_bit_string",
    "encode_boolean",
    "encode_integer",
    "encode_octet_string",
    "encode_oid",
    "encode_sequence",
    "encode_text",
    "encode_time",
]

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OBJECT_IDENTIFIER: Final = 0x06
ENUMERATED: Final = 0x0A
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SEQUENCE: Final = 0x30
SET: Final = 0x31

_MAX_INTEGER = 1024  # bytes; an RSA modulus of 4,096 bits has 513
_MAX_OID = 64


def context(number: int, *, constructed: bool = True) -> int:
    """Return the context-specific tag [*number*]."""
    return (0xA0 if constructed else 0x80) | number


class Der:
    """
    A cursor over DER elements that follow each other.

    Args:
        data: The bytes; nothing is copied.
        what: What they are, for errors.
        error: Class of the errors that reading raises.
        start: Where the elements begin.
        stop: Where they end; default the end of *data*.
    """

    __slots__ = ("_data", "_error", "_position", "_stop", "what")

    def __init__(
        self,
        data: bytes,
        what: str,
        error: type[EnclaveError] = EvidenceFormatError,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self._data = data
        self._error = error
        self._position = start
        self._stop = len(data) if stop is None else stop
        self.what = what

    def fail(self, problem: str, *, expected: object = None, found: object = None) -> EnclaveError:
        """Return the error for *problem* at this place."""
        return self._error(
            f"{self.what}: {problem} at offset {self._position}", expected=expected, found=found
        )

    @property
    def more(self) -> bool:
        """Whether an element follows."""
        return self._position < self._stop

    @property
    def tag(self) -> int | None:
        """The tag of the next element, ``None`` at the end."""
        return self._data[self._position] if self._position < self._stop else None

    def _bounds(self, tag: int | None) -> tuple[int, int]:
        """Return where the content of the next element begins and ends."""
        data, at, stop = self._data, self._position, self._stop
        # Nearly every element: of the right tag, short, and all there.
        if stop - at >= 2 and data[at] == tag and tag & 0x1F != 0x1F:
            end = at + 2 + data[at + 1]
            if end <= stop and data[at + 1] < 0x80:
                return at + 2, end
        if stop - at < 2:
            raise self.fail("an element is missing", expected=_named(tag), found="the end")
        found = data[at]
        if tag is not None and found != tag:
            raise self.fail("wrong element", expected=_named(tag), found=_named(found))
        if found & 0x1F == 0x1F:
            raise self.fail("a tag of several bytes", found=_named(found))
        length = data[at + 1]
        at += 2
        if length >= 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4 or stop - at < count:
                raise self.fail("the length is not DER", found=f"{count} bytes of length")
            length = int.from_bytes(data[at : at + count], "big")
            if length < 0x80 or not data[at]:
                raise self.fail("the length is not minimal", found=length)
            at += count
        if length > stop - at:
            raise self.fail("the element does not fit", expected=f"{length} bytes", found=stop - at)
        return at, at + length

    def element(self, tag: int | None = None) -> bytes:
        """Take the next element as it stands: tag, length and content."""
        begin = self._position
        _, self._position = self._bounds(tag)
        return self._data[begin : self._position]

    def content(self, tag: int) -> bytes:
        """Take the content of the next element, which has *tag*."""
        start, self._position = self._bounds(tag)
        return self._data[start : self._position]

    def read(self, tag: int) -> Der:
        """Take the next element, which has *tag*, as a cursor over what is in it."""
        start, stop = self._bounds(tag)
        self._position = stop
        return Der(self._data, self.what, self._error, start=start, stop=stop)

    def sequence(self) -> Der:
        """Take a SEQUENCE."""
        return self.read(SEQUENCE)

    def optional(self, tag: int) -> Der | None:
        """Take the next element if it has *tag*."""
        return self.read(tag) if self.tag == tag else None

    def end(self) -> None:
        """Check that nothing is left."""
        if self._position != self._stop:
            raise self.fail("bytes follow the end", found=f"{self._stop - self._position} bytes")

    def integer(self, *, nonneg: bool = False, tag: int = INTEGER) -> int:
        """
        Take an INTEGER.

        Args:
            nonneg: Refuse negative ones.
            tag: ENUMERATED has the same form.
        """
        content = self.content(tag)
        if not content or len(content) > _MAX_INTEGER:
            raise self.fail("an integer of impossible size", found=f"{len(content)} bytes")
        if len(content) > 1 and content[0] in (0x00, 0xFF) and content[0] >> 7 == content[1] >> 7:
            raise self.fail("an integer is not minimal", found=content[:16].hex())
        value = int.from_bytes(content, "big", signed=True)
        if nonneg and value < 0:
            raise self.fail("an integer is negative", expected="0 or more", found=value)
        return value

    def oid(self) -> str:
        """Take an OBJECT IDENTIFIER in dotted form."""
        content = self.content(OBJECT_IDENTIFIER)
        text = _oid_text(content) if len(content) <= _MAX_OID else None
        if text is None:
            raise self.fail("an object identifier is malformed", found=content[:16].hex())
        return text

    def boolean(self) -> bool:
        """Take a BOOLEAN."""
        content = self.content(BOOLEAN)
        if content not in (b"\x00", b"\xff"):
            raise self.fail("a boolean is neither 00 nor FF", found=content[:16].hex())
        return content == b"\xff"

    def octet_string(self) -> bytes:
        """Take an OCTET STRING."""
        return self.content(OCTET_STRING)

    def bit_string(self) -> bytes:
        """Take a BIT STRING of whole bytes, such as a signature or key."""
        unused, content = self.bits()
        if unused:
            raise self.fail("a bit string is not of whole bytes", expected=0, found=unused)
        return content

    def bits(self) -> tuple[int, bytes]:
        """Take a BIT STRING: the number of unused bits, which are zero, and the bytes."""
        content = self.content(BIT_STRING)
        if not content or content[0] > 7 or (content[0] and len(content) == 1):
            raise self.fail("a bit string is malformed", found=content[:16].hex())
        unused = content[0]
        if unused and content[-1] & ((1 << unused) - 1):
            raise self.fail("unused bits are not zero", found=content[-1])
        return unused, content[1:]

    def time(self) -> datetime:
        """Take a UTCTime or GeneralizedTime in the forms of RFC 5280, 4.1.2.5."""
        tag = self.tag
        content = self.content(UTC_TIME if tag == UTC_TIME else GENERALIZED_TIME)
        digits = content[:-1]
        if (
            len(digits) != (12 if tag == UTC_TIME else 14)
            or content[-1:] != b"Z"
            or not digits.isdigit()
        ):
            raise self.fail("a time is malformed", found=content[:20])
        text = digits.decode("ascii")
        if tag == UTC_TIME:
            text = ("19" if text >= "5" else "20") + text
        try:
            return datetime(
                int(text[:4]),
                int(text[4:6]),
                int(text[6:8]),
                int(text[8:10]),
                int(text[10:12]),
                int(text[12:]),
                tzinfo=UTC,
            )
        except ValueError:
            raise self.fail("no such time", found=text) from None


def _named(tag: int | None) -> str:
    return "an element" if tag is None else f"tag 0x{tag:02x}"


@lru_cache(maxsize=512)
def _oid_text(content: bytes) -> str | None:
    """Return the dotted form, ``None`` if *content* is no minimal object identifier."""
    if not content or content[-1] & 0x80:
        return None
    arcs: list[int] = []
    value = 0
    fresh = True
    for byte in content:
        if fresh and byte == 0x80:
            return None
        value = value << 7 | byte & 0x7F
        fresh = not byte & 0x80
        if fresh:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


# ---- writers ----------------------------------------------------------------------------------


def encode(tag: int, *contents: bytes) -> bytes:
    """Write an element of *tag* with the concatenated *contents*."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def encode_sequence(*elements: bytes) -> bytes:
    """Write a SEQUENCE."""
    return encode(SEQUENCE, *elements)


def encode_integer(value: int, *, tag: int = INTEGER) -> bytes:
    """Write an INTEGER (or ENUMERATED)."""
    magnitude = value if value >= 0 else ~value
    return encode(tag, value.to_bytes(magnitude.bit_length() // 8 + 1, "big", signed=True))


def encode_boolean(value: bool) -> bytes:
    """Write a BOOLEAN."""
    return encode(BOOLEAN, b"\xff" if value else b"\x00")


def encode_octet_string(value: bytes) -> bytes:
    """Write an OCTET STRING."""
    return encode(OCTET_STRING, value)


def encode_bit_string(value: bytes, *, unused: int = 0) -> bytes:
    """Write a BIT STRING."""
    return encode(BIT_STRING, bytes((unused,)), value)


def encode_oid(dotted: str) -> bytes:
    """Write an OBJECT IDENTIFIER."""
    first, second, *rest = map(int, dotted.split("."))
    content = bytearray()
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        content += bytes(reversed(groups))
    return encode(OBJECT_IDENTIFIER, bytes(content))


def encode_text(text: str, *, tag: int = UTF8_STRING) -> bytes:
    """Write a UTF8String (or another text type)."""
    return encode(tag, text.encode())


def encode_time(moment: datetime) -> bytes:
    """Write a UTCTime to 2049 and a GeneralizedTime from 2050 on (RFC 5280)."""
    utc = moment.astimezone(UTC)
    if 1950 <= utc.year < 2050:
        return encode(UTC_TIME, utc.strftime("%y%m%d%H%M%SZ").encode())
    return encode(GENERALIZED_TIME, f"{utc.year:04}".encode(), utc.strftime("%m%d%H%M%SZ").encode())
