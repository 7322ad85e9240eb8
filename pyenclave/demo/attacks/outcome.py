"""What an attack comes to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Outcome", "refused", "succeeded"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``outcome`` is ``succeeded`` or ``refused``; ``detail`` says how, in one line."""

    outcome: str
    detail: str


def succeeded(detail: str) -> Outcome:
    """The attacker got what it wanted."""
    return Outcome("succeeded", detail)


def refused(detail: str) -> Outcome:
    """The attacker was refused."""
    return Outcome("refused", " ".join(detail.split()))
