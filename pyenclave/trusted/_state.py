"""Whether this process is an enclave. Light: the host imports it too, for the ``ecall`` mark."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pyenclave.errors import EnclaveStateError, NotInEnclaveError

if TYPE_CHECKING:
    from pyenclave.trusted._parts import Parts
    from pyenclave.trusted._runtime import Runtime

__all__ = [
    "EnclaveIdentity",
    "HostLink",
    "current",
    "enter",
    "entered",
    "forget_link",
    "leave",
    "link",
    "set_link",
]


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
# The image's encrypted parts, if it has any; the worker sets this before the entry is imported.
parts: Parts | None = None


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


class HostLink(Protocol):
    """How trusted code of one thread calls the host; the worker makes it."""

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a declared host function."""

    def call_ordered(self, name: str, values: tuple[Any, ...]) -> Any:
        """Call it with a value for each parameter, in their order."""


# Whether this process is one that runs trusted code; before there is a runtime, too.
_entered = False
_links = threading.local()


def enter() -> None:
    """Say that this process loads trusted code now: nothing of the host runs in it."""
    global _entered  # noqa: PLW0603 - a process is at most one enclave
    _entered = True


def entered() -> bool:
    """Whether this process loads or runs trusted code."""
    return _entered


def leave(*, entered: bool) -> None:
    """Say again what :func:`entered` said, after trusted code that was only for practice."""
    global _entered  # noqa: PLW0603 - as in enter()
    _entered = entered


def set_link(value: HostLink) -> None:
    """Say how trusted code calls the host in this thread."""
    enter()
    _links.value = value


def forget_link() -> None:
    """This thread serves no calls any more."""
    vars(_links).clear()


def link() -> HostLink | None:
    """
    Return this thread's way to the host; None where this process is no enclave.

    Raises:
        EnclaveStateError: It is one, and this is not a thread that serves calls.

    """
    found: HostLink | None = getattr(_links, "value", None)
    if found is None and (_entered or runtime is not None):
        raise EnclaveStateError(
            "the host can be called only while a trusted function runs, in its thread",
            advice="Not at import, from on_start or on_stop, or a thread of its own.",
        )
    return found
