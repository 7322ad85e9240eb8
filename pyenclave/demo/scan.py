"""
A scanner: searches processes and files for byte patterns.

A program of its own (``python -m pyenclave.demo.scan``). Standard input is one JSON object
``{"pids": […], "paths": […], "patterns": [hex, …]}``; standard output one JSON object with what
was searched (bytes) and found (occurrences).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["search_files", "search_process"]

_BLOCK = 8 << 20


def _regions(pid: int) -> Iterator[tuple[int, int, str]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, perms, *rest = line.split(None, 5)
        name = rest[3] if len(rest) > 3 else ""
        if "r" in perms and name not in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            start, end = (int(part, 16) for part in span.split("-"))
            yield start, end, name


def _search(data: bytes, patterns: list[bytes], found: dict[bytes, int]) -> None:
    for pattern in patterns:
        count = data.count(pattern)
        if count:
            found[pattern] = found.get(pattern, 0) + count


def search_process(pid: int, patterns: list[bytes]) -> tuple[int, dict[bytes, int]]:
    """Search all readable memory of *pid*; return the bytes searched and what was found."""
    overlap = max(map(len, patterns))
    searched, found = 0, dict[bytes, int]()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end, _ in _regions(pid):
            position = start
            while position < end:
                try:
                    data = os.pread(memory.fileno(), min(_BLOCK, end - position), position)
                except OSError:
                    break  # a guard page, or memory that the kernel shows to nobody
                if not data:
                    break
                _search(data, patterns, found)
                searched += len(data)
                position += len(data) if position + len(data) >= end else len(data) - overlap
                if len(data) <= overlap:
                    break
    return searched, found


def search_files(paths: list[str], patterns: list[bytes]) -> tuple[int, dict[bytes, int]]:
    """Search files, and all files below folders."""
    searched, found = 0, dict[bytes, int]()
    for top in paths:
        below = [Path(top)] if Path(top).is_file() else sorted(Path(top).rglob("*"))
        for path in below:
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                _search(data, patterns, found)
                searched += len(data)
    return searched, found


def main() -> int:
    """Read the order on standard input, search, and answer on standard output."""
    order = json.load(sys.stdin)
    patterns = [bytes.fromhex(text) for text in order["patterns"]]
    searched, found = 0, 0
    where: list[str] = []
    for pid in order["pids"]:
        size, hits = search_process(pid, patterns)
        searched += size
        found += sum(hits.values())
        where += [f"process {pid}: {pattern.hex()[:16]}…" for pattern in hits]
    size, hits = search_files(order["paths"], patterns)
    searched += size
    found += sum(hits.values())
    where += [f"files: {pattern.hex()[:16]}…" for pattern in hits]
    json.dump({"searched": searched, "found": found, "where": where}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
