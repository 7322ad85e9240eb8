"""
The checks of Arm CCA tokens.

draft-ffm-rats-cca-token ("Token Binding", "Token Verification") and the Realm Management Monitor
specification (DEN0137), A7. The platform's attestation key (CPAK) signs the platform's part, whose
challenge is the hash of the key that signs the realm's part. Arm has no root: makers of platforms
hand out the public keys of their machines. So a token is believed if the relying party gives that
key as ``cpak-pub.json`` among the endorsements, as it gives ``jwks.json`` for a service's tokens.
What a token says of its platform's key is never believed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation.case import (
    CaseBase,
    gathered,
    judge_nonce,
    judge_reference,
    judge_registers,
    judge_report_data,
)
from pyenclave.attestation.checks import (
    BREAKS,
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    absent,
    failed,
    not_asked,
)
from pyenclave.errors import EnclaveError
from pyenclave.formats import cca, jsonstrict
from pyenclave.formats.cca import CcaToken, PlatformClaims, RealmClaims
from pyenclave.formats.cose import Sign1
from pyenclave.formats.jwk import Jwk

__all__ = ["CHECKS", "CPAK", "Case", "claims"]

CPAK: Final = "cpak-pub.json"
_ALGORITHMS: Final = frozenset(("ES256", "ES384", "ES512", "EdDSA"))
_SECURED: Final = 0x30
_DEBUG: Final = (0x40, 0x50)
_GIVE: Final = (
    f"Give the platform's attestation key as {CPAK} (a JSON Web Key) among the endorsements; the "
    "maker of the platform hands it out by instance ID."
)


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A token, and what it is judged by."""

    def read_token(self) -> CcaToken:
        """Read the token."""
        return self._part("token", lambda: CcaToken.from_bytes(self.data))

    def read_platform(self) -> PlatformClaims:
        """Read what the platform says."""
        payload = self.token.platform.payload
        return self._part("platform", lambda: PlatformClaims.from_bytes(payload))

    def read_realm(self) -> RealmClaims:
        """Read what is said of the realm."""
        payload = self.token.realm.payload
        return self._part("realm", lambda: RealmClaims.from_bytes(payload))

    def read_realm_key(self) -> tuple[Any, frozenset[str]]:
        """Read the realm's key."""
        realm = self.realm
        return self._part("realm:key", realm.read_key)

    def read_cpak(self) -> Jwk | None:
        """Read the platform's key; None if the relying party gave none."""
        data = self.endorsements.get(CPAK)
        if data is None:
            return None
        return self._part("cpak", lambda: Jwk.from_json(jsonstrict.loads(data, CPAK), CPAK))

    @property
    def token(self) -> CcaToken:
        """The token, for other checks."""
        return self.need("token.format", self.read_token)

    @property
    def platform(self) -> PlatformClaims:
        """What the platform says, for other checks."""
        return self.need("platform.format", self.read_platform)

    @property
    def realm(self) -> RealmClaims:
        """What is said of the realm, for other checks."""
        return self.need("realm.format", self.read_realm)

    @property
    def realm_key(self) -> tuple[Any, frozenset[str]]:
        """The realm's key, for other checks."""
        return self.need("realm.key", self.read_realm_key)

    @property
    def cpak(self) -> Jwk | None:
        """The platform's key, for other checks."""
        return self.need("cpak.format", self.read_cpak)

    def platform_signed(self) -> bool | None:
        """Whether the given key signed the platform's part; None without a key."""
        key = self.cpak
        if key is None:
            return None
        return _signed(self.token.platform, key.key, key.algorithms)

    def realm_signed(self) -> bool:
        """Whether the realm's key signed the realm's part."""
        return _signed(self.token.realm, *self.realm_key)

    def bound(self) -> bool:
        """Whether the platform's challenge is the hash of the realm's key."""
        name = self.realm.public_key_hash
        if name not in cca.HASHES:
            return False
        digest = hashlib.new(name.replace("-", ""), self.realm.public_key).digest()
        return hmac.compare_digest(digest, self.platform.challenge)


def _signed(message: Sign1, key: Any, algorithms: frozenset[str]) -> bool:
    return message.verify(key, allowed=_ALGORITHMS & algorithms)


CHECKS: Final[Registry[Case]] = Registry()


# ---- is it genuine? ---------------------------------------------------------------------------


@CHECKS.evidence("token.format")
def _token(case: Case) -> Verdict:
    """The token is a collection of two signed parts, the platform's and the realm's."""
    case.read_token()
    return PASSED


@CHECKS.evidence("platform.format")
def _platform(case: Case) -> Verdict:
    """The platform's part has all its claims, each of its type and size."""
    case.read_platform()
    return PASSED


@CHECKS.evidence("platform.profile")
def _platform_profile(case: Case) -> Verdict:
    """The platform's claims are of a profile that is known."""
    found = case.platform.profile
    if found in cca.PLATFORM_PROFILES:
        return PASSED
    return failed(expected=cca.PLATFORM_PROFILES, found=found)


@CHECKS.evidence("cpak.format")
def _cpak_format(case: Case) -> Verdict:
    """The platform's key, if it is given, is a public key that verifies signatures."""
    if case.read_cpak() is None:
        return not_asked(f"no {CPAK} was given")
    return PASSED


@CHECKS.evidence("platform.signature")
def _platform_signature(case: Case) -> Verdict:
    """The platform's key that was given signed the platform's part."""
    signed = case.platform_signed()
    if signed is None:
        return absent("the platform's attestation key", advice=_GIVE)
    if signed:
        return PASSED
    return failed(
        expected="a signature of the given platform key",
        found=f"{case.token.platform.algorithm or 'an unknown algorithm'}, invalid",
        advice="Something was changed, or the token is of another machine: compare instance IDs.",
    )


@CHECKS.evidence("platform.lifecycle")
def _lifecycle(case: Case) -> Verdict:
    """Only a secured platform keeps its keys; debug states are for the policy."""
    high = case.platform.lifecycle >> 8
    if high == _SECURED or high in _DEBUG:
        return PASSED
    return failed(
        expected="a secured platform",
        found=f"{case.platform.lifecycle:#06x}: {case.platform.state}",
        advice="Its keys prove nothing in this state.",
    )


@CHECKS.evidence("realm.format")
def _realm(case: Case) -> Verdict:
    """The realm's part has all its claims, each of its type and size."""
    case.read_realm()
    return PASSED


@CHECKS.evidence("realm.profile")
def _realm_profile(case: Case) -> Verdict:
    """The realm's claims are of a profile that is known, or of none, as the legacy form."""
    found = case.realm.profile
    if found in cca.REALM_PROFILES:
        return PASSED
    return failed(expected=tuple(filter(None, cca.REALM_PROFILES)), found=found)


@CHECKS.evidence("realm.key")
def _realm_key(case: Case) -> Verdict:
    """The realm's key is one that verifies signatures."""
    case.read_realm_key()
    return PASSED


@CHECKS.evidence("realm.binding")
def _binding(case: Case) -> Verdict:
    """The platform vouches for the realm's key."""
    if case.bound():
        return PASSED
    return failed(
        expected=f"the {case.realm.public_key_hash} of the realm's key as platform challenge",
        found=case.platform.challenge,
        advice="The two parts do not belong together.",
    )


@CHECKS.evidence("realm.signature")
def _realm_signature(case: Case) -> Verdict:
    """The realm's key signed the realm's part."""
    if case.realm_signed():
        return PASSED
    return failed(
        expected="a signature of the realm's key",
        found=f"{case.token.realm.algorithm or 'an unknown algorithm'}, invalid",
        advice="Something was changed on the way.",
    )


# ---- is it what I want? -----------------------------------------------------------------------


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """The realm's challenge is the nonce that was sent, or what it becomes."""
    return judge_nonce(case, case.realm.challenge)


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """The realm's challenge is the 64 bytes that are expected."""
    return judge_report_data(case, case.realm.challenge)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """A CCA token has none beside its challenge: to expect some refuses."""
    if case.user_data is None:
        return not_asked("a token has a challenge of 64 bytes and no other user data")
    return failed(
        expected=case.user_data,
        found="none: a CCA token has a challenge instead",
        advice="Give report_data, as the realm makes it.",
    )


@CHECKS.policy("debug")
def _debug(case: Case) -> Verdict:
    """Nobody debugs the platform, unless the policy allows it."""
    if case.platform.lifecycle >> 8 in _DEBUG and not case.policy.allow_debug:
        return failed(
            expected="a secured platform",
            found=f"{case.platform.lifecycle:#06x}: {case.platform.state}",
            advice="Whoever debugs the platform reads the realm's memory.",
        )
    return PASSED


@CHECKS.policy("platform.implementation")
def _implementation(case: Case) -> Verdict:
    """The platform's implementation is one that the policy names."""
    return judge_reference(case, "implementation_id", case.platform.implementation_id)


@CHECKS.policy("code.rim")
def _rim(case: Case) -> Verdict:
    """The realm's initial measurement is one that the policy names."""
    return judge_reference(
        case,
        "rim",
        case.realm.rim,
        advice="The realm was made of something else.",
        unnamed="name rim in the policy, or any realm is accepted",
    )


@CHECKS.policy("code.rems")
def _rems(case: Case) -> Verdict:
    """The extensible measurements that the policy names have its values."""
    advice = "Code in the realm extended something else."
    return judge_registers(case, "rems", dict(enumerate(case.realm.rems)), advice=advice)


@CHECKS.policy("code.rpv")
def _rpv(case: Case) -> Verdict:
    """The realm's personalization value is one that the policy names."""
    return judge_reference(case, "rpv", case.realm.rpv)


# ---- what it says -----------------------------------------------------------------------------


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the token says, as far as it can be read; binary values as hex."""
    return gathered(case, _platform_claims, _realm_claims, _token_claims, _signature_claims)


def _token_claims(case: Case) -> dict[str, Any]:
    token = case.token
    return {
        "tag": token.tag,
        "platform_alg": _algorithm(token.platform),
        "realm_alg": _algorithm(token.realm),
    }


def _algorithm(message: Sign1) -> int | None:
    """Return the algorithm's number; the header is CBOR, and may have anything there."""
    found = message.header.get(1)
    return found if type(found) is int else None


def _platform_claims(case: Case) -> dict[str, Any]:
    platform = case.platform
    return {
        "platform_profile": platform.profile,
        "platform_challenge": platform.challenge.hex(),
        "platform_hash": platform.hash,
        "implementation_id": platform.implementation_id.hex(),
        "instance_id": platform.instance_id.hex(),
        "config": platform.config.hex(),
        "lifecycle": platform.lifecycle,
        "lifecycle_state": platform.state,
        "verification_service": platform.verification_service,
        "sw_components": len(platform.components),
        "components": [
            {
                "name": item.name,
                "version": item.version,
                "measurement": item.measurement.hex(),
                "signer": item.signer.hex(),
                "hash": item.hash or platform.hash,
            }
            for item in platform.components
        ],
    }


def _realm_claims(case: Case) -> dict[str, Any]:
    realm = case.realm
    return {
        "realm_profile": realm.profile,
        "realm_hash": realm.hash,
        "realm_pubkey": realm.public_key.hex(),
        "realm_pubkey_hash": realm.public_key_hash,
        "challenge": realm.challenge.hex(),
        "rim": realm.rim.hex(),
        "rems": [item.hex() for item in realm.rems],
        "rpv": realm.rpv.hex(),
        "mec_policy": realm.mec_policy,
    }


def _signature_claims(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, holds in (
        ("realm_signature_ok", case.realm_signed),
        ("platform_signature_ok", case.platform_signed),
        ("binding_ok", case.bound),
    ):
        try:
            found[name] = holds()
        except (EnclaveError, NotReachedError, *BREAKS):
            found[name] = None
    return found
