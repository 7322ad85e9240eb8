"""
Claim sets of the attestation types (the project's notes on Azure Attestation, 8.2).

Azure's names with Azure's types of values; what is ours begins with ``x-pyenclave-``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from pyenclave.attestation.azure_policy import Claim
from pyenclave.attestation.azure_render import azure_claims
from pyenclave.attestation.result import Claims
from pyenclave.formats import jose
from pyenclave.formats.evidence import Evidence
from pyenclave.formats.hcl import HclReport
from pyenclave.formats.machine import MachineEvidence
from pyenclave.formats.snp import SnpReport, decode_tcb
from pyenclave.services.attestation.verification import Verified

__all__ = ["COMPLIANT", "RESERVED", "claims_of", "incoming", "is_reserved"]

COMPLIANT: Final = "azure-compliant-cvm"
_SGX: Final = "x-ms-sgx-"
_KSS: Final = 0x80  # ATTRIBUTES.KSS: the fields of key separation mean something
_KSS_CLAIMS: Final = ("config-id", "config-svn", "isv-extended-product-id", "isv-family-id")
# What Azure calls the hashes of its collateral, and the file that is hashed.
_COLLATERAL: Final = (
    ("qeidcertshash", "qe-identity-issuer-chain.pem"),
    ("qeidcrlhash", "root-ca-crl.der"),
    ("qeidhash", "qe-identity.json"),
    ("tcbinfocertshash", "tcb-info-issuer-chain.pem"),
    ("tcbinfocrlhash", "root-ca-crl.der"),
    ("tcbinfohash", "tcb-info.json"),
)
# Claims that only the service makes: a policy may issue one only with the value it has.
RESERVED: Final = frozenset(
    {
        "aud",
        "cnf",
        "eat_nonce",
        "eat_profile",
        "exp",
        "iat",
        "iss",
        "jti",
        "nbf",
        "nonce",
        "sub",
        "submods",
        "attester_tcb_status",
        "dbgstat",
        "intuse",
        "secureboot",
        "aas-ehd",
        "is-debuggable",
        "maa-attestationcollateral",
        "maa-ehd",
        "maa-policyHash",
        "policy_hash",
        "policy_signer",
        "product-id",
        "rp_data",
        "sgx-mrenclave",
        "sgx-mrsigner",
        "svn",
        "tee",
        "ver",
    }
)
_PREFIXES: Final = ("x-ms-", "x-pyenclave-", "tdx_", "tdx-", "$")
# What is said of a machine as a whole, which only a policy can say.
_POLICYS_OWN: Final = frozenset({"x-ms-compliance-status"})


def is_reserved(name: str) -> bool:
    """Whether a claim of that name is the service's to make."""
    return name not in _POLICYS_OWN and (name in RESERVED or name.startswith(_PREFIXES))


@lru_cache(maxsize=64)
def _collateral_hashes(files: tuple[tuple[str, bytes], ...]) -> Mapping[str, str]:
    given = dict(files)
    found = {}
    for name, file in _COLLATERAL:
        data = given.get(file)
        if data is not None:
            found[name] = hashlib.sha256(data).hexdigest()
    return MappingProxyType(found)


def _ehd(verified: Verified) -> str | None:
    runtime = verified.request.runtime
    return None if runtime is None or runtime.json is not None else jose.b64url_encode(runtime.data)


def _told(verified: Verified) -> dict[str, Any]:
    claims = verified.result.claims
    return claims.told() if isinstance(claims, Claims) else dict(claims)


def _sgx(verified: Verified) -> dict[str, Any]:
    told = _told(verified)
    found: dict[str, Any] = azure_claims(told, tee="sgx")
    if not bytes.fromhex(told["attributes"])[0] & _KSS:
        for name in _KSS_CLAIMS:
            found.pop(_SGX + name, None)
    ehd = _ehd(verified)
    if ehd is not None:
        found[f"{_SGX}ehd"] = ehd
    collateral = dict(_collateral_hashes(verified.endorsements.items))
    collateral["quotehash"] = verified.prepared.digest
    found[f"{_SGX}collateral"] = collateral
    found["x-pyenclave-tcb-status"] = told.get("tcb_status")
    found["x-pyenclave-advisories"] = told.get("advisory_ids")
    # The names of the first version; Azure still writes them.
    found |= {
        "ver": "1.0",
        "tee": "sgx",
        "is-debuggable": found[f"{_SGX}is-debuggable"],
        "product-id": found[f"{_SGX}product-id"],
        "sgx-mrenclave": found[f"{_SGX}mrenclave"],
        "sgx-mrsigner": found[f"{_SGX}mrsigner"],
        "svn": found[f"{_SGX}svn"],
        "maa-attestationcollateral": collateral,
    }
    if ehd is not None:
        found |= {"maa-ehd": ehd, "aas-ehd": ehd}
    return _without_none(found)


def _snp(verified: Verified) -> dict[str, Any]:
    told = _told(verified)
    return snp_claims(told, verified.prepared.data)


def snp_claims(told: Mapping[str, Any], report: bytes) -> dict[str, Any]:
    """Return the claims of an SEV-SNP report from what verification tells of it."""
    found: dict[str, Any] = azure_claims(told, tee="sevsnpvm")
    prefix = "x-ms-sevsnpvm-"
    parsed = SnpReport.decode(report)
    found[f"{prefix}is-debuggable"] = parsed.debug
    return _without_none(found)


def _tdx(verified: Verified) -> dict[str, Any]:
    return tdx_claims(_told(verified))


def tdx_claims(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claims of a TD quote from what verification tells of it."""
    found: dict[str, Any] = azure_claims(told, tee="tdxvm")
    # Minor and major version of the module (Intel TDX DCAP, TEE_TCB_SVN).
    found["tdx_seamsvn"] = int.from_bytes(bytes.fromhex(told["tee_tcb_svn"])[:2], "little")
    found["eat_profile"] = "https://aka.ms/maa-eat-profile-tdxvm"
    found["intuse"] = "generic"
    found["dbgstat"] = "enabled" if found["tdx_td_attributes_debug"] else "disabled"
    found["x-pyenclave-advisories"] = told.get("advisory_ids")
    return _without_none(found)


def machine_claims(told: Mapping[str, Any], evidence: bytes) -> dict[str, Any]:
    """
    Return the claims of a confidential VM: a report, a quote, or an HCL report with either.

    Args:
        told: What verification tells of it, and its ``kind``.
        evidence: Its evidence.
    """
    kind = told["kind"]
    if kind == "sev-snp-report":
        return snp_claims(told, evidence)
    if kind == "tdx-quote":
        return tdx_claims(told)
    if kind == "azure-hcl-tdx":
        status = {name: told.get(name) for name in ("tcb_status", "advisory_ids")}
        return tdx_claims({**told["td_quote"], **status})
    report = HclReport.from_bytes(evidence).hardware_report
    parsed = SnpReport.decode(report)
    found = dict(told["report"])
    product = told.get("product") or parsed.product
    if product is not None:
        found["reported_tcb_decoded"] = decode_tcb(parsed.reported_tcb, str(product).lower())
    return snp_claims(found, report)


_MACHINE_DEBUG: Final = ("x-ms-sevsnpvm-is-debuggable", "tdx_td_attributes_debug")


def _pyenclave(verified: Verified) -> dict[str, Any]:
    told = _told(verified)
    found: dict[str, Any] = azure_claims(told, tee="pyenclave")
    found |= {
        f"{_SGX}ehd": _ehd(verified),
        "x-pyenclave-ephemeral": told.get("ephemeral"),
        "x-pyenclave-enclave-id": told.get("enclave_id"),
        "x-pyenclave-root": told.get("root_sha256"),
    }
    container = Evidence.from_bytes(verified.prepared.data).machine
    if container is not None and "machine" in told:
        evidence = MachineEvidence.from_bytes(container).evidence
        inner = machine_claims(told["machine"], evidence)
        found["x-ms-isolation-tee"] = inner
        # Who may look into the machine may look into the enclave: one claim says both.
        if any(inner.get(name, False) is not False for name in _MACHINE_DEBUG):
            found[f"{_SGX}is-debuggable"] = True
    return _without_none(found)


def _guest(verified: Verified) -> dict[str, Any]:
    from pyenclave.services.attestation import guest

    return guest.claims(verified)


def _without_none(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}


_OF: Final[Mapping[str, Callable[[Verified], dict[str, Any]]]] = MappingProxyType(
    {
        "SgxEnclave": _sgx,
        "OpenEnclave": _sgx,
        "SevSnpVm": _snp,
        "TdxVm": _tdx,
        "PyEnclave": _pyenclave,
        "AzureGuest": _guest,
    }
)


def claims_of(verified: Verified) -> dict[str, Any]:
    """Return the claims that the service makes of verified evidence, by name."""
    found = _OF[verified.request.type](verified)
    runtime, inittime = verified.request.runtime, verified.request.inittime
    if runtime is not None and runtime.json is not None:
        found["x-ms-runtime"] = dict(runtime.json)
    if inittime is not None and inittime.json is not None:
        found["x-ms-inittime"] = dict(inittime.json)
    return found


# ---- what the policy sees ---------------------------------------------------------------------

# First names of SGX claims in policies: Azure has them with a dollar sign.
_DOLLAR: Final = ("is-debuggable", "product-id", "sgx-mrenclave", "sgx-mrsigner", "svn", "tee")


def _scalars(found: Mapping[str, Any], types: Container[str], prefix: str = "") -> list[Claim]:
    claims = []
    for name, value in found.items():
        if prefix + name not in types:
            continue
        if isinstance(value, bool | str) or (isinstance(value, int) and value < 1 << 63):
            claims.append(Claim(prefix + name, value, "AttestationService"))
    return claims


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


_ALL: Final = _Everything()


def incoming(
    verified: Verified, found: Mapping[str, Any], types: Container[str] | None = None
) -> list[Claim]:
    """
    Return the claims that a policy is evaluated over.

    The service's own have the issuer ``AttestationService``. Top-level scalars of runtime and
    init-time data are the attester's (``CustomClaim``), but for names that are the service's to
    use: an attester could otherwise claim a measurement by the name that a policy looks for.

    Args:
        verified: The evidence.
        found: What `claims_of` returned for it.
        types: Types that the policy can look at (`azure_policy.types_of`); default: any.
    """
    wanted: Container[str] = _ALL if types is None else types
    claims = _scalars(found, wanted)
    if "tee" in found:
        claims += [
            Claim(f"${name}", found[name], "AttestationService")
            for name in _DOLLAR
            if f"${name}" in wanted
        ]
    inner = found.get("x-ms-isolation-tee")
    if isinstance(inner, Mapping):
        claims += _scalars(inner, wanted, "x-ms-isolation-tee.")
        # A policy for guests names the hardware's claims without the path too.
        claims += [claim for claim in _scalars(inner, wanted) if claim.type not in found]
    if "x-pyenclave-advisories" in wanted:
        for advisory in found.get("x-pyenclave-advisories", ()):
            claims.append(Claim("x-pyenclave-advisories", advisory, "AttestationService"))
    for data in (verified.request.runtime, verified.request.inittime):
        if data is None or data.json is None:
            continue
        claims += [
            Claim(name, value, "CustomClaim")
            for name, value in data.json.items()
            if name
            and name in wanted
            and not is_reserved(name)
            and name not in ("x-ms-compliance-status",)
            and (isinstance(value, bool | str) or (type(value) is int and abs(value) < 1 << 63))
        ]
    return claims
