"""Make the cffi module from the public headers, so that they cannot drift apart."""

import re
from pathlib import Path

from cffi import FFI

HEADERS = Path("csrc/include/pyenclave")


def declarations(text: str, constants: str = "") -> str:
    """
    Reduce a header to what cffi reads: declarations, and each constant as ``#define X ...``.

    Array sizes may be named by constants of the header itself or of the headers `constants`.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = text.replace("\\\n", " ")
    kept = []
    for line in text.splitlines():
        constant = re.match(r"#define (PYE_\w+) \(?-?(?:0x[0-9a-fA-F]+|\d+)[uUlL]*\)?\s*$", line)
        if constant:
            kept.append(f"#define {constant[1]} ...")
        elif not line.lstrip().startswith(("#", "_Static_assert")):
            kept.append(line)
    body = "\n".join(kept)
    body = re.sub(r"_Static_assert\s*\([^;]*;", "", body)
    body = re.sub(r"\b(PYE_MUST_USE|PYE_ALIGNED_64|restrict)\b", "", body)
    # cffi wants array sizes as numbers: put the constants' values in.
    values = dict(
        re.findall(r"#define (PYE_\w+) (\d+)(?:\s|$)", constants + "\n" + text, flags=re.MULTILINE)
    )
    return re.sub(r"\[(PYE_\w+)\]", lambda m: f"[{values.get(m[1], '')}]", body)


ORDER = [
    "base", "gcm", "hash", "ecdsa", "page", "epoch", "tree", "heap", "extents", "measure", "launch",
    "call", "batch", "stats", "linux", "protect",
]  # fmt: skip

texts = [(HEADERS / f"{name}.h").read_text("utf-8") for name in ORDER]
ffi = FFI()
ffi.cdef("\n".join(declarations(text, "\n".join(texts)) for text in texts))
ffi.set_source("pyenclave._ffi", '#include "pyenclave.h"')
