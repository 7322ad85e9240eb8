"""
Arm CCA attestation tokens: what a platform and a realm on it say of themselves.

draft-ffm-rats-cca-token and the Realm Management Monitor specification (DEN0137), A7. A token is a
collection of two tagged COSE_Sign1 messages over claims sets. Maps and strings are of definite
length; numbers may be in any width. Claims that are not known are ignored, as EAT (RFC 9711) asks:
they are signed all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor, cose_key
from pyenclave.formats.cbor import Tag
from pyenclave.formats.cose import PublicKey, Sign1

__all__ = [
    "HASHES",
    "LEGACY_PROFILE",
    "LIFECYCLES",
    "MAX_SIZE",
    "PLATFORM_PROFILES",
    "REALM_PROFILES",
    "TAG",
    "TAG_CMW",
    "CcaToken",
    "Component",
    "PlatformClaims",
    "RealmClaims",
]

TAG: Final = 399
TAG_CMW: Final = 907  # a collection of conceptual messages, from version 2 of the draft on
MAX_SIZE: Final = 64 * 1024
PLATFORM_LABEL: Final = 44234
REALM_LABEL: Final = 44241
EAT_CWT: Final = 263  # content format application/eat+cwt

LEGACY_PROFILE: Final = "http://arm.com/CCA-SSD/1.0.0"
PLATFORM_2024: Final = "tag:arm.com,2024:cca_platform#2.0.0"
REALM_2024: Final = "tag:arm.com,2024:realm#2.0.0"
PLATFORM_PROFILES: Final = (LEGACY_PROFILE, "tag:arm.com,2023:cca_platform#1.0.0", PLATFORM_2024)
#: None: no profile of its own, the platform's legacy one speaks for both.
REALM_PROFILES: Final = (None, "tag:arm.com,2023:realm#1.0.0", REALM_2024)

#: Name in the IANA registry of named information → size.
HASHES: Final = {"sha-256": 32, "sha-384": 48, "sha-512": 64}
#: High byte of the security lifecycle → what it means.
LIFECYCLES: Final = {
    0x00: "unknown",
    0x10: "assembly and test",
    0x20: "provisioning",
    0x30: "secured",
    0x40: "debug of the realm management domain",
    0x50: "recoverable debug of the platform",
    0x60: "decommissioned",
}

_MAX_COMPONENTS: Final = 256
_MAX_TEXT: Final = 1024
_MAX_CONFIG: Final = 4096
_HASH_SIZES: Final = (32, 48, 64)
_RAW_KEY: Final = 97  # a point of P-384, uncompressed
_KID: Final = 4


def _shown(value: object) -> str:
    if isinstance(value, bytes | list | dict):
        return f"{len(value)} of {type(value).__name__}"
    return f"{value!r:.60}"


class _Claims:
    """Takes claims of a set by number, each of its type and size."""

    def __init__(self, data: bytes, what: str) -> None:
        value = cbor.loads(data, what, form="definite", max_size=MAX_SIZE)
        self.what = what
        if not isinstance(value, dict):
            raise self.wrong("claims", "a map", value)
        self.fields: Mapping[Any, Any] = value

    def wrong(self, name: str, expected: str, found: object) -> EvidenceFormatError:
        return EvidenceFormatError(f"{self.what}: {name}", expected=expected, found=_shown(found))

    def get(self, label: int, name: str, *, needed: bool = True) -> Any:
        if needed and label not in self.fields:
            raise EvidenceFormatError(f"{self.what}: a claim is missing", expected=name)
        return self.fields.get(label)

    def octets(self, label: int, name: str, *sizes: int) -> bytes:
        value = self.get(label, name)
        if not isinstance(value, bytes) or len(value) not in sizes:
            raise self.wrong(name, f"{' or '.join(map(str, sizes))} bytes", value)
        return value

    def number(self, label: int, name: str, highest: int) -> int:
        value = self.get(label, name)
        if type(value) is not int or not 0 <= value <= highest:
            raise self.wrong(name, f"0 to {highest}", value)
        return value

    def text(self, label: int, name: str) -> str:
        return self._text(name, self.get(label, name))

    def optional_text(self, label: int, name: str) -> str | None:
        if label not in self.fields:
            return None
        return self._text(name, self.fields[label])

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= _MAX_TEXT:
            raise self.wrong(name, f"1 to {_MAX_TEXT} characters", value)
        return value

    def instance(self, label: int = 256) -> bytes:
        value = self.octets(label, "instance ID", 33)
        if value[0] != 1:
            raise self.wrong("instance ID", "type 1 (RAND)", value[0])
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """
    Measured firmware of the platform.

    Attributes:
        measurement: Digest of the component.
        signer: Who signed it, mostly the digest of a public key.
        name: Its role, such as ``RMM``.
        version: As its vendor counts.
        hash: Name of the hash of the measurement; None: that of the platform.
    """

    measurement: bytes
    signer: bytes
    name: str | None = None
    version: str | None = None
    hash: str | None = None

    @classmethod
    def from_item(cls, value: object, what: str) -> Self:
        """Take a component that a CBOR reader has read; errors as for all claims."""
        if not isinstance(value, dict):
            raise EvidenceFormatError(f"{what}: not a map", found=_shown(value))
        digests: dict[str, bytes] = {}
        for label, name in ((2, "measurement"), (5, "signer")):
            found = value.get(label)
            if not isinstance(found, bytes) or len(found) not in _HASH_SIZES:
                raise EvidenceFormatError(
                    f"{what}: {name}", expected="32, 48 or 64 bytes", found=_shown(found)
                )
            digests[name] = found
        texts: dict[str, str | None] = {}
        for label, name in ((1, "name"), (4, "version"), (6, "hash")):
            found = value.get(label, "")
            if not isinstance(found, str) or len(found) > _MAX_TEXT:
                raise EvidenceFormatError(f"{what}: {name}", expected="text", found=_shown(found))
            texts[name] = found or None
        return cls(
            measurement=digests["measurement"],
            signer=digests["signer"],
            name=texts["name"],
            version=texts["version"],
            hash=texts["hash"],
        )

    def to_item(self) -> dict[int, Any]:
        """Return the component as a CBOR writer takes it."""
        fields = {
            1: self.name,
            2: self.measurement,
            4: self.version,
            5: self.signer,
            6: self.hash,
        }
        return {label: value for label, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformClaims:
    """
    What the platform's root of trust says.

    Attributes:
        profile: Names the document that the claims are of.
        challenge: Digest of the realm's key: what binds the two parts.
        implementation_id: Which implementation of CCA.
        instance_id: Names the attestation key of this machine; 01 and 32 bytes.
        config: Configuration of the platform; what it means the implementation says.
        lifecycle: Security lifecycle; see `LIFECYCLES`.
        components: Measured firmware.
        hash: Name of the hash of extended measurements.
        verification_service: A hint, never followed.
        client_id: Who asked the root of trust; profile of 2024 only, and 1 there.
    """

    profile: str
    challenge: bytes
    implementation_id: bytes
    instance_id: bytes
    config: bytes
    lifecycle: int
    components: tuple[Component, ...]
    hash: str
    verification_service: str | None = None
    client_id: int | None = None

    @property
    def state(self) -> str:
        """The lifecycle in words; ``invalid`` for a number that is none."""
        high = self.lifecycle >> 8
        return LIFECYCLES.get(high, "invalid")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a claims set.

        Raises:
            EvidenceFormatError: A claim is missing or not of its type and size.

        """
        claims = _Claims(data, "CCA platform")
        profile = claims.text(265, "profile")
        config = claims.get(2401, "config")
        if not isinstance(config, bytes) or len(config) > _MAX_CONFIG:
            raise claims.wrong("config", f"at most {_MAX_CONFIG} bytes", config)
        listed = claims.get(2399, "software components")
        if not isinstance(listed, list) or not 1 <= len(listed) <= _MAX_COMPONENTS:
            raise claims.wrong("software components", f"1 to {_MAX_COMPONENTS}", listed)
        client = None
        if profile == PLATFORM_2024:
            client = claims.number(2394, "client ID", 1)
            if client != 1:
                raise claims.wrong("client ID", "1", client)
        return cls(
            profile=profile,
            challenge=claims.octets(10, "challenge", *_HASH_SIZES),
            implementation_id=claims.octets(2396, "implementation ID", 32),
            instance_id=claims.instance(),
            config=config,
            lifecycle=claims.number(2395, "lifecycle", 0xFFFF),
            components=tuple(
                Component.from_item(item, f"CCA platform: component {place}")
                for place, item in enumerate(listed)
            ),
            hash=claims.text(2402, "hash algorithm"),
            verification_service=claims.optional_text(2400, "verification service"),
            client_id=client,
        )

    def to_bytes(self) -> bytes:
        """Write the claims set."""
        fields = {
            265: self.profile,
            10: self.challenge,
            2396: self.implementation_id,
            256: self.instance_id,
            2401: self.config,
            2395: self.lifecycle,
            2402: self.hash,
            2400: self.verification_service,
            2394: self.client_id,
            2399: [item.to_item() for item in self.components],
        }
        return cbor.dumps({label: value for label, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmClaims:
    """
    What the realm management monitor says of a realm.

    Attributes:
        challenge: What the realm's code was asked to include.
        rpv: Personalization value, given by the realm's owner at its creation.
        rim: Initial measurement: what the realm was made of.
        rems: The four measurements that its code extends.
        hash: Name of the hash of the measurements.
        public_key: Key that signs this part, as it is hashed: a point, or a COSE_Key.
        public_key_hash: Name of the hash that the platform's challenge is made with.
        profile: Names the document that the claims are of; None: none of its own.
        mec_policy: Whether the realm's memory has an encryption context of its own (``private``);
            profile of 2024 only.
        instance_id: Profile of 2024 only.
    """

    challenge: bytes
    rpv: bytes
    rim: bytes
    rems: tuple[bytes, ...]
    hash: str
    public_key: bytes
    public_key_hash: str
    profile: str | None = None
    mec_policy: str | None = None
    instance_id: bytes | None = None

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a claims set.

        Raises:
            EvidenceFormatError: A claim is missing or not of its type and size.

        """
        claims = _Claims(data, "CCA realm")
        profile = claims.optional_text(265, "profile")
        hash_name = claims.text(44236, "hash algorithm")
        # Registers may be longer than their hash: some write all 64 bytes of them.
        least = HASHES.get(hash_name, 0)
        sizes = tuple(size for size in _HASH_SIZES if size >= least)
        rim = claims.octets(44238, "initial measurement", *sizes)
        listed = claims.get(44239, "extensible measurements")
        if (
            not isinstance(listed, list)
            or len(listed) != 4
            or not all(isinstance(item, bytes) and len(item) == len(rim) for item in listed)
        ):
            raise claims.wrong("extensible measurements", f"4 of {len(rim)} bytes each", listed)
        key = claims.get(44237, "public key")
        if not isinstance(key, bytes) or not 1 <= len(key) <= _MAX_TEXT:
            raise claims.wrong("public key", f"1 to {_MAX_TEXT} bytes", key)
        mec = instance = None
        if profile == REALM_2024:
            instance = claims.instance()
            mec = claims.text(44243, "memory encryption policy")
            if mec not in ("private", "shared"):
                raise claims.wrong("memory encryption policy", "private or shared", mec)
        return cls(
            challenge=claims.octets(10, "challenge", 64),
            rpv=claims.octets(44235, "personalization value", 64),
            rim=rim,
            rems=tuple(listed),
            hash=hash_name,
            public_key=key,
            public_key_hash=claims.text(44240, "hash algorithm of the public key"),
            profile=profile,
            mec_policy=mec,
            instance_id=instance,
        )

    def read_key(self) -> tuple[PublicKey, frozenset[str]]:
        """
        Return the realm's key and the algorithms that it may be used with.

        A realm with a profile of its own has a COSE_Key, one without a bare point of P-384.

        Raises:
            EvidenceFormatError: It is no such key.

        """
        if self.profile is not None:
            return cose_key.read_key(self.public_key, "CCA realm: public key")
        raw = self.public_key
        if len(raw) == _RAW_KEY and raw[0] == 4:
            try:
                key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), raw)
            except ValueError:
                pass
            else:
                return key, cose_key.algorithms_of(key)
        raise EvidenceFormatError(
            "CCA realm: public key", expected="an uncompressed point of P-384", found=raw[:49].hex()
        )

    def to_bytes(self) -> bytes:
        """Write the claims set."""
        fields = {
            10: self.challenge,
            265: self.profile,
            44235: self.rpv,
            44238: self.rim,
            44239: list(self.rems),
            44236: self.hash,
            44237: self.public_key,
            44240: self.public_key_hash,
            44243: self.mec_policy,
            256: self.instance_id,
        }
        return cbor.dumps({label: value for label, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class CcaToken:
    """
    A token: two signed messages.

    Attributes:
        platform: Signed by the platform's attestation key.
        realm: Signed by the key that the platform's part vouches for.
        tag: Tag of the collection: `TAG` or `TAG_CMW`.
    """

    platform: Sign1
    realm: Sign1
    tag: int = TAG

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read a token.

        Raises:
            EvidenceFormatError: Malformed, or something in it that is neither part.

        """
        value = cbor.loads(data, "CCA token", form="definite", max_size=MAX_SIZE)
        if not isinstance(value, Tag) or value.number not in (TAG, TAG_CMW):
            raise EvidenceFormatError(
                "CCA token: not a collection",
                expected=f"tag {TAG} or {TAG_CMW}",
                found=value.number if isinstance(value, Tag) else _shown(value),
            )
        parts = value.value
        if not isinstance(parts, dict) or parts.keys() != {PLATFORM_LABEL, REALM_LABEL}:
            raise EvidenceFormatError(
                "CCA token: not two parts",
                expected=f"a map of {PLATFORM_LABEL} and {REALM_LABEL}",
                found=_shown(sorted(map(str, parts)) if isinstance(parts, dict) else parts),
            )
        unwrap = _plain if value.number == TAG else _wrapped
        return cls(
            platform=_message(unwrap(parts[PLATFORM_LABEL]), "CCA platform token"),
            realm=_message(unwrap(parts[REALM_LABEL]), "CCA realm token"),
            tag=value.number,
        )

    def to_bytes(self) -> bytes:
        """Write the token."""
        parts: dict[int, Any] = {
            PLATFORM_LABEL: self.platform.to_bytes(),
            REALM_LABEL: self.realm.to_bytes(),
        }
        if self.tag == TAG_CMW:
            parts = {label: [EAT_CWT, part] for label, part in parts.items()}
        return cbor.dumps(Tag(self.tag, parts))


def _plain(value: object) -> object:
    return value


def _wrapped(value: object) -> object:
    """Take the message out of a CMW record: its content format, then the bytes."""
    if isinstance(value, list) and len(value) == 2 and value[0] == EAT_CWT:
        return value[1]
    raise EvidenceFormatError(
        "CCA token: a part", expected=f"[{EAT_CWT}, bytes]", found=_shown(value)
    )


def _message(data: object, what: str) -> Sign1:
    if not isinstance(data, bytes):
        raise EvidenceFormatError(f"{what}: not a byte string", found=_shown(data))
    value = cbor.loads(data, what, form="definite", max_size=MAX_SIZE)
    message = Sign1.from_item(value, what)
    if not message.tagged:
        raise EvidenceFormatError(f"{what}: no tag", expected="18", found="none")
    # A name of the key is a hint and may go unsigned; nothing else does.
    if message.unprotected.keys() - {_KID}:
        raise EvidenceFormatError(
            f"{what}: unprotected header",
            expected="nothing but a key's name",
            found=_shown(dict(message.unprotected)),
        )
    return message
