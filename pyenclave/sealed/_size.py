"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["parse_size", "size_text"]

_UNITS: Final = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_SIZE: Final = re.compile(r"([0-9]{1,15}) ?(B|KiB|MiB|GiB|TiB)")


def parse_size(value: object) -> int:
    """
    Return a size in bytes.

    Args:
        value: A number of bytes, or text such as ``"64 MiB"`` (B, KiB, MiB, GiB, TiB).

    Raises:
        ValueError: It is neither.

    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a number of bytes or a text such as "64 MiB"')
    return int(match[1]) << _UNITS[match[2]]


def size_text(size: float) -> str:
    """Return *size* bytes as people read it, for example ``"1.5 GiB"``."""
    unit = "B"
    for unit in _UNITS:
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
