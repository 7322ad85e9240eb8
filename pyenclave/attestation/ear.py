"""
Our results in the form that others read: EAT attestation results (draft-ietf-rats-ear).

The mapping follows the project's notes on EAR (9.2): a genuine TEE with an up-to-date TCB has
trustworthy hardware and encrypted memory; a software platform has neither, whatever it measured.
A refused appraisal is never affirming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from pyenclave.formats import jose
from pyenclave.formats.ear import PROFILES, TIERS, Form, tier_of

if TYPE_CHECKING:
    from pyenclave.attestation.result import AttestationResult

__all__ = ["DEVELOPER", "sign_ear", "to_ear", "trustworthiness"]

DEVELOPER: Final = "https://pypi.org/project/pyenclave"
# Values of trustworthiness claims (draft-ietf-rats-ear, 3.2).
_TRUSTED, _UNSAFE, _CONTRAINDICATED, _UNRECOGNIZED, _CRYPTO_FAILED = 2, 32, 96, 97, 99
_VISIBLE: Final = 96  # runtime-opaque: whoever runs the machine sees the memory
_UNRECOGNIZED_CODE: Final = 33
_RUNTIME: Final = 2  # executables: only a recognized set was loaded
_TOKENS: Final = frozenset(
    ("maa-jwt", "google-confidential-space-jwt", "attestation-result-jwt", "x5c-jwt")
)
# Documents of vendors: genuine or not, they say nothing of any machine that runs now.
_NO_ATTESTER: Final = frozenset(("sgx-collateral", "sev-snp-vek-cert", "maa-jwks", "tcg-eventlog"))
_MAX_DEPTH: Final = 4  # of claims inside claims
_MAX_NONCE: Final = 64  # bytes (draft-ietf-rats-ear: 8 to 64)


def trustworthiness(result: AttestationResult) -> dict[str, int]:
    """
    Return the trustworthiness vector of *result*: category → value.

    A category that the evidence says nothing about is left out. What attests no machine has none.
    """
    if result.kind in _NO_ATTESTER:
        return {}
    software = _is_software(result)
    vector: dict[str, int] = {}
    if not result.genuine:
        vector["hardware"] = _CRYPTO_FAILED
        return vector
    vector["hardware"] = _hardware(result, software=software)
    debug = _debug(result)
    if software or debug:
        vector["runtime-opaque"] = _VISIBLE
    elif result.kind not in _TOKENS:
        vector["runtime-opaque"] = _TRUSTED
    code = [check for check in result.checks if f".{check.name}".rpartition(".code.")[1]]
    if any(not check.holds for check in code):
        vector["executables"] = _UNRECOGNIZED_CODE
    elif result.identified:
        vector["executables"] = _RUNTIME
    if debug:
        vector["configuration"] = _CONTRAINDICATED
    elif result.accepted:
        vector["configuration"] = _TRUSTED
    else:
        vector["configuration"] = _UNSAFE
    return vector


def _is_software(result: AttestationResult) -> bool:
    return result.kind == "pyenclave" and result.claims.get("tee", "none") == "none"


def _debug(result: AttestationResult) -> bool:
    """Whether the evidence says debug; also where the policy allows it."""
    names = ("debug", "enclave.debug", "td.debug")
    failed = any(
        check.name.endswith(names) and check.outcome == "failed" for check in result.checks
    )
    return failed or True in _said(result.claims, "debug")


def _said(claims: Mapping[str, Any], name: str, depth: int = _MAX_DEPTH) -> list[Any]:
    """Return what *claims* say by that *name*; evidence inside evidence has claims of its own."""
    found = [claims[name]] if name in claims else []
    for value in claims.values():
        if depth and isinstance(value, Mapping):
            found += _said(value, name, depth - 1)
    return found


def _hardware(result: AttestationResult, *, software: bool) -> int:
    if software:
        return _UNRECOGNIZED
    if _debug(result):
        return _CONTRAINDICATED
    if result.kind in _TOKENS:
        return _TRUSTED if result.accepted else _UNSAFE
    statuses = _said(result.claims, "tcb_status")
    if "Revoked" in statuses:
        return _CONTRAINDICATED
    if any(status is not None and status != "UpToDate" for status in statuses):
        return _UNSAFE
    tcb = [check for check in result.checks if "tcb." in check.name or "collateral." in check.name]
    return _TRUSTED if all(check.holds for check in tcb) else _UNSAFE


def _status(vector: Mapping[str, int]) -> str:
    tiers = [tier_of(value) for value in vector.values()]
    return max(tiers, key=TIERS.__getitem__, default="none")


def to_ear(
    result: AttestationResult,
    *,
    form: Form = "dotted",
    submod: str = "cpu0",
    policy_id: str | None = None,
    nonce: bytes | None = None,
    lifetime: int = 300,
    build: str | None = None,
) -> dict[str, Any]:
    """
    Return *result* as the claims of an EAR.

    Args:
        result: What `appraise` returned, accepted or not.
        form: Names with dots, as deployed verifiers write them, or with underscores as the draft.
        submod: Name of the attester.
        policy_id: Identifier of the policy that was applied.
        nonce: The relying party's challenge; only what the result shows to be fresh may be given.
        lifetime: Seconds until the result expires.
        build: Name and version of the verifier; default this package's.

    Raises:
        ValueError: An impossible argument, or a nonce that the result was not checked for.

    """
    if form not in PROFILES:
        raise ValueError(f"form is {' or '.join(PROFILES)}, not {form!r}")
    if lifetime <= 0:
        raise ValueError("lifetime: at least one second")
    if nonce is not None and not (result.fresh and 8 <= len(nonce) <= _MAX_NONCE):
        raise ValueError("nonce: 8 to 64 bytes, and checked by this appraisal")
    if build is None:
        from pyenclave import __version__

        build = f"pyenclave {__version__}"
    mark = "." if form == "dotted" else "_"
    vector = trustworthiness(result)
    appraisal: dict[str, Any] = {
        f"ear{mark}status": _status(vector),
        f"ear{mark}trustworthiness{'-' if form == 'dotted' else '_'}vector": vector,
    }
    if policy_id is not None:
        if form == "dotted":
            appraisal["ear.appraisal-policy-id"] = policy_id
        else:
            appraisal["ear_appraisal_policy_ids"] = [policy_id]
    issued = int(result.at.timestamp())
    claims: dict[str, Any] = {
        "eat_profile": PROFILES[form],
        "iat": issued,
        "exp": issued + lifetime,
        "ear.verifier-id" if form == "dotted" else "ear_verifier_id": {
            "developer": DEVELOPER,
            "build": build,
        },
        "submods": {submod: appraisal},
    }
    if nonce is not None:
        claims["eat_nonce"] = jose.b64url_encode(nonce)
    return claims


def sign_ear(
    result: AttestationResult, *, key: jose.PrivateKey, kid: str | None = None, **options: Any
) -> str:
    """
    Return *result* as a signed EAR (JWT).

    Args:
        result: What `appraise` returned.
        key: The verifier's key: P-256, P-384, P-521, Ed25519 or RSA.
        kid: Its name in the key set that relying parties hold.
        options: Those of `to_ear`.

    Raises:
        ValueError: As `to_ear`, or the key is of no usable kind.

    """
    return jose.sign(to_ear(result, **options), key=key, kid=kid)
