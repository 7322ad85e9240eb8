"""How commands speak: JSON on request, colours on a terminal only, progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

__all__ = [
    "Progress",
    "give_up",
    "hex_of",
    "json_text",
    "line",
    "note",
    "paint",
    "print_json",
    "printable",
    "ready",
    "remark",
    "report_error",
    "say",
    "table",
    "tell",
]

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}
_PAINT = re.compile(rf"(\x1b\[(?:0|{'|'.join(_COLOURS.values())})m)")


def _coloured(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, *, stream: TextIO | None = None) -> str:
    """Return *text* in *colour* if the stream (default stdout) is a terminal that shows it."""
    if not _coloured(stream or sys.stdout):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def printable(text: str) -> str:
    """Escape control characters, so that no data can steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(character: str) -> str:
    """Return a character as Python writes it. A name that is no text has surrogates."""
    return character.encode("unicode_escape").decode("ascii")


def say(text: str = "") -> None:
    """Print a line for people on stdout. Of what steers a terminal it keeps our colours only."""
    if _coloured(sys.stdout):
        parts = _PAINT.split(text)
        parts[::2] = map(printable, parts[::2])
        text = "".join(parts)
    else:
        text = printable(text)
    print(text)


def remark(text: str) -> None:
    """Print a line on stderr, after what stdout was given: they may be one pipe or file."""
    sys.stdout.flush()
    tell(text)


def tell(text: str, *, end: str = "\n") -> None:
    """Print on stderr at once. Where nobody takes it the result is the same, and the exit code."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def note(text: str) -> None:
    """Print what a command has to say beside its result: on stderr, on one line."""
    sys.stdout.flush()
    tell(f"pyenclave: {line(text)}")


def line(text: str) -> str:
    """Escape *text* so that it stays on one line and cannot steer the terminal."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def hex_of(option: str, text: str | None) -> bytes | None:
    """
    Return the bytes of an option's hexadecimal digits.

    Raises:
        ValueError: It has others.

    """
    if text is None:
        return None
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{option}: {text[:80]!r} is not hexadecimal digits") from None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value


def print_json(value: Mapping[str, Any]) -> None:
    """Print *value* as one JSON object on stdout; bytes become hex."""
    print(json_text(_plain(value)))


def ready() -> bool:
    """Whether there is a standard output; without a standard error the null device is one."""
    # What is opened next would be the error output of whatever is called, or be read as input.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if sys.stdout is None:
        tell("pyenclave: error [unreadable]: standard output is closed")
        return False
    if isinstance(sys.stdout, io.TextIOWrapper) and not _unicode():
        sys.stdout.reconfigure(errors="backslashreplace")
    return True


def _unicode() -> bool:
    """Whether standard output has every character; a locale may have those of ASCII alone."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def json_text(value: object, *, default: Callable[[Any], Any] = str) -> str:
    """Return *value* as JSON; what standard output has no character for is escaped."""
    text = json.dumps(value, ensure_ascii=not _unicode(), default=default)
    if text.isprintable():
        return text
    # A file's name may be no text, and data may steer the terminal: JSON has escapes of its own.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def give_up(stream: TextIO) -> None:
    """Let what nobody takes go nowhere: the interpreter tries again at its end, and exits so."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def report_error(
    code: str, message: str, *, as_json: bool, exit_code: int, rows: Sequence[str] = ()
) -> int:
    """
    Say an error on stderr (and as JSON on stdout) and return *exit_code*.

    Names in *message* are not ours: it stays on one line, whatever they hold, and each of *rows*
    on one below it.
    """
    try:
        if as_json:
            text = "\n  ".join([message, *rows])
            print_json({"error": {"code": code, "message": text}})
        sys.stdout.flush()
    except OSError:
        give_up(sys.stdout)
    label = paint("error", "red", stream=sys.stderr)
    text = "\n  ".join(map(line, [message, *rows]))
    tell(f"pyenclave: {label} [{code}]: {text}")
    return exit_code


def table(rows: Iterable[Sequence[object]], *, header: Sequence[str] = ()) -> str:
    """Lay out *rows* in columns."""
    lines = [[str(cell) for cell in row] for row in rows]
    if header:
        lines.insert(0, list(header))
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if header:
        text[0] = paint(text[0], "bold")
    return "\n".join(text)


class Progress:
    """
    A line of progress on stderr: redrawn on a terminal, otherwise one line a step.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()

    def step(self, text: str) -> None:
        """Say what is being done now."""
        if self._quiet:
            return
        line = f"[{time.monotonic() - self._start:6.1f} s] {printable(text)}"
        if self._live:
            tell(f"\r\x1b[K{line}", end="")
        else:
            tell(line)

    def done(self) -> None:
        """End the line."""
        if self._live and not self._quiet:
            tell("\r\x1b[K", end="")
