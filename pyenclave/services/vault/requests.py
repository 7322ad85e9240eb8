"""What the bodies of create, import and update say, read and checked before anything is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pyenclave.errors import AttestationError
from pyenclave.formats.release_policy import MAX_SIZE as MAX_POLICY
from pyenclave.formats.release_policy import ReleasePolicy
from pyenclave.services.vault.backends.base import KeySpec
from pyenclave.services.vault.fields import Fields, bad_parameter
from pyenclave.services.vault.records import HSM_TYPES, KEY_TYPES, POLICY_CONTENT_TYPE

__all__ = [
    "CURVES",
    "DEFAULT_OPS",
    "OPERATIONS",
    "Attributes",
    "CreateRequest",
    "ImportRequest",
    "Policy",
    "UpdateRequest",
    "check_operations",
    "check_policy_rules",
    "check_times",
]

OPERATIONS: Final = (
    "encrypt",
    "decrypt",
    "sign",
    "verify",
    "wrapKey",
    "unwrapKey",
    "import",
    "export",
)
DEFAULT_OPS: Final[Mapping[str, tuple[str, ...]]] = {
    "RSA": ("encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey"),
    "EC": ("sign", "verify"),
    "oct": ("encrypt", "decrypt", "wrapKey", "unwrapKey"),
}
CURVES: Final = ("P-256", "P-384", "P-521", "P-256K")
_COORDINATES: Final = {"P-256": 32, "P-384": 48, "P-521": 66, "P-256K": 32}
_RSA_SIZES: Final = (2048, 3072, 4096)
_OCT_SIZES: Final = (128, 192, 256)
_EXPONENT: Final = 65537
_MAX_TAGS: Final = 15  # Azure: fifteen tags, names of 256 and values of 256 characters
_MAX_TAG: Final = 256
_RSA_PRIVATE: Final = ("d", "dp", "dq", "qi", "p", "q")


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes that a caller may set; None where the body says nothing."""

    enabled: bool | None = None
    not_before: int | None = None
    expires: int | None = None
    exportable: bool | None = None

    @classmethod
    def read(cls, fields: Fields | None) -> Attributes:
        """Read them; what only the service sets (created, recoveryLevel, …) is passed over."""
        if fields is None:
            return cls()
        found = cls(
            enabled=fields.flag("enabled"),
            not_before=fields.time("nbf"),
            expires=fields.time("exp"),
            exportable=fields.flag("exportable"),
        )
        check_times(found.not_before, found.expires)
        return found


def check_times(not_before: int | None, expires: int | None) -> None:
    """Refuse a key that would never be valid."""
    if not_before is not None and expires is not None and not_before >= expires:
        raise bad_parameter("Attribute nbf is not before exp.")


@dataclass(frozen=True, slots=True)
class Policy:
    """A release policy as it was given; its JSON was read by the grammar."""

    data: bytes
    content_type: str = POLICY_CONTENT_TYPE
    immutable: bool = False

    @classmethod
    def read(cls, fields: Fields | None) -> Policy | None:
        """
        Read the member ``release_policy``.

        A policy that the grammar refuses is refused here, with the place: a key whose policy
        nobody can evaluate could never be released.
        """
        if fields is None:
            return None
        fields.only(("contentType", "data", "immutable"))
        data = fields.need_data("data", longest=MAX_POLICY, shortest=1)
        kind = fields.text("contentType", longest=128) or POLICY_CONTENT_TYPE
        if kind.replace(" ", "").lower() not in (
            "application/json",
            "application/json;charset=utf-8",
        ):
            raise fields.error("contentType", POLICY_CONTENT_TYPE)
        try:
            ReleasePolicy.from_json(data)
        except AttestationError as error:
            raise bad_parameter(f"AKV.SKR.1002: {str(error)[:400]}") from None
        return cls(data=data, content_type=kind, immutable=fields.flag("immutable") or False)


def _operations(fields: Fields) -> tuple[str, ...] | None:
    values = fields.array("key_ops", longest=2 * len(OPERATIONS))
    if values is None:
        return None
    for value in values:
        if not isinstance(value, str) or value not in OPERATIONS:
            raise fields.error("key_ops", "a list of " + ", ".join(OPERATIONS))
    return tuple(dict.fromkeys(values))


def _tags(fields: Fields) -> dict[str, str] | None:
    value = fields.get("tags")
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > _MAX_TAGS:
        raise fields.error("tags", f"an object of at most {_MAX_TAGS} tags")
    for name, text in value.items():
        if not 0 < len(name) <= _MAX_TAG or not isinstance(text, str) or len(text) > _MAX_TAG:
            raise fields.error("tags", f"names and strings of at most {_MAX_TAG} characters")
    return dict(value)


def check_policy_rules(kty: str, *, exportable: bool, policy: bool) -> None:
    """Check what belongs together: only a hardware key is exportable, and then with a policy."""
    if exportable and kty not in HSM_TYPES:
        raise bad_parameter(
            "AKV.SKR.1006: The exportable attribute needs a hardware protected key (-HSM)."
        )
    if exportable and not policy:
        raise bad_parameter("AKV.SKR.1004: Exportable keys must have release policy.")
    if policy and not exportable:
        raise bad_parameter("AKV.SKR.1005: Non-exportable keys must not have release policy.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRequest:
    """A request for a new key or version."""

    spec: KeySpec
    key_ops: tuple[str, ...]
    attributes: Attributes = field(default_factory=Attributes)
    policy: Policy | None = None
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> CreateRequest:
        """Read the body of ``POST /keys/{name}/create``."""
        fields = Fields(body)
        kty = fields.choice("kty", KEY_TYPES)
        if kty is None:
            raise bad_parameter("Property kty is missing.")
        kind = kty.removesuffix("-HSM")
        return cls(
            spec=_spec(fields, kty, kind),
            key_ops=_checked(_operations(fields), kind),
            attributes=Attributes.read(fields.table("attributes")),
            policy=Policy.read(fields.table("release_policy")),
            tags=_tags(fields) or {},
        )


def check_operations(operations: tuple[str, ...], kty: str) -> None:
    """Refuse operations that no key of this type has."""
    wrong = set(operations) & {"encrypt", "decrypt", "wrapKey", "unwrapKey"}
    if kty.startswith("EC") and wrong:
        raise bad_parameter(f"Property key_ops has invalid value: an EC key cannot {min(wrong)}.")


def _checked(operations: tuple[str, ...] | None, kind: str) -> tuple[str, ...]:
    if operations is None:
        return DEFAULT_OPS[kind]
    check_operations(operations, kind)
    return operations


def _spec(fields: Fields, kty: str, kind: str) -> KeySpec:
    curve = fields.choice("crv", CURVES)
    size = fields.whole("key_size", least=0, most=1 << 16)
    exponent = fields.whole("public_exponent", least=0, most=(1 << 32) - 1)
    if kind == "RSA":
        if size not in (None, *_RSA_SIZES):
            raise fields.error("key_size", "2048, 3072 or 4096")
        if exponent not in (None, _EXPONENT):
            raise fields.error("public_exponent", "65537")
        return KeySpec(kty=kty, size=size or 2048)
    if exponent is not None:
        raise fields.error("public_exponent", "none, as only RSA keys have it,")
    if kind == "EC":
        return KeySpec(kty=kty, crv=curve or "P-256")
    if size not in (None, *_OCT_SIZES):
        raise fields.error("key_size", "128, 192 or 256")
    return KeySpec(kty=kty, size=size or 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """A key made elsewhere, with its private half."""

    kty: str
    size: int | None
    jwk: Mapping[str, str] = field(repr=False)
    key_ops: tuple[str, ...]
    attributes: Attributes = field(default_factory=Attributes)
    policy: Policy | None = None
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ImportRequest:
        """Read the body of ``PUT /keys/{name}``."""
        fields = Fields(body)
        key = fields.table("key")
        if key is None:
            raise bad_parameter("Property key is missing.")
        kty = key.choice("kty", KEY_TYPES)
        if kty is None:
            raise bad_parameter("Property key.kty is missing.")
        kind = kty.removesuffix("-HSM")
        # The wire says "Hsm"; the published documents say both.
        said = [fields.flag(name) for name in ("Hsm", "hsm") if fields.has(name)]
        if len(said) > 1:
            raise bad_parameter("Property Hsm is there in two spellings.")
        hardware = said[0] if said else None
        if hardware is False and kty in HSM_TYPES:
            raise bad_parameter("Property Hsm contradicts key.kty.")
        jwk, size = _private_key(key, kind)
        kty = f"{kind}-HSM" if hardware or kty in HSM_TYPES else kind
        return cls(
            kty=kty,
            size=size,
            jwk=jwk | {"kty": kty},
            key_ops=_checked(_operations(key), kind),
            attributes=Attributes.read(fields.table("attributes")),
            policy=Policy.read(fields.table("release_policy")),
            tags=_tags(fields) or {},
        )


def _private_key(key: Fields, kind: str) -> tuple[dict[str, str], int | None]:
    """Return the members that make up the key, of sane sizes; the backend does the arithmetic."""
    if key.has("key_hsm"):
        raise bad_parameter("Property key.key_hsm is not supported: wrapped keys are not taken.")
    if kind == "RSA":
        modulus = key.need_data("n", longest=513, shortest=256)
        size = int.from_bytes(modulus, "big").bit_length()
        if size not in _RSA_SIZES:
            raise key.error("n", "a modulus of 2048, 3072 or 4096 bits")
        exponent = key.need_data("e", longest=8, shortest=1)
        if int.from_bytes(exponent, "big") != _EXPONENT:
            raise key.error("e", "65537")
        for name in _RSA_PRIVATE:
            key.need_data(name, longest=513, shortest=1)
        return {name: key.get(name) for name in ("n", "e", *_RSA_PRIVATE)}, size
    if kind == "EC":
        curve = key.choice("crv", CURVES)
        if curve is None:
            raise bad_parameter("Property key.crv is missing.")
        for name in ("x", "y", "d"):
            key.need_data(name, longest=_COORDINATES[curve] + 1, shortest=1)
        return {"crv": curve} | {name: key.get(name) for name in ("x", "y", "d")}, None
    secret = key.need_data("k", longest=64, shortest=1)
    if len(secret) * 8 not in _OCT_SIZES:
        raise key.error("k", "a key of 128, 192 or 256 bits")
    return {"k": key.get("k")}, len(secret) * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """What of a key is to change; None stays as it is."""

    key_ops: tuple[str, ...] | None = None
    attributes: Attributes = field(default_factory=Attributes)
    policy: Policy | None = None
    tags: dict[str, str] | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> UpdateRequest:
        """Read the body of ``PATCH /keys/{name}/{version}``."""
        fields = Fields(body)
        return cls(
            key_ops=_operations(fields),
            attributes=Attributes.read(fields.table("attributes")),
            policy=Policy.read(fields.table("release_policy")),
            tags=_tags(fields),
        )
