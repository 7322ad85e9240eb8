"""Every applicable id of the threat catalogue (B.3, B.4) has a test that is named after it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
SEALING = set(range(1, 13))
# The others of B.4 concern collateral, TCB levels or evidence of other kinds.
EVIDENCE = {
    1,
    2,
    3,
    4,
    5,
    11,
    12,
    13,
    16,
    17,
    18,
    19,
    20,
    21,
    22,
    23,
    24,
    26,
    27,
    29,
    30,
    31,
    32,
    34,
    35,
    36,
}


def ids(prefix: str) -> set[int]:
    found: set[int] = set()
    for path in TESTS.rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE):
            found.update(int(number) for number in re.findall(rf"{prefix}_(\d\d)", name))
    return found


def test_every_sealing_flaw_has_a_test():
    assert SEALING - ids("sea") == set()


def test_every_applicable_attestation_flaw_has_a_test():
    assert EVIDENCE - ids("att") == set()
