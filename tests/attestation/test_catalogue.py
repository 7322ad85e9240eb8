"""Every applicable id of the threat catalogue (B.3 to B.5) has a test that is named after it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
COUNTS = {"sea": 12, "att": 36, "jwt": 16}
# Entries about what this package does not do (yet): no test can show a flaw in it.
NOT_HERE = {
    ("jwt", 12): "key sets are never fetched: the relying party gives jwks.json",
    ("jwt", 13): "no OpenID discovery: an issuer's document is never read or fetched",
}


def _named(prefix: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        for test in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text("utf-8"), re.M):
            # A name may list several: att_20_att_21, jwt_06_16.
            for group in re.findall(rf"{prefix}((?:_\d\d)+)(?:_|$)", test):
                for number in group.split("_")[1:]:
                    found.setdefault(int(number), []).append(test)
    return found


@pytest.mark.parametrize("prefix", COUNTS)
def test_every_flaw_that_applies_has_a_test(prefix: str) -> None:
    wanted = {n for n in range(1, COUNTS[prefix] + 1) if (prefix, n) not in NOT_HERE}
    named = _named(prefix)
    assert wanted - set(named) == set()
    assert not {n for p, n in NOT_HERE if p == prefix} & set(named), "it applies now: unlist it"
    assert set(named) <= set(range(1, COUNTS[prefix] + 1))


def test_the_list_is_that_of_the_catalogue() -> None:
    path = TESTS.parents[1] / "shared" / "specs" / "threat-catalogue.md"
    if not path.exists():
        pytest.skip("the catalogue is not here")
    text = path.read_text("utf-8")
    for prefix, count in COUNTS.items():
        ids = {int(n) for n in re.findall(rf"^\| {prefix.upper()}-(\d\d) \|", text, re.M)}
        assert ids == set(range(1, count + 1))
