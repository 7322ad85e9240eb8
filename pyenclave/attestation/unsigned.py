"""The checks of what can be read but is no evidence, because nobody signed it."""

from __future__ import annotations

from typing import Any

from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import Registry, Verdict, failed, not_asked

__all__ = ["register_unsigned"]


def register_unsigned(registry: Registry[Any], name: str, *, what: str, advice: str) -> None:
    """
    Register check *name*, which always fails, and the checks of freshness, which fail if asked.

    Args:
        registry: The kind's checks.
        name: Of the check that says that nothing is signed.
        what: What the kind is, for people.
        advice: What to do instead.
    """

    @registry.evidence(name)
    def _signature(case: CaseBase) -> Verdict:
        """Somebody signed this: never so, which makes this kind readable and never genuine."""
        del case
        return failed(
            expected="something signed", found=f"{what}: nothing is signed", advice=advice
        )

    for field, words in (
        ("nonce", "nonce that somebody signed"),
        ("report_data", "report data"),
        ("user_data", "user data"),
    ):
        _register_missing(registry, field, f"{what} has no {words}")


def _register_missing(registry: Registry[Any], field: str, advice: str) -> None:
    @registry.policy(field)
    def _missing(case: CaseBase) -> Verdict:
        """What is not signed has none: to expect some refuses."""
        wanted = getattr(case, field)
        if wanted is None:
            return not_asked(advice)
        return failed(expected=wanted, found="none", advice=advice)
