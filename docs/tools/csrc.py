"""
Write the tables of ``csrc/README.md``: every file of the core, what it holds, what it gives.

What a file holds is the first sentence of its first comment; what it gives are its functions that
other files can call. ``python docs/tools/csrc.py`` writes the tables anew between their marks;
``tests/native/test_csrc_readme.py`` holds that they are up to date and that nothing is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

CSRC: Final = Path(__file__).resolve().parents[2] / "csrc"
PAGE: Final = CSRC / "README.md"
BEGIN: Final = "<!-- made by docs/tools/csrc.py -->\n"
END: Final = "<!-- end -->\n"

# Folder → its heading, in the order of the page.
FOLDERS: Final = {
    "include": "include/: the C interface",
    "src/base": "src/base: what everything uses",
    "src/crypto": "src/crypto: ciphers, hashes, signatures",
    "src/page": "src/page: page sealing",
    "src/measure": "src/measure: what hardware would measure",
    "src/call": "src/call: rings, lanes, messages",
    "src/linux": "src/linux: the only system calls",
    "bindings": "bindings/: what Python imports",
}

_COMMENT: Final = re.compile(r'\A(?:/\*(.*?)\*/|"""(.*?)"""|((?:#[^\n]*\n)+))', re.DOTALL)
_SENTENCE: Final = re.compile(r"(.*?)\.(?:\s+(?!\d)|$)", re.DOTALL)
# A function that is defined, or a table of functions: at the start of a line, not static.
_DEFINED: Final = re.compile(
    r"^(?!static|typedef|#|else|return|[A-Z][A-Z0-9_]+[ (])"
    r"(?:[A-Za-z_][\w \t*]*?[\s*])(\w+)\([^;{}]*?\)\n\{",
    re.M,
)
_TABLE: Final = re.compile(r"^const \w+ (pye_\w+) = \{", re.M)
_INLINE: Final = re.compile(
    r"^(?:static inline|[A-Z][A-Z0-9_]+) [\w \t*]*?[\s*](\w+)\([^;{}]*?\)\n\{", re.M
)
_NAMED: Final = re.compile(r"^#define BLOCKS_FUNCTION (\w+)|^#define PAGES_FUNCTION (\w+)", re.M)
_DECLARED: Final = re.compile(r"\b(pye_\w+)\([^;{}]*\);")
_CLASS: Final = re.compile(r"^(?:cdef )?class (\w+)(?!\w*\n)[^\n]*:$|^def (\w+)\(", re.M)


def files() -> list[Path]:
    """Return every file of the core, by folder and name; headers come before their sources."""
    found = [path for path in CSRC.rglob("*") if path.is_file() and path != PAGE]
    return sorted(
        (path for path in found if "__pycache__" not in path.parts),
        key=lambda path: (str(path.parent), path.stem, path.suffix != ".h"),
    )


def folder_of(path: Path) -> str:
    """Return the key of `FOLDERS` that a file belongs to."""
    parts = path.relative_to(CSRC).parts
    return "/".join(parts[:2]) if parts[0] == "src" else parts[0]


def holds(path: Path) -> str:
    """Return the first sentence of a file's first comment."""
    found = _COMMENT.match(path.read_text("utf-8"))
    if not found:
        raise ValueError(f"{path} does not begin with a comment")
    text = next(group for group in found.groups() if group)
    words = " ".join(re.sub(r"^\s*(?:\*|#) ?", "", text, flags=re.M).split())
    words = re.sub(r"^[\w.]+ - ", "", words)
    sentence = _SENTENCE.match(words)
    told = (sentence[1] if sentence else words).rstrip(".:").replace("|", "\\|")
    return told[:1].upper() + told[1:]


def code(path: Path) -> str:
    """Return a C file without its comments."""
    return re.sub(r"/\*.*?\*/", "", path.read_text("utf-8"), flags=re.DOTALL)


def declared(path: Path) -> list[str]:
    """Return the functions that a public header declares."""
    text = re.sub(r"\btypedef struct [^;]*?\{.*?\}", "", code(path), flags=re.DOTALL)
    return list(dict.fromkeys(_DECLARED.findall(text)))


def gives(path: Path) -> list[str]:
    """Return what other files can call of this one."""
    if path.suffix in (".pyx", ".pxi"):
        text = path.read_text("utf-8")
        return [a or b for a, b in _CLASS.findall(text) if not (a or b).startswith("_")]
    if path.suffix == ".py":
        return []
    if folder_of(path) == "include":
        return declared(path)
    text = code(path)
    if path.name == "unsupported.c":
        return []  # its functions are those of the folder's other files
    found = [*_DEFINED.findall(text), *_TABLE.findall(text)]
    found += [a or b for a, b in _NAMED.findall(text)]
    if path.suffix == ".h":
        found += _INLINE.findall(text)
    return [name for name in dict.fromkeys(found) if name.isidentifier() and not name.isupper()]


def _row(path: Path) -> str:
    place = path.relative_to(CSRC)
    names = ", ".join(f"`{name}`" for name in gives(path))
    if folder_of(path) == "include":
        names = f"{len(gives(path))} functions" if names else "all of them"
    return f"| [`{path.name}`]({place}) | {holds(path)} | {names} |"


def tables() -> str:
    """Return the tables of all folders."""
    parts = []
    for folder, heading in FOLDERS.items():
        parts += [f"### {heading}", "", "| file | holds | gives |", "|---|---|---|"]
        parts += [_row(path) for path in files() if folder_of(path) == folder]
        parts.append("")
    return "\n".join(parts)


def page() -> str:
    """Return the page with its tables made anew."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
