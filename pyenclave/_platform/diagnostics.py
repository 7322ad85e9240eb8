"""The platform's log: its standard error, which is a file in the state directory."""

from __future__ import annotations

import contextlib
import os
import sys
import time

__all__ = ["log"]


def log(text: str) -> None:
    """Write one line; no secrets are in it, and no control characters get into it."""
    clean = "".join(c if c.isprintable() else "?" for c in text[:1000])
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{stamp} [{os.getpid()}] {clean}\n")
        sys.stderr.flush()
