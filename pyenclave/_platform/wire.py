"""Errors as messages and back, and sending with a deadline."""

from __future__ import annotations

import errno
import os

from pyenclave import errors
from pyenclave.calls.errors import cut
from pyenclave.formats import messages

__all__ = ["failure_of", "raise_failure"]

# Bytes, not characters: names in an image's lock are of its maker's choice, and an answer that
# cannot be sent would cost the host its connection and every enclave on it.
_MAX_TEXT = 4000
_MAX_LINE = 400
_MAX_LINES = 100


def failure_of(error: BaseException) -> messages.Failure:
    """Return the message that carries *error*. Of what is not ours class and number cross."""
    if isinstance(error, errors.EnclaveError):
        files = error.files if isinstance(error, errors.RuntimeLockError) else ()
        text = errors.EnclaveError.__str__(error)
        return messages.Failure(
            code=error.code,
            message=cut(text, _MAX_TEXT),
            files=tuple(cut(line, _MAX_LINE) for line in files[:_MAX_LINES]),
        )
    text = f"the platform failed inside: {type(error).__name__}"
    if isinstance(error, OSError) and isinstance(error.errno, int):
        # The system's own words for the number: they tell nothing but the cause.
        text = f"{text}: {os.strerror(error.errno)}"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            text = f"{text}. Raise the limit of open files (ulimit -Hn) where it is started."
    return messages.Failure(code="launch", message=text)


def raise_failure(failure: messages.Failure | messages.Ending) -> None:
    """Raise the error that *failure* carries; a code that nobody knows becomes EnclaveError."""
    known = errors.by_code().get(failure.code, errors.EnclaveError)
    if issubclass(known, errors.RuntimeLockError):
        raise known(failure.message, files=failure.files)
    raise known(failure.message)
