"""
What trusted code uses inside an enclave.

Importing this is cheap and works anywhere, so that the same file is the host's and the enclave's;
outside an enclave each function but `ecall` raises NotInEnclaveError.
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

__all__ = [
    "Counter",
    "EnclaveIdentity",
    "PublicError",
    "SealPolicy",
    "attest",
    "ecall",
    "identity",
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
