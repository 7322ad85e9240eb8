"""What tests of pools share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

ENTRY = Path(__file__).with_name("pooled.py")


def wait_for(done: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.01)
    return False


async def until(done: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        await asyncio.sleep(0.01)
    return False
