"""Appraisal policies: which enclaves a relying party accepts."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

__all__ = ["LEVELS", "AppraisalPolicy"]

LEVELS: Final = ("embedded", "service")  # weakest first


# Fields of several accepted values: their size in bytes, and whether zero may be one. Zero is the
# measurement of nothing and the digest of no key, but a common host data or image identity.
_SIZED: Final[Mapping[str, tuple[int, bool]]] = MappingProxyType(
    {
        "mrenclave": (32, False),
        "mrsigner": (32, False),
        "launch_digest": (48, False),
        "id_key_digest": (48, False),
        "author_key_digest": (48, False),
        "host_data": (32, True),
        "family_id": (16, True),
        "image_id": (16, True),
    }
)
# Numbers that are not compared when they are None, and the largest that evidence can have.
_NUMBERS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "product_id": 0xFFFF,
        "min_security_version": 0xFFFF,
        "min_platform_svn": 0xFFFF,
        "max_vmpl": 3,
        "min_guest_svn": 0xFFFF_FFFF,
    }
)
_SWITCHES: Final = (
    "allow_debug",
    "allow_jit",
    "allow_migration_agent",
    "allow_masked_chip_id",
    "dangerous_allow_software",
    "accept_any_code",
)
_NAME_LISTS: Final = (
    "required_bits",
    "issuers",
    "required_policy_bits",
    "forbidden_policy_bits",
    "required_platform_bits",
)
#: Fields that say which code is meant: a policy has one of them, or accepts any code.
_IDENTITIES: Final = ("mrenclave", "mrsigner", "launch_digest", "id_key_digest", "pcrs", "claims")


def _digests(name: str, values: Iterable[bytes] | bytes | None) -> tuple[bytes, ...] | None:
    size, zero_too = _SIZED[name]
    if values is None:
        return None
    listed = (values,) if isinstance(values, bytes) else tuple(values)
    if not listed:
        raise ValueError(f"{name}: an empty list would accept nothing; leave it out instead")
    for value in listed:
        if not isinstance(value, bytes):
            raise TypeError(f"{name}: {type(value).__name__} is not bytes")
        if len(value) != size:
            raise ValueError(f"{name}: a digest has {size} bytes, not {len(value)}")
        if not any(value) and not zero_too:
            raise ValueError(f"{name}: zero is nobody's identity")
    return listed


def _number(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {type(value).__name__} is not int")
    if not 0 <= value <= _NUMBERS[name]:
        raise ValueError(f"{name}: {value} is not between 0 and {_NUMBERS[name]}")


def _names(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list | tuple | set | frozenset):
        raise TypeError(f"{name} is a sequence of names, not {type(values).__name__}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise TypeError(f"{name}: {value!r} is not a name")
    return tuple(values)


def _levels(name: str, values: object) -> Mapping[str, int] | None:
    """Return security levels by component."""
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a mapping of component to level, not {type(values).__name__}")
    for component, level in values.items():
        if component not in _TCB_COMPONENTS:
            raise ValueError(f"{name}: {component!r} is none of {', '.join(_TCB_COMPONENTS)}")
        if type(level) is not int or not 0 <= level <= 255:
            raise ValueError(f"{name}: {component} is a number from 0 to 255, not {level!r}")
    return MappingProxyType(dict(values))


def _bits(name: str, values: tuple[str, ...]) -> None:
    """Refuse bits that SEV-SNP does not have: a misspelt one would never be compared."""
    if not values:
        return
    from pyenclave.formats.snp import PLATFORM_BITS, POLICY_BITS

    known = PLATFORM_BITS if "platform" in name else POLICY_BITS
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")


_TCB_COMPONENTS: Final = ("fmc", "bootloader", "tee", "snp", "microcode")


def _registers(name: str, values: object) -> Mapping[int, tuple[bytes, ...]] | None:
    """Return registers with their accepted values, each one or several digests of one size."""
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a mapping of index to digest, not {type(values).__name__}")
    found: dict[int, tuple[bytes, ...]] = {}
    for index, value in values.items():
        if type(index) is not int or not 0 <= index <= 31:
            raise ValueError(f"{name}: {index!r} is no index between 0 and 31")
        listed = (value,) if isinstance(value, bytes) else tuple(value)
        for item in listed:
            if not isinstance(item, bytes):
                raise TypeError(f"{name}[{index}]: {type(item).__name__} is not bytes")
            if len(item) not in (20, 32, 48, 64):
                raise ValueError(f"{name}[{index}]: no digest has {len(item)} bytes")
        if not listed:
            raise ValueError(f"{name}[{index}]: an empty list would accept nothing")
        found[index] = listed
    if not found:
        raise ValueError(f"{name}: an empty mapping compares nothing; leave it out instead")
    return MappingProxyType(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisalPolicy:
    """
    Reference values and limits. What is None is not compared; what weakens is off.

    A policy names code identity (``mrenclave``, ``mrsigner`` with ``product_id``, or what other
    kinds of evidence have) or is `any_code`.

    Attributes:
        mrenclave: Accepted measurements, 32 bytes each (one or several).
        mrsigner: Accepted signers, 32 bytes each (one or several).
        product_id: Demanded ISVPRODID.
        min_security_version: Lowest accepted ISVSVN.
        min_level: ``embedded`` or ``service``.
        required_bits: Protection bits that must have held at launch.
        min_platform_svn: Lowest accepted security version of the platform.
        launch_digest: Accepted MEASUREMENTs of SEV-SNP guests, 48 bytes each (one or several).
        id_key_digest: Accepted digests of the key that signed the guest's ID block.
        author_key_digest: Accepted digests of the key that signed that key.
        family_id: Accepted FAMILY_IDs of the ID block, 16 bytes each.
        image_id: Accepted IMAGE_IDs of the ID block, 16 bytes each.
        host_data: Accepted HOST_DATA, 32 bytes each.
        min_guest_svn: Lowest accepted GUEST_SVN of the ID block.
        max_vmpl: Highest accepted VMPL: 0 is the most privileged level.
        min_tcb: Lowest accepted TCB of SEV-SNP: component (fmc, bootloader, tee, snp, microcode)
            to level; each is compared by itself.
        required_policy_bits: Bits that an SEV-SNP guest policy must have, such as ``rapl_dis``.
        forbidden_policy_bits: Bits that it must not have, such as ``smt``.
        required_platform_bits: Bits of PLATFORM_INFO that must be set, such as
            ``alias_check_complete``.
        pcrs: Accepted values of registers by index (Nitro, vTPM); each one digest or several.
        issuers: Accepted issuers of tokens (``iss``), compared whole.
        audience: The audience (``aud``) that a token must name: this relying party.
        claims: Demanded claims of tokens: dotted name (``submods.gce.project_id``) to value.
        allow_debug: Accept debug enclaves: whoever runs the machine reads their memory.
        allow_migration_agent: Accept guests that may be handed to a migration agent.
        allow_masked_chip_id: Accept SEV-SNP reports of a VCEK that do not name their chip.
        allow_jit: Accept images that may make written memory executable.
        dangerous_allow_software: Accept a platform without TEE hardware: whoever controls the
            machine can forge its evidence.
        accept_any_code: Do not compare code identity; set by `any_code`.
    """

    mrenclave: tuple[bytes, ...] | bytes | None = None
    mrsigner: tuple[bytes, ...] | bytes | None = None
    product_id: int | None = None
    min_security_version: int | None = None
    min_level: str = "embedded"
    required_bits: tuple[str, ...] = ()
    min_platform_svn: int = 0
    launch_digest: tuple[bytes, ...] | bytes | None = None
    id_key_digest: tuple[bytes, ...] | bytes | None = None
    author_key_digest: tuple[bytes, ...] | bytes | None = None
    family_id: tuple[bytes, ...] | bytes | None = None
    image_id: tuple[bytes, ...] | bytes | None = None
    host_data: tuple[bytes, ...] | bytes | None = None
    min_guest_svn: int | None = None
    max_vmpl: int | None = None
    min_tcb: Mapping[str, int] | None = None
    required_policy_bits: tuple[str, ...] = ()
    forbidden_policy_bits: tuple[str, ...] = ()
    required_platform_bits: tuple[str, ...] = ()
    pcrs: Mapping[int, Any] | None = None
    issuers: tuple[str, ...] = ()
    audience: str | None = None
    claims: Mapping[str, Any] | None = None
    allow_debug: bool = False
    allow_jit: bool = True
    allow_migration_agent: bool = False
    allow_masked_chip_id: bool = False
    dangerous_allow_software: bool = False
    accept_any_code: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in _SIZED:
            set_field(self, name, _digests(name, getattr(self, name)))
        for name in _NUMBERS:
            _number(name, getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False")
        if self.min_level not in LEVELS:
            raise ValueError(f"min_level: {self.min_level!r} is none of {', '.join(LEVELS)}")
        for name in _NAME_LISTS:
            set_field(self, name, _names(name, getattr(self, name)))
        _bits("required_policy_bits", self.required_policy_bits)
        _bits("forbidden_policy_bits", self.forbidden_policy_bits)
        _bits("required_platform_bits", self.required_platform_bits)
        set_field(self, "min_tcb", _levels("min_tcb", self.min_tcb))
        set_field(self, "pcrs", _registers("pcrs", self.pcrs))
        if self.audience is not None:
            _names("audience", (self.audience,))
        if self.claims is not None:
            _names("claims", tuple(self.claims))
            set_field(self, "claims", MappingProxyType(dict(self.claims)))
        named = any(getattr(self, name) is not None for name in _IDENTITIES)
        if not named and not self.accept_any_code:
            raise ValueError(
                f"a policy names code by one of {', '.join(_IDENTITIES)}; "
                "AppraisalPolicy.any_code() accepts whatever runs"
            )
        if named and self.accept_any_code:
            raise ValueError(f"accept_any_code contradicts {', '.join(_IDENTITIES)}")
        if self.mrenclave is None and self.mrsigner is not None and self.product_id is None:
            raise ValueError("mrsigner needs product_id: a signer may sign other products too")

    @property
    def measurements(self) -> tuple[bytes, ...]:
        """The accepted measurements; empty if not compared."""
        return tuple(self.mrenclave or ())  # type: ignore[arg-type]

    @property
    def signers(self) -> tuple[bytes, ...]:
        """The accepted signers; empty if not compared."""
        return tuple(self.mrsigner or ())  # type: ignore[arg-type]

    def accepted(self, name: str) -> tuple[bytes, ...]:
        """Return the accepted values of field *name*; empty if it is not compared."""
        return tuple(getattr(self, name) or ())

    @classmethod
    def any_code(cls, **options: Any) -> Self:
        """Accept whatever code runs: the result is never `identified`."""
        return cls(accept_any_code=True, **options)

    @classmethod
    def strict(cls) -> Self:
        """Genuine, no debug, no software platform; code identity is not compared."""
        return cls.any_code()

    @classmethod
    def permissive(cls) -> Self:
        """Genuine is enough."""
        return cls.any_code(
            allow_debug=True,
            allow_migration_agent=True,
            allow_masked_chip_id=True,
            dangerous_allow_software=True,
        )

    @classmethod
    def from_image(
        cls,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        any_version_of_signer: bool = False,
        **options: Any,
    ) -> Self:
        """
        Make a policy from an image file that the relying party itself holds.

        Measurement, signer, product and security version of the image become reference values.

        Args:
            image: Path, or the bytes of the image.
            any_version_of_signer: Leave the measurement out: later (not older) versions of the
                same signer and product are accepted too. Signed images only.
            options: Further fields of the policy.

        Raises:
            ImageError: Not a valid image, or its signature does not hold.
            ValueError: The image is not signed and *any_version_of_signer* is asked for.

        """
        from pyenclave.formats.image import Image
        from pyenclave.measurement.image import verify_image

        data = (
            bytes(image)
            if isinstance(image, bytes | bytearray | memoryview)
            else Path(image).read_bytes()
        )
        signed = verify_image(Image.parse(data))
        is_signed = any(signed.mrsigner)
        if any_version_of_signer and not is_signed:
            raise ValueError("an unsigned image is identified by its measurement only")
        values: dict[str, Any] = {
            "product_id": signed.product_id,
            "min_security_version": signed.security_version,
        }
        if not any_version_of_signer:
            values["mrenclave"] = signed.mrenclave
        if is_signed:
            values["mrsigner"] = signed.mrsigner
        return cls(**(values | options))

    def with_options(self, **changes: Any) -> Self:
        """Return a copy with *changes*."""
        return replace(self, **changes)

    @classmethod
    def from_text(cls, text: str, *, form: str) -> Self:
        """
        Read a policy from JSON or TOML: the fields' names, digests in hexadecimal digits.

        Args:
            text: The text.
            form: ``json`` or ``toml``.

        Raises:
            ValueError: Not well-formed, an unknown or doubled field, or a wrong value.

        """
        values: Any
        try:
            if form == "toml":
                values = tomllib.loads(text)
            else:
                values = json.loads(text, object_pairs_hook=_no_doubles)
        except RecursionError:
            raise ValueError("policy: nested too deeply") from None
        if not isinstance(values, dict):
            raise ValueError("policy: not a table of fields")
        known = {item.name for item in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"policy: unknown field {name!r}")
        for name in _SIZED:
            if name in values:
                values[name] = _from_hex(name, values[name])
        if isinstance(values.get("pcrs"), dict):
            values["pcrs"] = {
                _index(name): _registers_from_hex(name, value)
                for name, value in values["pcrs"].items()
            }
        for name in _NAME_LISTS:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"policy: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy file: TOML if its name ends in ``.toml``, else JSON."""
        path = Path(path)
        form = "toml" if path.suffix == ".toml" else "json"
        return cls.from_text(path.read_text(encoding="utf-8"), form=form)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"policy: field {name!r} occurs twice")
        values[name] = value
    return values


def _from_hex(name: str, value: Any) -> tuple[bytes, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ValueError(f"policy: {name} is one digest or a list, in hexadecimal digits")
    for item in listed:
        digits = 2 * _SIZED[name][0]
        if len(item) != digits:
            raise ValueError(f"policy: {name} has {digits} hexadecimal digits, not {len(item)}")
    return tuple(bytes.fromhex(item) for item in listed)


def _index(name: str) -> int:
    if not name.isascii() or not name.isdecimal() or len(name) > 2:
        raise ValueError(f"policy: {name!r} is no index of a register")
    return int(name)


def _registers_from_hex(name: str, value: Any) -> tuple[bytes, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ValueError(f"policy: register {name} is one digest or a list, in hexadecimal digits")
    return tuple(bytes.fromhex(item) for item in listed)
