"""Every check of the core can be numbered, and the list of those that nothing notices is in order.

The proof itself takes a build of its own: ``tests/native/mutants.py`` (docs/proofs.md).
"""

from __future__ import annotations

import re

import pytest
from core_build import CSRC
from mutants import explained
from mutants_checks import MACROS, all_checks, without_comments

# A line that refuses: it must be the body of a check.
REFUSES = re.compile(r"\breturn\s+(PYE_E_\w+|broken\(|pye_os_status\()")
OPENS = re.compile(r"\s*(?:\} )?(?:else )?(?:if|switch) \(")
# What is answered there is no refusal: where it stands, and why.
PLAIN = {
    ("call/await.c", "if (slice_ms == 0) {"): "nobody spoke in time",
    (
        "linux/spawn.c",
        "if (i + 1 < count && is_refusal(errno)) {",
    ): "fewer namespaces are tried first",
}


def test_every_check_has_a_name_of_its_own():
    names = [check.name for check in all_checks()]
    assert len(names) > 250
    assert len(set(names)) == len(names)


def test_no_check_is_a_plain_if():
    """``if (…) { return PYE_E_…; }`` could not be switched off: it is written PYE_REFUSE_IF."""
    plain = set()
    for file in sorted((CSRC / "src").rglob("*.c")):
        lines = without_comments(file.read_text("utf-8")).splitlines()
        for i, line in enumerate(lines):
            # One step in is the end of a function, which refuses nothing that it did not do.
            if not REFUSES.search(line) or line.startswith("    return") or MACROS.search(line):
                continue
            opened = next(x.strip() for x in lines[i::-1] if OPENS.match(x))
            if not MACROS.search(opened) and not opened.startswith("switch"):
                plain.add((file.relative_to(CSRC / "src").as_posix(), opened))
    assert plain == set(PLAIN)


@pytest.mark.parametrize("name", sorted(explained()))
def test_an_explained_check_is_there_and_says_why(name):
    assert name in {check.name for check in all_checks()}
    assert len(explained()[name]["why"]) > 40
