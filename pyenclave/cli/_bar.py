"""A bar of progress on stderr: on a terminal only, drawn at most ten times a second."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Final, Self

from pyenclave._locks import Lock
from pyenclave.cli import output

__all__ = ["Bar", "bytes_text"]

_EVERY: Final = 0.1  # seconds


def bytes_text(number: float) -> str:
    """Return a size for people, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


class Bar:
    """
    What was done of *total* bytes.

    Args:
        total: Bytes in all.
        files: Files in all.

    """

    def __init__(self, total: int, files: int) -> None:
        self._total = max(total, 1)
        self._files = files
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._done = 0
        self._done_files = 0
        self._name = ""
        self._lock = Lock()
        self._start = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            output.tell("\r\x1b[K", end="")

    def add(self, count: int) -> None:
        """Say that *count* bytes more are done."""
        with self._lock:
            self._done += count
            self._draw()

    def next(self, name: str) -> None:
        """Say that a file was begun."""
        with self._lock:
            self._name = name
            self._draw()

    def end_file(self) -> None:
        """Say that a file was ended."""
        with self._lock:
            self._done_files += 1
            self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if not self._live or now - self._drawn < _EVERY:
            return
        self._drawn = now
        share = min(self._done / self._total, 1.0)
        rate = self._done / max(now - self._start, 1e-3)
        left = (self._total - self._done) / rate if rate else 0.0
        full = int(share * 20)
        text = (
            f"[{'#' * full}{'.' * (20 - full)}] {share:4.0%}  {bytes_text(self._done)} of "
            f"{bytes_text(self._total)}  {bytes_text(rate)}/s  {max(left, 0.0):.0f} s left"
        )
        if self._files > 1:
            text += f"  {self._done_files}/{self._files}  {output.line(self._name)}"
        width = shutil.get_terminal_size().columns - 1
        output.tell(f"\r\x1b[K{text[:width]}", end="")
