"""
The trusted code of the tool enclave: ``pyenclave seal``, ``unseal`` and ``evidence``.

The image is built at first use for this runtime and signed with a key of the state directory.
Whoever owns that directory owns what is sealed with it.
"""

from __future__ import annotations

from pyenclave import trusted
from pyenclave.errors import UnsealError

_POLICIES = {
    "signer": trusted.SealPolicy.signer,
    "unique": trusted.SealPolicy.unique,
}


@trusted.ecall
def seal_file(data: bytes, policy: str, aad: bytes, has_aad: bool) -> bytes:
    """Seal the content of a file."""
    if policy not in _POLICIES:
        raise trusted.PublicError(f"unknown policy {policy[:40]!r}")
    return trusted.seal(data, policy=_POLICIES[policy], aad=aad if has_aad else None)


@trusted.ecall
def unseal_file(blob: bytes, aad: bytes, has_aad: bool) -> bytes:
    """Open what `seal_file` returned."""
    try:
        return trusted.unseal(blob, aad=aad if has_aad else None)
    except UnsealError as error:
        # The host holds the whole blob already; the text says nothing that is not in its header.
        raise trusted.PublicError(str(error)) from None
