"""
The SGX extension of a PCK certificate (1.2.840.113741.1.13.1): what names a platform and its TCB.

Intel's PCK certificate specification. Every field is found by its object identifier, occurs exactly
once and has one type, one size and one range; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der
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
