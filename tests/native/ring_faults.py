"""The lane's sources with a fault put into them, for the programs that must find it."""

from __future__ import annotations

from pathlib import Path

import core_build

# What faults replace, and where they put something.
PUBLISH = "__atomic_store_n(long_at(lane->out, 0), first, __ATOMIC_RELEASE);"
ASLEEP = "__atomic_load_n(word_at(lane->theirs, STATE_ASLEEP), __ATOMIC_RELAXED) != 0"
TELL = "    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 1, __ATOMIC_SEQ_CST);\n"
TOTAL = "    __atomic_store_n(long_at(lane->out, 16), total, __ATOMIC_RELAXED);\n"
SLICE = "if (rc == PYE_E_TIMEOUT) {\n                return rc;"
FENCE = "    __atomic_thread_fence(__ATOMIC_SEQ_CST);\n"


def broken_source(folder: Path, file: str, old: core_build.Text, new: core_build.Text) -> Path:
    """Copy the core's sources with a few places of one of the lane's files changed."""
    return core_build.broken(folder, f"call/{file}", old, new)
