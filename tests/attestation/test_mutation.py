"""
The mutation test: each registered check of each kind is forced to pass, and must be missed.

A check that can be removed without any evidence getting further is no check, or has no test. The
checks are enumerated by the code itself (`kinds.KINDS`), so a new one without a negative fails
here.

For each kind a module ``negatives_KIND.py`` (dashes as underscores) gives:

- ``negatives()``: pairs of the name of a check and a function without arguments that appraises
  evidence which only that check refuses, and returns the result;
- ``STRUCTURAL`` (optional): checks without whose bytes the later ones have nothing to judge.
  Forcing one cannot make evidence acceptable; then it must change what the result says.
- ``REDUNDANT`` (optional): check → why it repeats what others already refuse (at least ten
  characters). These are counted as survivors that are explained.

Checks that a kind includes from another (`Registry.include`) are the other kind's functions and are
forced there; the including kind gives at least one negative for each prefix, which shows that they
run on what is inside.

With an evidence check forced to pass, some negative of it must become genuine; with a policy
check forced to pass, accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from pyenclave.attestation import AttestationResult, kinds
from pyenclave.attestation.checks import PASSED

# Kinds whose negatives are still to be written. A kind that has them may not stand here.
PENDING: set[str] = set()
AVAILABLE = kinds.available()


def module_name(kind: str) -> str:
    return "negatives_" + kind.replace("-", "_")


def has_negatives(kind: str) -> bool:
    return find_spec(module_name(kind)) is not None


@cache
def negatives(kind: str) -> dict[str, list[Callable[[], AttestationResult]]]:
    found: dict[str, list[Callable[[], AttestationResult]]] = {}
    for check, run in import_module(module_name(kind)).negatives():
        found.setdefault(check, []).append(run)
    return found


READY = [kind for kind in AVAILABLE if has_negatives(kind)]
CHECKS = [
    (kind, check)
    for kind in READY
    for check in kinds.load(kind).checks.functions
    if check not in kinds.load(kind).checks.included or check in negatives(kind)
]


def listed(kind: str, name: str) -> Any:
    return getattr(import_module(module_name(kind)), name, ())


def said(result: AttestationResult) -> tuple[Any, ...]:
    outcomes = tuple((check.name, check.outcome) for check in result.checks if check.asked)
    return result.genuine, result.accepted, outcomes


@pytest.mark.parametrize(("kind", "check"), CHECKS)
def test_a_check_that_is_forced_to_pass_is_missed(kind, check, monkeypatch):
    registry = kinds.load(kind).checks
    if check in listed(kind, "REDUNDANT"):
        pytest.skip(f"explained: {listed(kind, 'REDUNDANT')[check]}")
    runs = negatives(kind).get(check, [])
    assert runs, f"{kind}: {check} has no negative"
    before = [run() for run in runs]
    in_evidence = registry.parts[check] == "evidence"
    for result in before:
        assert check in result.refused_by, f"{kind}: {check} does not refuse its own negative"
        assert not (result.genuine if in_evidence else result.accepted)
    monkeypatch.setitem(registry.functions, check, lambda _: PASSED)
    after = [run() for run in runs]
    if check in listed(kind, "STRUCTURAL"):
        assert all(not result.accepted for result in after)
        assert any(said(old) != said(new) for old, new in zip(before, after, strict=True))
        return
    survived = f"{kind}: {check} survives: without it every negative is still refused by " + str(
        sorted({name for result in after for name in result.refused_by}) or "what is not reached"
    )
    assert any(result.genuine if in_evidence else result.accepted for result in after), survived


@pytest.mark.parametrize("kind", READY)
def test_negatives_name_checks_that_there_are(kind):
    registered = set(kinds.load(kind).checks.functions)
    assert set(negatives(kind)) <= registered
    for name in ("STRUCTURAL", "REDUNDANT"):
        assert set(listed(kind, name)) <= registered
    included = kinds.load(kind).checks.included
    shown = {included[check] for check in negatives(kind) if check in included}
    assert shown == set(included.values()), "a prefix without a negative"
    for check in listed(kind, "REDUNDANT"):
        assert len(listed(kind, "REDUNDANT")[check]) >= 10


def test_no_kind_is_forgotten(capsys):
    """The count is printed, and a kind without negatives stands on the list of such kinds."""
    assert "pyenclave" in READY
    assert set(AVAILABLE) - set(READY) <= PENDING
    assert not PENDING & set(READY), "take it off PENDING"
    assert set(kinds.KINDS) >= PENDING
    total = sum(len(kinds.load(kind).checks.functions) for kind in AVAILABLE)
    inside = sum(len(kinds.load(kind).checks.included) for kind in AVAILABLE)
    explained = sum(len(listed(kind, "REDUNDANT")) for kind in READY)
    with capsys.disabled():
        print(
            f"\nmutation: {len(CHECKS)} of {total} registered checks forced to pass "
            f"({len(READY)} of {len(AVAILABLE)} kinds; {inside} run inside other kinds; "
            f"{explained} explained as redundant)"
        )


def test_the_machinery_finds_a_survivor(monkeypatch):
    """A check that refuses nothing by itself must fail the test above."""
    registry = kinds.load("pyenclave").checks
    monkeypatch.setitem(registry.functions, "quote.twin", registry.functions["quote.signature"])
    monkeypatch.setitem(registry.parts, "quote.twin", "evidence")
    twins = negatives("pyenclave") | {"quote.twin": negatives("pyenclave")["quote.signature"]}
    monkeypatch.setattr(f"{__name__}.negatives", lambda kind: twins)
    with pytest.raises(AssertionError, match="survives"):
        test_a_check_that_is_forced_to_pass_is_missed("pyenclave", "quote.twin", monkeypatch)
