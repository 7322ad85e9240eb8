"""Whether this process is an enclave. Light: the host imports it too, for the ``ecall`` mark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyenclave.errors import NotInEnclaveError

if TYPE_CHECKING:
    from pyenclave.trusted._runtime import Runtime

__all__ = ["EnclaveIdentity", "current"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveIdentity:
    """
    What this enclave is, as its reports say it.

    Attributes:
        enclave_id: 16 bytes, new for each launch.
        mrenclave: Measurement, 32 bytes.
        mrsigner: Signer, 32 bytes; zero for an unsigned image.
        product_id: ISVPRODID.
        security_version: ISVSVN.
        debug: Launched as debug.
        level: ``embedded`` or ``service``.
        platform_svn: Security version of the platform.
        name: The image's name.
    """

    enclave_id: bytes
    mrenclave: bytes
    mrsigner: bytes
    product_id: int
    security_version: int
    debug: bool
    level: str
    platform_svn: int
    name: str


# A process is at most one enclave; `_runtime.start` sets this once.
runtime: Runtime | None = None


def current() -> Runtime:
    """
    Return this enclave's runtime.

    Raises:
        NotInEnclaveError: This process is not an enclave.

    """
    if runtime is None:
        raise NotInEnclaveError(
            "this works only inside an enclave",
            advice="Call it from a function that runs inside (marked with @pyenclave.ecall).",
        )
    return runtime
