"""
Make cores whose gate is broken, one fault each, for ``.ci/protected``: some test has to fail.

``python tests/native/protected_broken.py FOLDER`` writes the test build to ``FOLDER/proof`` and the
cores, one of them without a fault, to ``FOLDER/broken``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from core_build import broken, compiler, objects
from proof_build import FLAGS, LIBRARY, _wrapped, build

# Name → file, what is there, what stands there instead, and the test that has to fail.
FAULTS: Final = {
    "none": ("protect.c", "/* The key must be open. */", "", ""),
    "key-left-open": (
        "protect.c",
        "    clear_registers(p);\n    shut_key(p);\n    if (block)",
        "    clear_registers(p);\n    if (block)",
        "test_the_key_is_shut_before_and_after_each_call",
    ),
    "key-left-open-after-a-long-answer": (
        "protect.c",
        "    p->inside->clear();\n    shut_key(p);\n    return rc;",
        "    p->inside->clear();\n    return rc;",
        "test_the_key_is_shut_before_and_after_each_call",
    ),
    "registers-not-scrubbed": (
        "protect.c",
        "    clear_registers(p);\n    shut_key(p);\n    if (block)",
        "    shut_key(p);\n    if (block)",
        "test_no_register_keeps_what_the_function_left",
    ),
    "x87-not-scrubbed": (
        "protect.c",
        "    pye_protect_clear_other(p->inside->tells_use);\n",
        "",
        "test_no_register_keeps_what_the_function_left",
    ),
    "scrubs-only-what-the-core-uses": (
        "protect.c",
        "(low & 0x06) == 0x06 ?",
        "(pye_cpu_features() & PYE_CPU_AVX) ?",
        "test_registers_are_cleared_that_the_core_does_not_use",
    ),
    "variables-in-core-dumps": (
        "protect.c",
        "PYE_CHECK(advise_ranges(p, MADV_DONTDUMP));",
        "PYE_CHECK(advise_ranges(p, MADV_NORMAL));",
        "test_core_dumps_have_nothing_of_it",
    ),
    "stack-not-switched": (
        "protect_gate.c",
        '"    movq %r9, %rsp\\n" /* the switch */',
        "",
        "test_the_stack_is_the_librarys_own",
    ),
    "stacks-without-the-key": (
        "protect.c",
        "tag(stack_of(p, i), p->slot_size - PAGE, p->key)",
        "tag(stack_of(p, i), p->slot_size - PAGE, 0)",
        "test_nothing_of_the_library_can_be_read_or_written",
    ),
    "memory-without-the-key": (
        "protect.c",
        "tag(p->memory, p->memory_size, p->key)",
        "tag(p->memory, p->memory_size, 0)",
        "test_nothing_of_the_library_can_be_read_or_written",
    ),
    "variables-without-the-key": (
        "protect.c",
        "PYE_CHECK(tag_ranges(p, p->key));",
        "PYE_CHECK(tag_ranges(p, 0));",
        "test_other_threads_have_the_key_shut",
    ),
    "variables-keep-secrets-when-closed": (
        "protect.c",
        "    copy_ranges(p, 1);\n",
        "",
        "test_closing_leaves_what_was_loaded_not_what_was_kept",
    ),
    "a-child-has-the-memory": (
        "protect.c",
        "MADV_DONTFORK",
        "MADV_NORMAL",
        "test_a_forked_child_has_no_memory_of_it",
    ),
    "signals-come-in-between": (
        "protect.c",
        "const int block = (p->flags & PYE_PROTECT_LEAVE_SIGNALS) == 0;",
        "const int block = 0;",
        "test_a_signal_waits_for_the_end_of_the_call",
    ),
}


def main(folder: Path) -> None:
    """Build everything below *folder*."""
    build(folder / "proof")
    work = folder / "proof" / "work" / "core"
    target = folder / "broken"
    target.mkdir(exist_ok=True)
    wraps = [f"-Wl,--wrap={name}" for name in _wrapped()]
    every = " or ".join(sorted({fault[3] for fault in FAULTS.values() if fault[3]}))
    for name, (file, old, new, test) in FAULTS.items():
        place = folder / "faults" / name
        source = broken(place, f"linux/{file}", old, new) / "linux" / file
        (made,) = objects(place, [source], [*FLAGS, "-iquote", str(place / "src")])
        others = [part for part in work.glob("*.o") if part.name != made.name]
        command = [compiler(), "-shared", str(made), *map(str, others), *wraps, "-lpthread",
                   f"-Wl,-soname,{LIBRARY}", "-o", str(target / f"{name}.so")]  # fmt: skip
        subprocess.run(command, check=True)
        (target / f"{name}.txt").write_text(test or every)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
