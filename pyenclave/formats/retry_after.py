"""The ``Retry-After`` field of HTTP answers (RFC 9110, section 10.2.3)."""

from __future__ import annotations

import email.utils
import time

__all__ = ["retry_after"]


def retry_after(text: str | None) -> float:
    """Return the seconds that a server asks to wait; 0 if it says nothing that is understood."""
    if text is None:
        return 0.0
    text = text.strip()[:64]
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, moment.timestamp() - time.time())
