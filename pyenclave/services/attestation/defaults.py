"""
The policies that hold until somebody sets others. Stricter than Azure's: no debug, no migration,
and no enclave of software where hardware is asked for.

The trusted computing base must be up to date, or need only what the owner of the machine does in
firmware settings or software; the token says which. A confidential VM is called compliant if
Microsoft's paravisor runs in it, which the digest of the key that signed its launch shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pyenclave.attestation.policy import TCB_STATUSES

__all__ = ["DEFAULT_POLICIES", "SOFTWARE_TOO"]

_SERVICE: Final = 'issuer=="AttestationService"'
_STATUSES: Final = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
)
# Of a machine below a platform of ours: Intel says that it is behind.
_BEHIND: Final = tuple(word for word in TCB_STATUSES if word not in _STATUSES)
# SHA-384 of the key that signs the ID block of Azure's paravisor; in every token of such a VM.
_AZURE_ID_KEY: Final = (
    "0356215882a825279a85b300b0b742931d113bf7e32dde2e50ffde7ec743ca49"
    "1ecdd7f336dc28a6e0b2bb57af7a44a3"
)


def _policy(authorization: list[str], issuance: list[str] | None = None) -> str:
    lines = ["version=1.0;", "authorizationrules", "{", *authorization, "};"]
    lines += ["issuancerules", "{", *(issuance or []), "};", ""]
    return "\n".join(lines)


def _by_status(debug: str, status: str) -> str:
    return _policy(
        [
            f'  [type=="{debug}", value==false, {_SERVICE}] &&\n'
            f'  [type=="{status}", value=="{word}", {_SERVICE}] => permit();'
            for word in _STATUSES
        ]
    )


def _snp(prefix: str, own: list[str] | None = None) -> str:
    safe = (
        f'  [type=="{prefix}x-ms-sevsnpvm-is-debuggable", value==false, {_SERVICE}] &&\n'
        f'  [type=="{prefix}x-ms-sevsnpvm-migration-allowed", value==false, {_SERVICE}]'
    )
    return _policy(
        [f"{safe} => permit();", *(own or [])],
        [
            f"{safe} &&\n"
            f'  [type=="{prefix}x-ms-sevsnpvm-vmpl", value==0, {_SERVICE}] &&\n'
            f'  [type=="{prefix}x-ms-sevsnpvm-idkeydigest", value=="{_AZURE_ID_KEY}", {_SERVICE}]\n'
            '    => issue(type="x-ms-compliance-status", value="azure-compliant-cvm");'
        ],
    )


_INNER: Final = "x-ms-isolation-tee."
_SGX: Final = _by_status("x-ms-sgx-is-debuggable", "x-pyenclave-tcb-status")
_GUEST_TDX: Final = [
    f'  [type=="{_INNER}tdx_td_attributes_debug", value==false, {_SERVICE}] &&\n'
    f'  [type=="{_INNER}attester_tcb_status", value=="{word}", {_SERVICE}] => permit();'
    for word in _STATUSES
]


def _own(software: bool) -> str:
    """Return the policy of our own platform; measurements by software have hardware's names."""
    safe = f'  [type=="x-ms-sgx-is-debuggable", value==false, {_SERVICE}]'
    if not software:
        safe += f' &&\n  [type=="x-pyenclave-tee", value!="none", {_SERVICE}]'
    return _policy(
        [
            f"{safe} => permit();",
            f'  [type=="{_INNER}x-ms-sevsnpvm-migration-allowed", value==true, {_SERVICE}]'
            " => deny();",
            *(
                f'  [type=="{_INNER}attester_tcb_status", value=="{word}", {_SERVICE}] => deny();'
                for word in _BEHIND
            ),
        ]
    )


DEFAULT_POLICIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SgxEnclave": _SGX,
        "OpenEnclave": _SGX,
        "SevSnpVm": _snp(""),
        "TdxVm": _by_status("tdx_td_attributes_debug", "attester_tcb_status"),
        "AzureGuest": _snp(_INNER, _GUEST_TDX),
        "PyEnclave": _own(software=False),
    }
)
# Where enclaves of software are attested by default: in development.
SOFTWARE_TOO: Final[Mapping[str, str]] = MappingProxyType(
    {**DEFAULT_POLICIES, "PyEnclave": _own(software=True)}
)
