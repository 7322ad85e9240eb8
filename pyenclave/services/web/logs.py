"""What goes into logs: one line each, no control bytes, no tokens."""

from __future__ import annotations

import logging
import re
import traceback
from typing import Final

__all__ = ["clean", "logger", "trace"]

logger: Final = logging.getLogger("pyenclave.services")

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*")
_LONG: Final = re.compile(r"[A-Za-z0-9_+/=-]{200,}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX: Final = 4000


def clean(value: object, limit: int = 200) -> str:
    """Return *value* as one line of at most *limit* characters, without tokens."""
    text = str(value)[: limit * 8]
    text = _LONG.sub("<long>", _TOKEN.sub("<token>", text))
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def trace(error: BaseException) -> str:
    """Return the traceback of *error* as one line, its end first kept."""
    lines = traceback.format_exception(error, limit=-20, chain=True)
    return clean(" | ".join(line.strip() for line in lines)[-_MAX:], _MAX)
