"""Makes Arm CCA tokens as a platform and its realm management monitor do, with keys of our own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import cose_key
from pyenclave.formats.cca import (
    LEGACY_PROFILE,
    PLATFORM_PROFILES,
    REALM_PROFILES,
    CcaToken,
    Component,
    PlatformClaims,
    RealmClaims,
)
from pyenclave.formats.cose import Sign1
from pyenclave.formats.jwk import public_members

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
NONCE = bytes(range(64))
RIM = b"\x31" * 32
IMPLEMENTATION = b"\x32" * 32
RPV = b"\x33" * 64
REM = b"\x34" * 32
SECURED, DEBUG, DECOMMISSIONED = 0x3001, 0x4000, 0x6000
_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


def key_of(name: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    secret = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return ec.derive_private_key(secret >> 8, curve or ec.SECP384R1())


CPAK, RAK = key_of("cpak"), key_of("rak")


def raw_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    size = (key.key_size + 7) // 8
    return b"\x04" + numbers.x.to_bytes(size, "big") + numbers.y.to_bytes(size, "big")


def cpak_file(key: ec.EllipticCurvePrivateKey = CPAK, **members: Any) -> dict[str, bytes]:
    return {"cpak-pub.json": json.dumps(public_members(key.public_key()) | members).encode()}


def realm_claims(**changes: Any) -> RealmClaims:
    """Return the claims of a realm; the key fits the profile."""
    profile = changes.get("profile")
    key = raw_of(RAK) if profile is None else cose_key.write_key(RAK.public_key())
    newest = profile == REALM_PROFILES[-1]
    made = RealmClaims(
        challenge=NONCE,
        rpv=RPV,
        rim=RIM,
        rems=(REM, bytes(32), bytes(32), bytes(32)),
        hash="sha-256",
        public_key=key,
        public_key_hash="sha-384",
        mec_policy="private" if newest else None,
        instance_id=b"\1" + bytes(32) if newest else None,
    )
    return replace(made, **changes)


def platform_claims(realm: RealmClaims, **changes: Any) -> PlatformClaims:
    """Return the claims of a platform that vouches for the realm's key."""
    made = PlatformClaims(
        profile=LEGACY_PROFILE,
        challenge=hashlib.sha384(realm.public_key).digest(),
        implementation_id=IMPLEMENTATION,
        instance_id=b"\1" + bytes(range(32)),
        config=b"config",
        lifecycle=SECURED,
        components=(Component(measurement=b"\x41" * 32, signer=b"\x42" * 48, name="RMM"),),
        hash="sha-256",
        client_id=1 if changes.get("profile") == PLATFORM_PROFILES[-1] else None,
    )
    return replace(made, **changes)


def newest() -> dict[str, Any]:
    """Return the options of a token whose parts have the newest profiles."""
    return {
        "realm": {"profile": REALM_PROFILES[-1]},
        "platform": {"profile": PLATFORM_PROFILES[-1]},
    }


def message(payload: bytes, key: ec.EllipticCurvePrivateKey, **changes: Any) -> Sign1:
    algorithm = _ALGORITHMS[key.curve.name]
    return replace(Sign1.sign(payload, key=key, algorithm=algorithm, tagged=True), **changes)


def token(**changes: Any) -> bytes:
    """
    Return a token; options: ``realm`` and ``platform`` (claims), ``realm_key``, ``platform_key``,
    ``realm_payload``, ``platform_payload``, ``realm_message``, ``platform_message``, ``tag``.
    """
    realm = realm_claims(**changes.get("realm", {}))
    platform = platform_claims(realm, **changes.get("platform", {}))
    made = CcaToken(
        platform=message(
            changes.get("platform_payload", platform.to_bytes()),
            changes.get("platform_key", CPAK),
            **changes.get("platform_message", {}),
        ),
        realm=message(
            changes.get("realm_payload", realm.to_bytes()),
            changes.get("realm_key", RAK),
            **changes.get("realm_message", {}),
        ),
        tag=changes.get("tag", 399),
    )
    return made.to_bytes()


def judge(data: bytes, **changes: Any) -> AttestationResult:
    options: dict[str, Any] = {
        "policy": AppraisalPolicy(rim=RIM),
        "nonce": NONCE,
        "endorsements": cpak_file(),
        "at": AT,
    }
    return appraise(data, **(options | changes))
