"""
What trusted code uses inside an enclave.

Importing this is cheap and works anywhere, so that the same file is the host's and the enclave's;
outside an enclave each function but the marks raises NotInEnclaveError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from pyenclave.trusted._files import open_sealed
from pyenclave.trusted._heap import heap
from pyenclave.trusted._life import on_start, on_stop
from pyenclave.trusted._ocall import call_host, ocall

if TYPE_CHECKING:
    from pyenclave.trusted._parts import unlock as unlock
    from pyenclave.trusted._release import release_key as release_key
    from pyenclave.trusted._released import ReleasedKey as ReleasedKey

__all__ = [
    "Counter",
    "EnclaveIdentity",
    "PublicError",
    "ReleasedKey",
    "SealPolicy",
    "attest",
    "call_host",
    "ecall",
    "heap",
    "identity",
    "ocall",
    "on_start",
    "on_stop",
    "open_sealed",
    "receive",
    "release_key",
    "report",
    "seal",
    "set_user_data",
    "target_info",
    "unlock",
    "unseal",
    "verify_report",
]

# Images without [release] and [encrypted] have none of it on their lock lists.
_OF_RELEASE = {
    "ReleasedKey": "pyenclave.trusted._released",
    "release_key": "pyenclave.trusted._release",
}


def __getattr__(name: str) -> Any:
    module = "pyenclave.trusted._parts" if name == "unlock" else _OF_RELEASE.get(name)
    if module is None:
        raise AttributeError(f"module 'pyenclave.trusted' has no attribute {name!r}")
    from importlib import import_module

    from pyenclave.errors import EnclaveStateError, KeyReleaseError

    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        if name == "unlock":
            raise EnclaveStateError(
                "the image has no encrypted parts", advice="Name them in the manifest: [encrypted]."
            ) from None
        raise KeyReleaseError(
            "the image has no key release",
            check="relay.absent",
            advice="Say [release] in the manifest (Enclave.from_file: release=True).",
        ) from None
