"""
Connections to the platform, one for each state directory, shared by this process's enclaves.

The platform lives as long as hosts are connected, so a connection closes with its last enclave.
"""

from __future__ import annotations

import functools
import os

from pyenclave._locks import Ends
from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveStateError

__all__ = ["acquire", "release", "share"]

_ends = Ends()
_clients: dict[tuple[int, str], tuple[PlatformClient, int]] = {}


def acquire(
    state: str | os.PathLike[str] | None, expect: tuple[bytes, bool] | None = None
) -> PlatformClient:
    """
    Return the connection for *state*, made now if there is none; give it back by ``release``.

    Args:
        state: The state directory; None for ``PYENCLAVE_STATE`` or the default.
        expect: What will be launched, for a platform that has yet to start.

    Raises:
        PlatformUnavailableError: No platform can be reached or started.
        EnclaveStateError: This thread is in the middle of that.

    """
    if _ends.taken_here():
        raise EnclaveStateError(
            "this thread is in the middle of connecting to a platform",
            advice="A handler of a signal or a finalizer can end an enclave then, not start one.",
        )
    shown = os.environ.get("PYENCLAVE_STATE", "") if state is None else os.fsdecode(state)
    key = (os.getpid(), shown)
    with _ends, _ends.lock:
        found = _clients.get(key)
        if found is not None and not found[0].lost:
            _clients[key] = (found[0], found[1] + 1)
            return found[0]
        client = PlatformClient.connect(state, expect=expect)
        _clients[key] = (client, 1)
        return client


def share(client: PlatformClient) -> PlatformClient:
    """Return a connection that the caller holds once more; to be given back as often."""
    with _ends, _ends.lock:
        for key, (found, users) in _clients.items():
            if found is client:
                _clients[key] = (found, users + 1)
                break
    return client


def release(client: PlatformClient) -> None:
    """Give a connection back; the last one closes it."""
    _ends.end(functools.partial(_release, client))


def _release(client: PlatformClient) -> None:
    with _ends, _ends.lock:
        for key, (found, users) in list(_clients.items()):
            if found is client:
                if users > 1:
                    _clients[key] = (found, users - 1)
                    return
                del _clients[key]
                break
    client.close()


def _after_fork() -> None:
    global _ends  # noqa: PLW0603 - another thread may have held it when this child was made
    _ends = Ends()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
