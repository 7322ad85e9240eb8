"""A hand-out of a warm worker that was asked for, and whose answer is read later."""

from __future__ import annotations

import copy
import os
from typing import Protocol

from pyenclave.errors import EnclaveError, EnclaveLostError
from pyenclave.formats import messages

__all__ = ["Taking"]


class _Line(Protocol):
    def look_for(self, taking: Taking) -> None: ...

    def wait_for(self, taking: Taking) -> None: ...


class Taking:
    """
    A hand-out under way; made by ``PlatformClient.begin_take``. Thread-safe.

    Its answer is read by :meth:`look` or :meth:`result`, or before the next request is sent.

    Args:
        line: Reads it.

    """

    _pidfd = -1  # also of one that was interrupted before it had its own

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._launched: messages.Launched | None = None
        self._pidfd = -1
        self._error: EnclaveError | None = None

    def set(self, launched: messages.Launched, pidfd: int) -> None:
        """Note the answer; for who reads it."""
        self._pidfd = pidfd
        self._launched = launched

    def fail(self, error: BaseException) -> None:
        """Note that there is no enclave; for who reads the answer."""
        if not isinstance(error, EnclaveError):  # a thread was interrupted in the middle of it
            error = EnclaveLostError("the connection to the platform was given up")
        self._error = error

    @property
    def known(self) -> bool:
        """Whether the answer was read, or never will be."""
        return self._launched is not None or self._error is not None

    def look(self) -> bool:
        """Return whether the answer is known, reading it if it is there; waits for nothing."""
        if not self.known:
            self._line.look_for(self)
        return self.known

    def result(self) -> tuple[messages.Launched, int]:
        """
        Return the answer, waiting for it, and the worker's pidfd, which is the caller's.

        The pidfd is given once, and is -1 when this is called again.

        Raises:
            EnclaveError: As ``PlatformClient.take``; a new one each time.

        """
        if not self.known:
            self._line.wait_for(self)
        if self._launched is None:
            error = self._error
            raise (
                EnclaveLostError("the platform gave no answer")
                if error is None
                else copy.copy(error)
            )
        pidfd, self._pidfd = self._pidfd, -1
        return self._launched, pidfd

    def __del__(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
