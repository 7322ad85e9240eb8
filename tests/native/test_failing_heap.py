"""A heap whose versions are in a tree is made whole or not at all, whatever call fails."""

from __future__ import annotations

import errno
from collections import Counter

from failing import every_failure, needs_the_test_build

from pyenclave._ffi import ffi, lib

pytestmark = needs_the_test_build
PAGES = 1024
# What a failing system call is: never a wrong argument, which would be a heap half made.
OF_THE_SYSTEM = {
    lib.PYE_OK,
    lib.PYE_E_OS,
    lib.PYE_E_DENIED,
    lib.PYE_E_NO_MEMORY,
    lib.PYE_E_RANDOM,
    lib.PYE_E_UNSUPPORTED,
    lib.PYE_E_POISONED,
}


def refusals(tree_above: int) -> Counter[str]:
    """Let each call of a heap's making fail once; count those without which there is none."""
    out = ffi.new("pye_heap **")
    options = ffi.new("pye_heap_options *")
    options.capacity_pages, options.resident_pages = PAGES, 64
    options.tree_above, options.tree_cache = tree_above, 1
    options.fd = -1

    def make() -> int:
        status = lib.pye_heap_new(out, options)
        if status == lib.PYE_OK:
            assert lib.pye_heap_live(out[0])
            status = lib.pye_heap_prefetch(out[0], ffi.NULL, 0, 8)
            if status == lib.PYE_OK:
                status = lib.pye_heap_evict(out[0], ffi.NULL, 0, 8)
            # What fails while pages move ends the heap: nothing is half done.
            assert status in (lib.PYE_OK, lib.PYE_E_POISONED)
            lib.pye_heap_free(out[0])
        else:
            assert out[0] == ffi.NULL
        return int(status)

    found: Counter[str] = Counter()
    for failure, status in every_failure(make, errors=(errno.ENOMEM,)):
        assert status in OF_THE_SYSTEM, f"{failure}: {status}"
        if failure.name == "mmap":
            assert status in {lib.PYE_OK, lib.PYE_E_NO_MEMORY, lib.PYE_E_POISONED}, failure
        found[failure.name] += status != lib.PYE_OK
    return found


def test_a_heap_with_a_tree_is_made_whole_or_not_at_all() -> None:
    flat, tree = refusals(PAGES), refusals(0)
    # The tree, its nodes and its key are a mapping each, which a forked child must not have.
    assert tree["mmap"] - flat["mmap"] == 3
    assert tree["madvise"] - flat["madvise"] == 3
