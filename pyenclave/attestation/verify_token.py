"""
The checks of tokens: Azure Attestation, Google Confidential Space, EAR, and tokens with ``x5c``.

A token is a statement of a service, not of hardware: it is worth what its issuer is. The
documents: the project's notes on MAA (8.2), on EAR and EAT (9.2, 9.3), draft-ietf-rats-ear,
RFC 7519 and RFC 8725.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from pyenclave.attestation.checks import (
    BREAKS,
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    failed,
    not_asked,
)
from pyenclave.attestation.token_case import Case, base_checks, token_claims
from pyenclave.attestation.token_policy import (
    Names,
    policy_checks,
    resolve,
    same,
    tee_claims,
)
from pyenclave.errors import EnclaveError
from pyenclave.formats import ear, jose

__all__ = ["EAR_CHECKS", "GOOGLE_CHECKS", "MAA_CHECKS", "X5C_CHECKS", "Case", "claims"]

_GIVE: Final = "Give the issuer's key set as jwks.json among the endorsements"
_IMAGE: Final = "submods.container.image_digest"
_GOOGLE: Final = "https://confidentialcomputing.googleapis.com"
_MAA_DOMAINS: Final = (".attest.azure.net", ".attest.azure.us", ".attest.azure.cn")
# Confidential hardware by the names of these services; Azure attests trusted launch and VBS too,
# Google shielded VMs: neither keeps the operator out.
_MAA_TEES: Final = ("sgx", "sevsnpvm", "tdxvm")
_COMPLIANT: Final = ("azure-compliant-cvm", "azure-compliant-uvm")
_GOOGLE_TEES: Final = (
    "GCP_AMD_SEV",
    "GCP_AMD_SEV_ES",
    "GCP_AMD_SEV_SNP",
    "GCP_INTEL_TDX",
    "INTEL_TDX",
)
# What an EAT says of debugging (RFC 9711, 4.2.9), and what of it is harmless.
_DEBUG_OFF: Final = (
    "disabled",
    "disabled-since-boot",
    "disabled-permanently",
    "disabled-fully-and-permanently",
    1,
    2,
    3,
    4,
)

_MAA_NAMES: Final = Names(
    code=MappingProxyType(
        {
            "mrenclave": ("x-ms-sgx-mrenclave", "sgx-mrenclave"),
            "mrsigner": ("x-ms-sgx-mrsigner", "sgx-mrsigner"),
            "launch_digest": ("x-ms-sevsnpvm-launchmeasurement",),
            "id_key_digest": ("x-ms-sevsnpvm-idkeydigest",),
            "author_key_digest": ("x-ms-sevsnpvm-authorkeydigest",),
            "host_data": ("x-ms-sevsnpvm-hostdata",),
            "family_id": ("x-ms-sevsnpvm-familyId",),
            "image_id": ("x-ms-sevsnpvm-imageId",),
            "config_id": ("x-ms-sgx-config-id",),
            "isv_ext_prod_id": ("x-ms-sgx-isv-extended-product-id",),
            "isv_family_id": ("x-ms-sgx-isv-family-id",),
            "mrtd": ("tdx_mrtd",),
            "mr_seam": ("tdx_mrseam",),
            "mr_config_id": ("tdx_mrconfigid",),
            "mr_owner": ("tdx_mrowner",),
            "mr_owner_config": ("tdx_mrownerconfig",),
            "xfam": ("tdx_xfam",),
        }
    ),
    registers=MappingProxyType({"rtmrs": {index: f"tdx_rtmr{index}" for index in range(4)}}),
    numbers=MappingProxyType(
        {
            "product_id": ("x-ms-sgx-product-id", "=="),
            "min_security_version": ("x-ms-sgx-svn", ">="),
            "min_config_svn": ("x-ms-sgx-config-svn", ">="),
            "min_guest_svn": ("x-ms-sevsnpvm-guestsvn", ">="),
            "max_vmpl": ("x-ms-sevsnpvm-vmpl", "<="),
        }
    ),
    debug=MappingProxyType(
        {
            "x-ms-sgx-is-debuggable": (False,),
            "is-debuggable": (False,),
            "x-ms-sevsnpvm-is-debuggable": (False,),
            "tdx_td_attributes_debug": (False,),
            "dbgstat": _DEBUG_OFF,
        }
    ),
    nonces=("nonce", "x-ms-runtime.nonce", "x-ms-runtime.client-payload.nonce"),
    tcb=("attester_tcb_status",),
)
_EAT_NAMES: Final = Names(
    code=MappingProxyType({}),
    numbers=MappingProxyType({}),
    registers=MappingProxyType({}),
    debug=MappingProxyType({"dbgstat": _DEBUG_OFF}),
    nonces=("eat_nonce", "nonce"),
    tcb=("tdx.gcp_attester_tcb_status",),
)


# ---- Azure Attestation ------------------------------------------------------------------------

MAA_CHECKS: Final = base_checks(
    algorithms=frozenset(("RS256",)),
    times=("exp", "iat", "nbf"),
    advice=f"{_GIVE} (GET /certs of the instance that you chose).",
)


@MAA_CHECKS.evidence("token.issuer")
def _maa_issuer(case: Case) -> Verdict:
    """An instance of Azure Attestation; where the header says keys are, is that instance."""
    issuer = case.payload.get("iss")
    wanted = "https:// and a name under attest.azure.net"
    if not isinstance(issuer, str):
        return failed(expected=wanted, found=f"{issuer!r:.60}")
    parts = urlsplit(issuer)
    host = parts.hostname or ""
    plain = f"https://{host}"
    # A name under the domain, not the bare domain; one slash may follow it.
    named = host.endswith(_MAA_DOMAINS) and not host.startswith(".")
    if issuer.removesuffix("/") != plain or not named:
        return failed(expected=wanted, found=issuer)
    place = case.token.header.get("jku")
    if place is not None and place != f"{plain}/certs":
        return failed(expected=f"jku {plain}/certs", found=f"{place!r:.100}")
    return PASSED


@MAA_CHECKS.evidence("key.issuer")
def _maa_key(case: Case) -> Verdict:
    """A certificate that names an instance signs for that instance only."""
    signer = case.signer
    if signer is None:
        return not_asked("there is no key")
    certificates = case.chain if signer.jwk is None else signer.jwk.x5c
    if not certificates:
        return not_asked("the key has no certificate that names an instance")
    name = certificates[0].common_name or ""
    if not name.startswith("https://"):
        return not_asked("the key's certificate names no instance", found=name)
    issuer = case.payload.get("iss")
    if isinstance(issuer, str) and issuer.rstrip("/") == name.rstrip("/"):
        return PASSED
    return failed(expected=f"issuer {name}", found=f"{issuer!r:.100}")


@MAA_CHECKS.evidence("token.type")
def _maa_type(case: Case) -> Verdict:
    """The token says which kind of TEE was attested."""
    found = case.payload.get("x-ms-attestation-type")
    inner = tee_claims(case.payload).get("x-ms-attestation-type")
    for value in (found, inner):
        if not isinstance(value, str) or not value:
            return failed(expected="x-ms-attestation-type", found=f"{value!r:.60}")
    return PASSED


def _hardware(case: Case, found: object, known: tuple[str, ...]) -> Verdict:
    if found in known or case.policy.dangerous_allow_software:
        return PASSED
    return failed(
        expected=f"confidential hardware ({', '.join(known)})",
        found=f"{found!r:.60}",
        advice="Whoever runs that machine reads its memory; dangerous_allow_software accepts it.",
    )


@MAA_CHECKS.policy("platform.software")
def _maa_hardware(case: Case) -> Verdict:
    """What was attested is confidential hardware, not trusted launch, VBS or a bare TPM."""
    found = tee_claims(case.payload).get("x-ms-attestation-type")
    return _hardware(case, found, _MAA_TEES)


@MAA_CHECKS.policy("compliance")
def _maa_compliance(case: Case) -> Verdict:
    """Azure's own verdict on a confidential VM, or on the utility VM of a container group."""
    tee = tee_claims(case.payload)
    found = tee.get("x-ms-compliance-status")
    if found is None:
        return not_asked("the token has no compliance status")
    if found in _COMPLIANT:
        return PASSED
    if case.policy.allow_debug:
        return not_asked("not looked at where debug is allowed", found=found)
    return failed(expected=" or ".join(_COMPLIANT), found=f"{found!r:.60}")


policy_checks(MAA_CHECKS, _MAA_NAMES)


# ---- Google Confidential Space ----------------------------------------------------------------

GOOGLE_CHECKS: Final = base_checks(
    algorithms=frozenset(("RS256",)),
    times=("exp", "iat"),
    advice=f"Ask for a token of type PKI, which has certificates. {_GIVE}.",
)


@GOOGLE_CHECKS.evidence("token.issuer")
def _google_issuer(case: Case) -> Verdict:
    """The issuer is Confidential Space."""
    found = case.payload.get("iss")
    if found == _GOOGLE:
        return PASSED
    return failed(expected=_GOOGLE, found=f"{found!r:.100}")


@GOOGLE_CHECKS.policy("platform.software")
def _google_hardware(case: Case) -> Verdict:
    """The machine keeps its operator out; a shielded VM does not."""
    found = case.payload.get("hwmodel")
    if "hwmodel" not in case.payload:
        return not_asked("the token does not name its hardware")
    return _hardware(case, found, _GOOGLE_TEES)


@GOOGLE_CHECKS.policy("secure_boot")
def _secure_boot(case: Case) -> Verdict:
    """The VM booted with Secure Boot, unless the policy allows debug."""
    found = case.payload.get("secboot")
    if found is True or case.policy.allow_debug:
        return PASSED
    return failed(expected="secboot: true", found=f"{found!r:.40}")


@GOOGLE_CHECKS.policy("code.container_image")
def _container_image(case: Case) -> Verdict:
    """The image's digest among the demanded claims says which code is meant."""
    wanted = (case.policy.claims or {}).get(_IMAGE)
    found = resolve(case.payload, _IMAGE)
    if wanted is None:
        return not_asked(f"demand the claim {_IMAGE} to have it compared", found=found)
    if len(found) == 1 and any(same(found[0], value) for value in wanted):
        return PASSED
    return failed(expected=wanted, found=found, advice="Another container runs there.")


policy_checks(GOOGLE_CHECKS, _EAT_NAMES)


# ---- attestation results (EAR) ----------------------------------------------------------------

EAR_CHECKS: Final = base_checks(
    algorithms=jose.ALGORITHMS,
    times=(),
    advice=f"{_GIVE}, or its root (--root) if the token has certificates.",
)


@EAR_CHECKS.evidence("ear.format")
def _ear_format(case: Case) -> Verdict:
    """Tiers and vectors are of the draft, and no status is better than its worst claim."""
    if not ear.is_ear(case.payload):
        return not_asked("an older attestation result, without appraisals")
    ear.appraisals_of(case.payload)
    return PASSED


@EAR_CHECKS.policy("ear.status")
def _ear_status(case: Case) -> Verdict:
    """Every appraisal in the result has a tier that the policy accepts."""
    wanted = case.policy.ear_tiers
    if not ear.is_ear(case.payload):
        if set(wanted) == set(ear.TIERS):
            return not_asked("an older attestation result, without appraisals")
        return failed(expected=wanted, found="no appraisal")
    for name, appraisal in ear.appraisals_of(case.payload).items():
        if appraisal.status not in wanted:
            return failed(
                expected=f"{name}: {' or '.join(wanted)}",
                found=f"{appraisal.status}: {appraisal.worst or 'no claims'}",
                advice="The verifier that issued the result says what it found in the vector.",
            )
    return PASSED


policy_checks(EAR_CHECKS, _EAT_NAMES)


# ---- any token with certificates --------------------------------------------------------------

X5C_CHECKS: Final[Registry[Case]] = base_checks(
    algorithms=jose.ALGORITHMS,
    times=(),
    advice=f"Give the root of its certificates (--root). {_GIVE}.",
)
policy_checks(X5C_CHECKS, _EAT_NAMES)


# ---- what they say ----------------------------------------------------------------------------


def claims(case: Case) -> Mapping[str, Any]:
    """Return header, payload, and how signature and certificates come out."""
    found = token_claims(case)
    if case.kind != "attestation-result-jwt":
        return found
    try:
        found |= {name: case.payload.get(name) for name in ("eat_profile", "iat", "exp")}
        found["submods"] = ear.plain_submods(case.payload)
    except (EnclaveError, NotReachedError, *BREAKS):  # the checks say what is wrong
        pass
    return found
