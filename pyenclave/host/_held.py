"""What a run holds of its enclave, from the moment when the platform was asked for it."""

from __future__ import annotations

import contextlib
import os

from pyenclave._locks import Ends
from pyenclave._platform.client import PlatformClient
from pyenclave._platform.taking import Taking
from pyenclave.errors import EnclaveError
from pyenclave.formats.messages import Launched
from pyenclave.host import _shared

__all__ = ["Held", "end"]


class Held:
    """
    An enclave at the platform, or one that it will be asked for. Thread-safe.

    Args:
        client: Its connection, to be given back.
        launched: What the platform said, if it was asked, and
        pidfd: Of its worker, now this object's.

    Attributes:
        client: As above.
        pidfd: The worker's; -1 while it is not known, or if there is none.

    """

    def __init__(
        self,
        client: PlatformClient,
        *,
        launched: Launched | None = None,
        pidfd: int = -1,
    ) -> None:
        self.client = client
        self.pidfd = pidfd
        self._taking: Taking | None = None
        self._launched = launched
        self._ends = Ends()
        self._lock = self._ends.lock
        self._ended = False

    @property
    def asked(self) -> bool:
        """Whether the platform was asked for it."""
        return self._taking is not None or self._launched is not None

    def begin(self, taking: Taking) -> None:
        """It was asked for: the answer is *taking*, and the connection is to be given back."""
        self._taking = taking

    @property
    def known(self) -> bool:
        """Whether the platform's answer was read, and was an enclave."""
        return self._launched is not None

    def look(self) -> bool:
        """
        Return whether the platform's answer is there; waits for nothing.

        Raises:
            EnclaveError: There is no enclave, and this is why.

        """
        taking = self._taking
        if self._launched is None and taking is not None and taking.look():
            self.launched()
        return self._launched is not None

    def launched(self) -> Launched:
        """
        Return what the platform says, waiting for it.

        Raises:
            EnclaveError: As ``PlatformClient.take``.

        """
        if self._launched is None and self._taking is not None:
            with self._ends, self._lock:
                if self._launched is None:
                    launched, self.pidfd = self._taking.result()
                    self._launched = launched
        if self._launched is None:
            raise AssertionError("neither an answer nor one to come")
        return self._launched

    def end(self) -> None:
        """
        End the enclave if there is one, and give everything back. May be called twice.

        Called by a finalizer or a handler of a signal that comes while its thread asks the platform
        something, it ends when that is over.
        """
        self._ends.end(self._end)

    def _end(self) -> None:
        with self._ends, self._lock:
            if self._ended or not self.asked:
                return
            self._ended = True
        self.client.leave(self._give_back)

    def _give_back(self) -> None:
        with contextlib.suppress(EnclaveError):
            end(self.client, self.launched().enclave_id)
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.pidfd)
        _shared.release(self.client)


def end(client: PlatformClient, enclave_id: bytes) -> None:
    """End an enclave, whatever the platform thinks of that."""
    with contextlib.suppress(EnclaveError, OSError):
        client.close_enclave(enclave_id)
