"""
How an enclave asks the two services of a key release: one host function, declared like any other.

An image that has keys released to it has this among its ocalls, so that it is measured and shown.
What crosses is evidence, tokens and wrapped keys; what the host answers is its word, and whatever
matters of it is signed by somebody else.
"""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = ["ATTESTATION", "MAX_BODY", "NAME", "VAULT", "declared", "is_allowed"]

VAULT: Final = "vault"
ATTESTATION: Final = "attestation"
MAX_BODY: Final = 512 << 10  # bytes, either way

# What may be asked for: nothing that changes a key, a policy or anybody's rights.
_ALLOWED: Final = {
    VAULT: (
        ("GET", re.compile(r"/keys/[0-9A-Za-z-]{1,127}/[0-9A-Za-z]{0,64}")),
        ("POST", re.compile(r"/keys/[0-9A-Za-z-]{1,127}/[0-9A-Za-z]{0,64}/release")),
    ),
    ATTESTATION: (
        ("POST", re.compile(r"/attest/[A-Za-z][A-Za-z0-9]{0,40}")),
        ("POST", re.compile(r"/nonces")),
    ),
}
_API_VERSION: Final = re.compile(r"[0-9A-Za-z.-]{1,40}")


def pyenclave_service_request(
    service: str,
    base: str,
    method: str,
    path: str,
    api_version: str,
    body: bytes,
    seconds: float,
) -> tuple[int, bytes]:
    """
    Ask a service and return its status and answer; status 0: there was none.

    ``base`` is the address that the enclave means: a relay that knows another refuses.
    """
    raise NotImplementedError


NAME: Final = pyenclave_service_request.__name__


def is_allowed(service: str, method: str, path: str, api_version: str) -> bool:
    """Whether an enclave may ask this of that service."""
    return bool(_API_VERSION.fullmatch(api_version)) and any(
        method == allowed and form.fullmatch(path) for allowed, form in _ALLOWED.get(service, ())
    )


def declared() -> tuple[dict[str, Any], ...]:
    """Return the function in the form that goes into an image."""
    from pyenclave.calls.ocalls import MARK, Ocall  # with it comes all that may cross

    pyenclave_service_request.__dict__[MARK] = ()
    return (Ocall.of(pyenclave_service_request).to_wire(),)
