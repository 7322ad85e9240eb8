"""
The kinds of evidence and the modules that verify them. A module is imported at its first use.

Such a module has a registry of checks, a case (`CaseBase`) that the checks run on, and a function
that tells the case's claims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final

from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import Registry
from pyenclave.errors import EvidenceFormatError

__all__ = ["KINDS", "Kind", "available", "load"]

_PACKAGE: Final = "pyenclave.attestation"

# Kind → module, or module:registry where one module verifies several kinds. The kinds' names are
# part of the JSON contract. The case is `Case`, the claims are `claims`.
KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pyenclave": "verify_pyenclave",
        "sgx-quote": "verify_sgx",
        "tdx-quote": "verify_tdx",
        "sgx-collateral": "verify_collateral",
        "sev-snp-report": "verify_snp",
        "sev-snp-vek-cert": "verify_vek",
        "azure-hcl-snp": "verify_azure:SNP_CHECKS",
        "azure-hcl-tdx": "verify_azure:TDX_CHECKS",
        "nitro-document": "verify_nitro",
        "maa-jwt": "verify_token:MAA_CHECKS",
        "maa-jwks": "verify_jwks",
        "google-confidential-space-jwt": "verify_token:GOOGLE_CHECKS",
        "attestation-result-jwt": "verify_token:EAR_CHECKS",
        "x5c-jwt": "verify_token:X5C_CHECKS",
        "ra-tls-cert": "verify_ratls",
        "maa-cert": "verify_ratls",
        "tdx-ccel": "verify_ccel",
        "tcg-eventlog": "verify_eventlog",
        "arm-cca-token": "verify_cca",
        "nvidia-gpu-report": "verify_nvidia",
        "akv-release-policy": "verify_release_policy",
        "maa-claims": "verify_maa_claims",
    }
)


@dataclass(frozen=True, slots=True)
class Kind:
    """How evidence of one kind is verified."""

    name: str
    checks: Registry[Any]
    case: type[CaseBase]
    claims: Callable[[Any], Mapping[str, Any]]
    module: Any


_LOADED: Final[dict[tuple[str, str | None], Kind]] = {}  # by what the table said then


def _there(kind: str) -> bool:
    module = KINDS[kind].partition(":")[0]
    return find_spec(f"{_PACKAGE}.{module}") is not None


def available() -> tuple[str, ...]:
    """Return the kinds that this version verifies."""
    return tuple(kind for kind in KINDS if _there(kind))


def load(kind: str) -> Kind:
    """
    Return how evidence of *kind* is verified; its module is imported now.

    Raises:
        EvidenceFormatError: This version does not verify the kind.

    """
    found = _LOADED.get((kind, KINDS.get(kind)))
    if found is not None:
        return found
    if kind not in KINDS or not _there(kind):
        raise EvidenceFormatError(
            "this kind of evidence cannot be verified",
            expected=f"one of {', '.join(available())}",
            found=kind,
        )
    name, _, registry = KINDS[kind].partition(":")
    module = import_module(f"{_PACKAGE}.{name}")
    found = _LOADED[kind, KINDS[kind]] = Kind(
        name=kind,
        checks=getattr(module, registry or "CHECKS"),
        case=module.Case,
        claims=module.claims,
        module=module,
    )
    return found
