"""What the platform does to itself at its start."""

from __future__ import annotations

import os

from pyenclave import _native
from pyenclave.errors import PlatformUnavailableError

__all__ = ["harden_platform"]


def harden_platform() -> None:
    """
    Make this process one that the user's other programs cannot look into.

    Drops every capability (root stays uid 0 but is an ordinary user from then on), switches off
    dumping and tracing by the same user, core files, and gaining of rights; sets the umask to 077.

    Raises:
        PlatformUnavailableError: A step failed, or a tracer is attached: it could read every key.

    """
    os.umask(0o077)
    try:
        _native.drop_capabilities()
        held = _native.harden_early()
    except OSError as error:
        raise PlatformUnavailableError(f"the platform cannot protect itself: {error}") from None
    if not held["untraced"]:
        raise PlatformUnavailableError("the platform is traced", expected="no tracer")
