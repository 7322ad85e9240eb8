"""
What the platform itself checks: descriptors that a host sends, and a worker's walls from outside.

A probe *tries* where trying is possible (reading the worker's memory, taking its descriptors), and
reads the kernel's own account where it is not. A probe that cannot be made counts as a bit that
does not hold.
"""

from __future__ import annotations

import select
from typing import Final

from pyenclave import _native
from pyenclave.errors import ArgumentError, EnclaveStateError, LaunchRefusedError

__all__ = [
    "OUTSIDE",
    "check_memfd",
    "has_ended",
    "probe_again",
    "probe_worker",
    "refuse_unless_held",
]

#: The bits that are tried from outside; a worker's own word can only take one away.
OUTSIDE: Final = ("dumpable_off", "locked", "no_new_privs", "pidns", "seccomp", "untraced")
# Without these a production worker is readable by any program of the user: never started.
_ALWAYS: Final = ("dumpable_off", "no_new_privs", "seccomp", "untraced")


def check_memfd(fd: int, what: str, *, seals: int, limit: int) -> int:
    """
    Check a descriptor from a host before it is mapped (BND-19).

    Args:
        fd: The descriptor.
        what: Its name in the error.
        seals: The seals that it must carry: ``_native.SEALED`` or ``_native.RING_SEALS``.
        limit: The largest size, in bytes.

    Returns:
        Its size in bytes, above 0; it cannot change any more.

    Raises:
        ArgumentError: It is not a memfd, lacks a seal, is empty, or is larger than *limit*.

    """
    try:
        size = _native.check_memfd(fd, seals=seals)
    except EnclaveStateError as error:
        raise ArgumentError(
            f"descriptor of the {what}: {error.message}",
            expected=error.expected,
            found=error.found,
        ) from None
    except OSError as error:
        raise ArgumentError(f"descriptor of the {what}: {error.strerror}") from None
    if size > limit:
        raise ArgumentError(
            f"memfd of the {what} is too large", expected=f"at most {limit} bytes", found=size
        )
    return size


def probe_worker(pid: int, pidfd: int) -> dict[str, bool]:
    """
    Try a worker's walls from outside.

    Args:
        pid: The worker in this process's pid namespace.
        pidfd: Its pidfd: the number is trusted only while that process lives.

    Returns:
        The bits of :data:`OUTSIDE`; all False if the worker has ended meanwhile.

    """
    try:
        found = _native.probe_outside(pid)
    except OSError:
        found = {}
    if has_ended(pidfd):
        found = {}
    return {name: found.get(name, False) for name in OUTSIDE}


def probe_again(pid: int, pidfd: int, status: int) -> dict[str, bool]:
    """
    Try a worker's walls from outside once more, when it becomes an enclave.

    Args:
        pid: As for :func:`probe_worker`, like the next and what is returned.
        pidfd: Its pidfd.
        status: From ``_native.open_status``, opened when it was tried first.

    """
    try:
        found = _native.probe_again(pid, status)
    except OSError:
        found = {}
    if has_ended(pidfd):
        found = {}
    return {name: found.get(name, False) for name in OUTSIDE}


def refuse_unless_held(
    bits: dict[str, bool | int], require: tuple[str, ...], *, debug: bool
) -> None:
    """
    Refuse a launch whose worker lacks a bit that is required.

    Args:
        bits: What was found, outside and inside.
        require: Names that the host or the policy requires; an unknown one does not hold.
        debug: Debug enclaves are meant to be looked into: nothing is required by default.

    Raises:
        LaunchRefusedError: The names that do not hold.

    """
    needed = set(require) | (set() if debug else set(_ALWAYS))
    missing = sorted(name for name in needed if not bits.get(name))
    unknown = [name for name in missing if name not in bits]
    if missing:
        raise LaunchRefusedError(
            "the worker lacks a required protection",
            expected=", ".join(sorted(needed)),
            found="without " + ", ".join(missing),
            advice=f"None is called {', '.join(unknown)}: there are {', '.join(sorted(bits))}."
            if unknown
            else "'pyenclave doctor' says which mechanisms this kernel has.",
        )


def has_ended(pidfd: int) -> bool:
    """Return whether the process of *pidfd* has ended (a pidfd is readable from then on)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
