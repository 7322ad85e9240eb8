"""
The SGX extension of a PCK certificate (1.2.840.113741.1.13.1): what names a platform and its TCB.

Intel's PCK certificate specification. Every field is found by its object identifier, occurs exactly
once and has one type, one size and one range; anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der
from pyenclave.formats._binary import maker
from pyenclave.formats.der import Der
from pyenclave.formats.x509 import Certificate

__all__ = ["OID_SGX_EXTENSION", "PckExtension"]

OID_SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"

_WHAT: Final = "SGX extension of the PCK certificate"
_COMPONENTS: Final = 16
_PCE_SVN: Final = 17
_CPU_SVN: Final = 18
_SGX_TYPES: Final = 2
_NEEDED: Final = frozenset(range(1, 6))
_CONFIGURATION: Final = frozenset(range(1, 4))


def _table(cursor: Der, prefix: str, known: frozenset[int]) -> dict[int, Der]:
    """Read SEQUENCE OF SEQUENCE{OID, value}: last arc of the identifier → value."""
    found: dict[int, Der] = {}
    start = prefix + "."
    while cursor.more:
        item = cursor.sequence()
        oid = item.oid()
        last = oid[len(start) :]
        number = int(last) if oid.startswith(start) and last.isdecimal() else 0
        if number not in known:
            raise item.fail("an unknown field", expected=f"{prefix}.…", found=oid)
        if number in found:
            raise item.fail("a field occurs twice", found=oid)
        found[number] = item
    return found


def _complete(found: Mapping[int, Der], needed: frozenset[int], prefix: str) -> None:
    missing = needed - set(found)
    if missing:
        raise EvidenceFormatError(
            f"{_WHAT}: a field is missing", expected=f"{prefix}.{min(missing)}", found="nothing"
        )


def _bytes(item: Der, size: int) -> bytes:
    value = item.octet_string()
    item.end()
    if len(value) != size:
        raise item.fail("a field has the wrong size", expected=size, found=len(value))
    return value


def _number(item: Der, highest: int, *, tag: int = der.INTEGER) -> int:
    value = item.integer(nonneg=True, tag=tag)
    item.end()
    if value > highest:
        raise item.fail("a number is too large", expected=f"at most {highest}", found=value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class PckExtension:
    """
    What a PCK certificate says of its platform.

    Attributes:
        ppid: Sixteen bytes: the platform (pseudonymous).
        components: The sixteen TCB component SVNs; these, not ``cpu_svn``, are compared.
        pce_svn: ISVSVN of the provisioning enclave.
        fmspc: Six bytes: the platform family.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
        configuration: Dynamic platform (1), cached keys (2), SMT enabled (3); platform CA only.
    """

    ppid: bytes = field(repr=False)
    components: tuple[int, ...]
    pce_svn: int
    cpu_svn: bytes
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance_id: bytes | None = field(default=None, repr=False)
    configuration: Mapping[int, bool] | None = None

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> PckExtension:
        """
        Read the extension of *certificate*.

        Raises:
            EvidenceFormatError: It has none, or a malformed one.

        """
        extension = certificate.extensions.get(OID_SGX_EXTENSION)
        if extension is None:
            raise EvidenceFormatError(
                f"{_WHAT}: missing", expected=OID_SGX_EXTENSION, found=certificate.subject_text
            )
        return cls.from_bytes(extension.value)

    @classmethod
    def from_bytes(cls, data: bytes) -> PckExtension:
        """
        Read the extension's value.

        Raises:
            EvidenceFormatError: Malformed.

        """
        usual = _usual(data)
        if usual is not None:
            return usual
        outer = Der(data, _WHAT)
        body = outer.sequence()
        outer.end()
        found = _table(body, OID_SGX_EXTENSION, _NEEDED | {6, 7})
        _complete(found, _NEEDED, OID_SGX_EXTENSION)
        prefix = f"{OID_SGX_EXTENSION}.2"
        names = frozenset(range(1, _CPU_SVN + 1))
        tcb = _table(found[2].sequence(), prefix, names)
        found[2].end()
        _complete(tcb, names, prefix)
        instance = found.get(6)
        return cls(
            ppid=_bytes(found[1], 16),
            components=tuple(_number(tcb[index], 0xFF) for index in range(1, _COMPONENTS + 1)),
            pce_svn=_number(tcb[_PCE_SVN], 0xFFFF),
            cpu_svn=_bytes(tcb[_CPU_SVN], 16),
            pce_id=_bytes(found[3], 2),
            fmspc=_bytes(found[4], 6),
            sgx_type=_number(found[5], _SGX_TYPES, tag=der.ENUMERATED),
            platform_instance_id=None if instance is None else _bytes(instance, 16),
            configuration=None if 7 not in found else _configuration(found[7]),
        )


def _configuration(item: Der) -> Mapping[int, bool]:
    table = _table(item.sequence(), f"{OID_SGX_EXTENSION}.7", _CONFIGURATION)
    item.end()
    values: dict[int, bool] = {}
    for number in sorted(table):
        values[number] = table[number].boolean()
        table[number].end()
    return MappingProxyType(values)


# ---- the form in which Intel writes it -----------------------------------------------------------

_OID: Final = bytes.fromhex("2a864886f84d010d01")


def _expression() -> re.Pattern[bytes]:
    """
    Return an expression for the DER of all fields in Intel's order, each length included.

    Two lengths are left to be compared: of the whole, and of the list of SVNs.
    """

    def name(*arcs: int) -> bytes:
        oid = _OID + bytes(arcs)
        return re.escape(bytes((der.OBJECT_IDENTIFIER, len(oid))) + oid)

    def octets(size: int, *arcs: int) -> bytes:
        length = 2 + len(_OID) + len(arcs) + 2 + size
        return b"\x30%s%s\x04%s(.{%d})" % (
            re.escape(bytes((length,))),
            name(*arcs),
            re.escape(bytes((size,))),
            size,
        )

    parts = [b"\x30\x82(..)", octets(16, 1)]
    # The SVNs: 30 length { OID, 30 82 length { … } }; the item around them has a long length, too.
    parts.append(b"\x30\x82(..)" + name(2) + b"\x30\x82(..)")
    for index in range(1, _COMPONENTS + 1):
        oid = name(2, index)
        parts.append(
            b"\x30(?:\x10%s\x02\x01(?=[\x00-\x7f])|\x11%s\x02\x02\x00(?=[\x80-\xff]))(.)"
            % (oid, oid)
        )
    oid = name(2, _PCE_SVN)
    parts.append(
        b"\x30(?:\x10%s\x02\x01([\x00-\x7f])"
        b"|\x11%s\x02\x02(\x00[\x80-\xff]|[\x01-\x7f].)"
        b"|\x12%s\x02\x03(\x00[\x80-\xff].))" % (oid, oid, oid)
    )
    parts.append(octets(16, 2, _CPU_SVN))
    parts.append(b"()")  # where the list of SVNs ends
    parts += [octets(2, 3), octets(6, 4)]
    parts.append(b"\x30\x0f" + name(5) + b"\x0a\x01([\x00-\x02])")
    flags = b"".join(
        b"\x30\x10" + name(7, index) + b"\x01\x01([\x00\xff])" for index in range(1, 4)
    )
    parts.append(b"(?:%s\x30\x44%s\x30\x36%s)?" % (octets(16, 6), name(7), flags))
    return re.compile(b"".join(parts), re.DOTALL)


_PATTERN: Final = _expression()


def _usual(data: bytes) -> PckExtension | None:
    """Return what *data* reads as if it has Intel's form; everything else is read one by one."""
    match = _PATTERN.fullmatch(data)
    if match is None:
        return None
    values = match.groups()
    end = match.start(25)
    # Whole: content after four bytes; the item of the SVNs and the list in it end together.
    if (
        int.from_bytes(values[0], "big") != len(data) - 4
        or int.from_bytes(values[2], "big") != end - match.end(3)
        or int.from_bytes(values[3], "big") != end - match.end(4)
        or min(values[0][0], values[2][0], values[3][0]) == 0
    ):
        return None
    instance = values[28]
    configuration = None
    if instance is not None:
        configuration = _CONFIGURED.get(values[29:32])
        if configuration is None:
            return None
    return _make(
        (
            values[1],
            tuple(b"".join(values[4:20])),
            int.from_bytes(values[20] or values[21] or values[22], "big"),
            values[23],
            values[25],
            values[26],
            values[27][0],
            instance,
            configuration,
        )
    )


_make: Final = maker(
    PckExtension,
    "ppid",
    "components",
    "pce_svn",
    "cpu_svn",
    "pce_id",
    "fmspc",
    "sgx_type",
    "platform_instance_id",
    "configuration",
)
# The three flags as they are written, and what they say.
_CONFIGURED: Final = {
    flags: MappingProxyType({index + 1: flag == b"\xff" for index, flag in enumerate(flags)})
    for flags in product((b"\0", b"\xff"), repeat=3)
}
