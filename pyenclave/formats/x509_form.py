"""
Certificates that one authority issues are all of one form; the second is read by that of the first.

`CertificateForm.of` takes a certificate that was read in full, and keeps its bytes without those
that differ from one to the next: serial number, dates, the P-256 key, the identifier of that key,
the values of named extensions, and the signature. `CertificateForm.read` accepts a certificate
only if every other byte is the same and every length fits; all else is None, and for the reader of
`x509` to judge. So what it accepts is what that one accepts, with the same fields.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from pyenclave.formats import der
from pyenclave.formats._binary import maker
from pyenclave.formats.x509 import OID_SUBJECT_KEY_ID, P256_SPKI, Certificate, Extension

__all__ = ["CertificateForm"]

_VERSION_3: Final = bytes.fromhex("a003020102")
_DATE: Final = b"\x17\x0d"
_DATES: Final = b"\x30\x1e" + _DATE
_KEY_SIZE: Final = 64
_LONG: Final = 0x100  # lengths from here on have two bytes in DER
# A point of the curve, in place of a key that nothing may depend on: the generator.
_ANY_KEY: Final = bytes.fromhex(
    "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)


_make: Final = maker(
    Certificate,
    "der",
    "tbs",
    "version",
    "serial",
    "issuer",
    "subject",
    "not_before",
    "not_after",
    "spki",
    "signature_algorithm",
    "signature",
    "extensions",
    "mark",
)


class CertificateForm:
    """
    The form of certificates; equal to itself only.

    Attributes:
        blank: A certificate of this form whose differing fields are empty or None: what is judged
            of it holds for all of them.
    """

    __slots__ = (
        "_algorithm",
        "_extensions",
        "_names",
        "_parts",
        "_spki_end",
        "_validity",
        "blank",
    )

    def __init__(self, like: Certificate, parts: list[tuple[bytes, int]], names: list[str]) -> None:
        self._algorithm = der.encode_sequence(
            der.encode_oid(like.signature_algorithm.oid),
            like.signature_algorithm.parameters or b"",
        )
        # What stands between the serial number and the dates, and between the dates and the key.
        self._validity = self._algorithm + like.issuer + _DATES
        self._spki_end = like.subject + P256_SPKI
        self._parts = parts  # fixed bytes and the size of the hole after them; 0: of any size
        self._names = names  # whose holes these are
        self._extensions = like.extensions
        nothing: Any = None
        self.blank = replace(
            like,
            der=b"",
            tbs=b"",
            serial=nothing,
            not_before=nothing,
            not_after=nothing,
            spki=P256_SPKI + _ANY_KEY,
            signature=b"",
            extensions=MappingProxyType(
                {
                    oid: Extension(item.critical, b"") if oid in names else item
                    for oid, item in like.extensions.items()
                }
            ),
            mark=None,
        )

    @classmethod
    def of(cls, like: Certificate, differing: Collection[str]) -> CertificateForm | None:
        """
        Return the form of *like*; None if it is of no form that this reads.

        Args:
            like: A certificate that was read in full.
            differing: Extensions whose values differ, by their identifiers; that of the key's
                identifier is one anyway.
        """
        if like.version != 3 or not like.spki.startswith(P256_SPKI):
            return None
        parts: list[tuple[bytes, int]] = []
        names: list[str] = []
        fixed = b""
        for oid, item in like.extensions.items():
            head = der.encode_oid(oid)
            if item.critical:
                head += der.encode_boolean(True)
            size = len(item.value)
            if oid == OID_SUBJECT_KEY_ID:
                whole = der.encode_sequence(head, der.encode_octet_string(item.value))
                parts.append((fixed + whole[:-size], size))
                names.append(oid)
                fixed = b""
            elif oid in differing:
                if size < _LONG:
                    return None
                parts.append((fixed, 0))
                parts.append((head, 0))
                names.append(oid)
                fixed = b""
            else:
                fixed += der.encode_sequence(head, der.encode_octet_string(item.value))
        parts.append((fixed, -1))
        made = cls(like, parts, names)
        found = made.read(like.der, None)
        return made if found is not None and found.extensions == like.extensions else None

    def read(self, data: bytes, mark: object) -> Certificate | None:
        """
        Return the certificate in *data* if it is of this form, else None.

        Args:
            data: DER.
            mark: Its `Certificate.mark`.
        """
        size = len(data)
        end = 8 + int.from_bytes(data[6:8], "big")  # of what is signed
        if (
            not 4 + _LONG <= size <= 0xFFFF
            or data[:2] != b"\x30\x82"
            or int.from_bytes(data[2:4], "big") != size - 4
            or data[4:6] != b"\x30\x82"
            or not 8 + _LONG <= end < size
            or data[8:13] != _VERSION_3
            or data[13] != der.INTEGER
        ):
            return None
        # The serial number: 1 to 20 bytes, minimal and not negative.
        at = 15 + data[14]
        serial = data[15:at]
        if not 1 <= data[14] <= 21 or serial[0] & 0x80:
            return None
        if serial[0] == 0 and (len(serial) == 1 or not serial[1] & 0x80):
            return None
        if len(serial) == 21 and serial[0]:
            return None
        if not data.startswith(self._validity, at):
            return None
        at += len(self._validity)
        not_before, not_after = _time(data[at : at + 13]), _time(data[at + 15 : at + 28])
        if not_before is None or not_after is None or data[at + 13 : at + 15] != _DATE:
            return None
        at += 28
        if not data.startswith(self._spki_end, at):
            return None
        at += len(self._spki_end)
        key = data[at : at + _KEY_SIZE]
        at += _KEY_SIZE
        # [3] { SEQUENCE { extensions } }, to the end of what is signed.
        if (
            data[at : at + 2] != b"\xa3\x82"
            or int.from_bytes(data[at + 2 : at + 4], "big") != end - at - 4
            or data[at + 4 : at + 6] != b"\x30\x82"
            or int.from_bytes(data[at + 6 : at + 8], "big") != end - at - 8
            or end - at - 8 < _LONG
        ):
            return None
        values = self._values(data, at + 8, end)
        # The algorithm again, and the signature: a bit string of whole bytes.
        if values is None or not data.startswith(self._algorithm, end):
            return None
        at = end + len(self._algorithm)
        signature = data[at + 3 :]
        if data[at : at + 3] != bytes((der.BIT_STRING, (len(signature) + 1) & 0x7F, 0)):
            return None
        if len(signature) > 0x7E:
            return None
        blank = self.blank
        return _make(
            (
                data,
                data[4:end],
                3,
                int.from_bytes(serial, "big"),
                blank.issuer,
                blank.subject,
                not_before,
                not_after,
                P256_SPKI + key,
                blank.signature_algorithm,
                signature,
                MappingProxyType({**self._extensions, **values}),
                mark,
            )
        )

    def _values(self, data: bytes, at: int, end: int) -> dict[str, Extension] | None:
        """Return the extensions that differ, of those between *at* and *end*."""
        found: dict[str, Extension] = {}
        names = iter(self._names)
        item_end = -1
        for fixed, hole in self._parts:
            if not data.startswith(fixed, at):
                return None
            at += len(fixed)
            if hole > 0:  # the identifier of the key
                name = next(names)
                found[name] = Extension(self._extensions[name].critical, data[at : at + hole])
                at += hole
            elif hole < 0:
                return found if at == end else None
            elif item_end < 0:  # before the name of an extension: SEQUENCE, length
                item_end = at + 4 + int.from_bytes(data[at + 2 : at + 4], "big")
                if data[at : at + 2] != b"\x30\x82" or item_end > end:
                    return None
                at += 4
            else:  # behind its name: OCTET STRING, length, value
                size = int.from_bytes(data[at + 2 : at + 4], "big")
                if data[at : at + 2] != b"\x04\x82" or size < _LONG or at + 4 + size != item_end:
                    return None
                name = next(names)
                found[name] = Extension(self._extensions[name].critical, data[at + 4 : item_end])
                at, item_end = item_end, -1
        return None


def _time(text: bytes) -> datetime | None:
    """Return a UTCTime (RFC 5280, 4.1.2.5.1), None if it is none."""
    digits = text[:12]
    # Newer Pythons read hour 24, too.
    if len(text) != 13 or text[12] != 0x5A or not digits.isdigit() or digits[6:8] > b"23":
        return None
    century = "19" if digits >= b"5" else "20"
    try:
        return datetime.fromisoformat(
            f"{century}{digits[:6].decode('ascii')}T{digits[6:].decode('ascii')}+00:00"
        )
    except ValueError:
        return None
