"""
Intel's collateral in JSON: TCB info (versions 2 and 3) and the identity of a quoting enclave.

As the PCS answers: ``{"tcbInfo": {…}, "signature": "…"}`` and ``{"enclaveIdentity": {…}, …}``. What
is signed are the exact bytes of the inner object as served; they are kept, never written again.
Every member that is used has one type, one size and one range; members that nobody knows are
ignored, because Intel adds some. Nothing is verified here.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pyenclave.errors import CollateralError
from pyenclave.formats import jsonstrict

__all__ = [
    "COMPONENTS",
    "QeIdentity",
    "QeLevel",
    "TcbInfo",
    "TcbLevel",
    "TdxModule",
    "TdxModuleIdentity",
]

COMPONENTS: Final = 16
MAX_SIZE: Final = 1 << 20
_MAX_LEVELS: Final = 512
_MAX_IDENTITIES: Final = 64
_MAX_ADVISORIES: Final = 256
_MAX_TEXT: Final = 128

_TIME: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)Z", re.ASCII)
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})*", re.ASCII)

T = TypeVar("T")


class _Members:
    """The members of one JSON object, taken by name and type."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise CollateralError(f"{what}: not an object", found=type(value).__name__)
        self._members: dict[str, Any] = value
        self._what = what

    def fail(self, name: str, expected: str, found: object) -> CollateralError:
        return CollateralError(
            f"{self._what}: {name} is wrong", expected=expected, found=str(found)[:_MAX_TEXT]
        )

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def _take(self, name: str) -> Any:
        if name not in self._members:
            raise self.fail(name, "a value", "nothing")
        return self._members[name]

    def integer(self, name: str, highest: int) -> int:
        value = self._take(name)
        if type(value) is not int or not 0 <= value <= highest:
            raise self.fail(name, f"a number from 0 to {highest}", value)
        return value

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
            raise self.fail(name, f"text of 1 to {_MAX_TEXT} characters", value)
        return value

    def hex(self, name: str, size: int) -> bytes:
        value = self._take(name)
        if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
            raise self.fail(name, f"{2 * size} hexadecimal digits", value)
        return binascii.unhexlify(value)

    def time(self, name: str) -> datetime:
        value = self._take(name)
        match = _TIME.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise self.fail(name, "a time like 2025-01-31T00:00:00Z", value)
        try:
            year, month, day, hour, minute, second = map(int, match.groups())
            return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        except ValueError:
            raise self.fail(name, "a time that exists", value) from None

    def inner(self, name: str) -> _Members:
        return _Members(self._take(name), f"{self._what}: {name}")

    def items(self, name: str, limit: int) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) > limit:
            found = len(value) if isinstance(value, list) else type(value).__name__
            raise self.fail(name, f"a list of at most {limit}", found)
        return value

    def objects(self, name: str, limit: int, read: Callable[[_Members], T]) -> tuple[T, ...]:
        found = self.items(name, limit)
        return tuple(
            read(_Members(item, f"{self._what}: {name}[{index}]"))
            for index, item in enumerate(found)
        )

    def advisories(self) -> tuple[str, ...]:
        if "advisoryIDs" not in self:
            return ()
        found = self.items("advisoryIDs", _MAX_ADVISORIES)
        for item in found:
            if not isinstance(item, str) or not 0 < len(item) <= _MAX_TEXT:
                raise self.fail("advisoryIDs", "names", item)
        return tuple(found)


def _served(data: bytes, member: str, what: str) -> tuple[_Members, bytes, bytes]:
    """Read the outer object: the inner one, its exact bytes, and the signature."""
    value = jsonstrict.object_of(data, what, CollateralError, max_size=MAX_SIZE)
    outer = _Members(value, what)
    signed = jsonstrict.member_bytes(data, member, what, CollateralError, max_size=MAX_SIZE)
    return outer.inner(member), signed, outer.hex("signature", 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbLevel:
    """One TCB level of a platform: the least that it needs, and what that is worth."""

    sgx_components: tuple[int, ...]
    pce_svn: int
    tdx_components: tuple[int, ...] | None
    date: datetime
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QeLevel:
    """One TCB level of an enclave or of a TDX module, by its ISVSVN."""

    isv_svn: int
    date: datetime
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxModule:
    """What a TDX module must be."""

    mrsigner: bytes
    attributes: bytes
    attributes_mask: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxModuleIdentity:
    """A TDX module of one major version; ``id`` is ``TDX_`` with two digits, as served."""

    id: str
    module: TdxModule
    levels: tuple[QeLevel, ...]


def _qe_level(members: _Members) -> QeLevel:
    return QeLevel(
        isv_svn=members.inner("tcb").integer("isvsvn", 0xFFFF),
        date=members.time("tcbDate"),
        status=members.text("tcbStatus"),
        advisories=members.advisories(),
    )


def _qe_levels(members: _Members) -> tuple[QeLevel, ...]:
    """Return the levels, highest first; two of one version could be read in two ways."""
    found = members.objects("tcbLevels", _MAX_LEVELS, _qe_level)
    if len({level.isv_svn for level in found}) != len(found):
        raise members.fail("tcbLevels", "each isvsvn once", "one that occurs twice")
    return tuple(sorted(found, key=lambda level: level.isv_svn, reverse=True))


def _module(members: _Members) -> TdxModule:
    return TdxModule(
        mrsigner=members.hex("mrsigner", 48),
        attributes=members.hex("attributes", 8),
        attributes_mask=members.hex("attributesMask", 8),
    )


def _identity(members: _Members) -> TdxModuleIdentity:
    return TdxModuleIdentity(
        id=members.text("id"), module=_module(members), levels=_qe_levels(members)
    )


def _components(members: _Members, name: str) -> tuple[int, ...]:
    found = members.objects(name, COMPONENTS, lambda item: item.integer("svn", 0xFF))
    if len(found) != COMPONENTS:
        raise members.fail(name, f"{COMPONENTS} components", len(found))
    return found


def _platform_level(members: _Members, version: int, tdx: bool) -> TcbLevel:
    tcb = members.inner("tcb")
    if version == 2:
        components = tuple(
            tcb.integer(f"sgxtcbcomp{number:02}svn", 0xFF) for number in range(1, COMPONENTS + 1)
        )
    else:
        components = _components(tcb, "sgxtcbcomponents")
    return TcbLevel(
        sgx_components=components,
        pce_svn=tcb.integer("pcesvn", 0xFFFF),
        tdx_components=_components(tcb, "tdxtcbcomponents") if tdx else None,
        date=members.time("tcbDate"),
        status=members.text("tcbStatus"),
        advisories=members.advisories(),
    )


def _order(level: TcbLevel) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    return level.sgx_components, level.pce_svn, level.tdx_components or ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbInfo:
    """
    TCB info of one platform family.

    Attributes:
        signed: The exact bytes that ``signature`` covers.
        signature: R ‖ S, big-endian.
        id: ``SGX`` or ``TDX``; version 2 has only SGX.
        version: 2 or 3.
        fmspc: Six bytes: the family.
        pce_id: Two bytes as served: the most significant one first, as in the certificate's text.
        evaluation_number: ``tcbEvaluationDataNumber``.
        levels: Highest first.
        module: What TDX modules of major version 0 must be; TDX only.
        module_identities: What modules of later major versions must be.
    """

    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    id: str
    version: int
    issue_date: datetime
    next_update: datetime
    fmspc: bytes
    pce_id: bytes
    evaluation_number: int
    levels: tuple[TcbLevel, ...] = field(repr=False)
    module: TdxModule | None = None
    module_identities: tuple[TdxModuleIdentity, ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes) -> TcbInfo:
        """
        Read a TCB info as the PCS serves it.

        Raises:
            CollateralError: Malformed, ambiguous, or of another version.

        """
        members, signed, signature = _served(data, "tcbInfo", "TCB info")
        version = members.integer("version", 0xFFFF)
        if version not in (2, 3):
            raise members.fail("version", "2 or 3", version)
        kind = members.text("id") if version == 3 else "SGX"
        if kind not in ("SGX", "TDX"):
            raise members.fail("id", "SGX or TDX", kind)
        tdx = kind == "TDX"
        # Other types would compare the components in another way.
        members.integer("tcbType", 0)
        levels = members.objects(
            "tcbLevels", _MAX_LEVELS, lambda item: _platform_level(item, version, tdx)
        )
        if len(set(map(_order, levels))) != len(levels):
            raise members.fail("tcbLevels", "each level once", "one that occurs twice")
        module = None
        identities: tuple[TdxModuleIdentity, ...] = ()
        if tdx:
            module = _module(members.inner("tdxModule"))
            if "tdxModuleIdentities" in members:
                identities = members.objects("tdxModuleIdentities", _MAX_IDENTITIES, _identity)
            if len({identity.id.upper() for identity in identities}) != len(identities):
                raise members.fail("tdxModuleIdentities", "each id once", "one that occurs twice")
        return cls(
            signed=signed,
            signature=signature,
            id=kind,
            version=version,
            issue_date=members.time("issueDate"),
            next_update=members.time("nextUpdate"),
            fmspc=members.hex("fmspc", 6),
            pce_id=members.hex("pceId", 2),
            evaluation_number=members.integer("tcbEvaluationDataNumber", 0xFFFF_FFFF),
            levels=tuple(sorted(levels, key=_order, reverse=True)),
            module=module,
            module_identities=identities,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QeIdentity:
    """
    The identity of a quoting enclave.

    Attributes:
        signed: The exact bytes that ``signature`` covers.
        signature: R ‖ S, big-endian.
        id: ``QE``, ``TD_QE`` or ``QVE``.
        attributes: Sixteen bytes.
        levels: Highest first.
    """

    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    id: str
    version: int
    issue_date: datetime
    next_update: datetime
    evaluation_number: int
    misc_select: int
    misc_select_mask: int
    attributes: bytes
    attributes_mask: bytes
    mrsigner: bytes
    isv_prod_id: int
    levels: tuple[QeLevel, ...] = field(repr=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> QeIdentity:
        """
        Read an identity as the PCS serves it.

        Raises:
            CollateralError: Malformed, ambiguous, or of another version.

        """
        members, signed, signature = _served(data, "enclaveIdentity", "QE identity")
        version = members.integer("version", 0xFFFF)
        if version != 2:
            raise members.fail("version", "2", version)
        return cls(
            signed=signed,
            signature=signature,
            id=members.text("id"),
            version=version,
            issue_date=members.time("issueDate"),
            next_update=members.time("nextUpdate"),
            evaluation_number=members.integer("tcbEvaluationDataNumber", 0xFFFF_FFFF),
            misc_select=int.from_bytes(members.hex("miscselect", 4), "little"),
            misc_select_mask=int.from_bytes(members.hex("miscselectMask", 4), "little"),
            attributes=members.hex("attributes", 16),
            attributes_mask=members.hex("attributesMask", 16),
            mrsigner=members.hex("mrsigner", 32),
            isv_prod_id=members.integer("isvprodid", 0xFFFF),
            levels=_qe_levels(members),
        )
