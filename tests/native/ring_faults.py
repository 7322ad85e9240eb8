"""The lane's sources with a fault put into them, for the programs that must find it."""

from __future__ import annotations

import shutil
from pathlib import Path

import core_build

# What faults replace, and where they put something.
PUBLISH = "__atomic_store_n(long_at(lane->out, 0), first, __ATOMIC_RELEASE);"
ASLEEP = "__atomic_load_n(word_at(lane->theirs, STATE_ASLEEP), __ATOMIC_RELAXED) != 0"
TELL = "    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 1, __ATOMIC_SEQ_CST);\n"
TOTAL = "    __atomic_store_n(long_at(lane->out, 16), total, __ATOMIC_RELAXED);\n"
SLICE = "if (rc == PYE_E_TIMEOUT) {\n                return rc;"
FENCE = "    __atomic_thread_fence(__ATOMIC_SEQ_CST);\n"

Text = str | tuple[str, ...]


def broken_source(folder: Path, file: str, old: Text, new: Text) -> Path:
    """Copy the lane's sources with a few places of one of them changed."""
    source = folder / "src"
    shutil.copytree(core_build.CSRC / "src" / "call", source / "call")
    path = source / "call" / file
    text = path.read_text(encoding="utf-8")
    olds, news = ((one,) if isinstance(one, str) else one for one in (old, new))
    for before, after in zip(olds, news, strict=True):
        assert text.count(before) == 1, f"{file} has {text.count(before)} of: {before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")
    return source
