"""The checks of ``csrc/src``: each use of a macro of ``base/check.h``.

The test build numbers those that it has, in the order of files and lines; ``PYE_MUTATE=n`` and the
runner mean that number.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace
from pathlib import Path

from core_build import CSRC

SOURCES = CSRC / "src"
MACROS = re.compile(r"\bPYE_(?:CHECK|REQUIRE|TRY|REFUSE_IF|GUARD)\(")
FUNCTION = re.compile(r"^(?!#|typedef|struct|_Static_assert)\w[^;=]*?\b(\w+)\((?!\*)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check. ``name`` says where it is in words that stay when lines move."""

    number: int
    file: str
    line: int
    last_line: int
    name: str


def _end(text: str, start: int) -> int:
    """Return where the parenthesis that opens before *start* closes."""
    depth, at = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def without_comments(text: str) -> str:
    """Blank out comments; lines stay where they are."""
    return re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def checks_of(file: Path) -> list[Check]:
    """Return the checks of one file, without numbers."""
    text = without_comments(file.read_text("utf-8"))
    where = file.relative_to(SOURCES).as_posix()
    functions = [(m.start(), m[1]) for m in FUNCTION.finditer(text)]
    found: list[Check] = []
    for match in MACROS.finditer(text):
        end = _end(text, match.end())
        function = [name for at, name in functions if at < match.start()][-1]
        said = re.sub(r"\s+", " ", text[match.end() : end])
        name = f"{where} {function}: {said}"
        twins = sum(check.name.split(" #")[0] == name for check in found)
        found.append(
            Check(
                number=0,
                file=where,
                line=text.count("\n", 0, match.start()) + 1,
                last_line=text.count("\n", 0, end) + 1,
                name=f"{name} #{twins + 1}" if twins else name,
            )
        )
    return found


def all_checks() -> list[Check]:
    """Return every check of the core, for any machine, without numbers."""
    return [
        check
        for file in sorted(SOURCES.rglob("*.[ch]"))
        if file != SOURCES / "base" / "check.h"
        for check in checks_of(file)
    ]


class _Site(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int32),
        ("number", ctypes.c_uint32),
    )


def built_checks(library: Path) -> dict[int, Check]:
    """Return the checks that are in the test build *library*, by the number that it gave them."""
    loaded = ctypes.CDLL(str(library))
    first = ctypes.POINTER(_Site)()
    loaded.pye_proof_checks.restype = ctypes.c_size_t
    count = loaded.pye_proof_checks(ctypes.byref(first))
    scanned = all_checks()
    found = {}
    for i in range(count):
        file, line = first[i].file.decode(), first[i].line
        (check,) = [c for c in scanned if c.file == file and c.line <= line <= c.last_line]
        found[first[i].number] = replace(check, number=first[i].number)
    return found
