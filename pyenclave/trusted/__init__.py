"""
What trusted code uses inside an enclave.

Importing this is cheap and works anywhere, so that the same file is the host's and the enclave's;
outside an enclave each function but the marks raises NotInEnclaveError.
"""

from __future__ import annotations

from pyenclave.trusted._api import (
    Counter,
    EnclaveIdentity,
    PublicError,
    SealPolicy,
    attest,
    ecall,
    identity,
    receive,
    report,
    seal,
    set_user_data,
    target_info,
    unseal,
    verify_report,
)
from pyenclave.trusted._life import on_start, on_stop
from pyenclave.trusted._ocall import call_host, ocall

__all__ = [
    "Counter",
    "EnclaveIdentity",
    "PublicError",
    "SealPolicy",
    "attest",
    "call_host",
    "ecall",
    "identity",
    "ocall",
    "on_start",
    "on_stop",
    "receive",
    "report",
    "seal",
    "set_user_data",
    "target_info",
    "unseal",
    "verify_report",
]
