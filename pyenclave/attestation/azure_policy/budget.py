"""What one evaluation of a policy may use: whoever writes a policy decides what it costs."""

from __future__ import annotations

from typing import Final

from pyenclave.errors import AttestationError

__all__ = ["MAX_CHARACTERS", "MAX_COMPARISONS", "MAX_STEPS", "MAX_WORK", "Budget"]

MAX_CHARACTERS: Final = 4 << 20  # of all values that functions and actions make
MAX_COMPARISONS: Final = 1 << 18
MAX_STEPS: Final = 1 << 16  # of JMESPath expressions
MAX_WORK: Final = 1 << 25  # characters and items that are parsed or that JMESPath passes on


class Budget:
    """
    Counts what an evaluation uses.

    Every method raises AttestationError when that is more than one evaluation may; it is called
    before the work is done.
    """

    __slots__ = ("_characters", "_comparisons", "_steps", "_work")

    def __init__(self) -> None:
        self._characters = 0
        self._comparisons = 0
        self._steps = 0
        self._work = 0

    def make(self, characters: int) -> None:
        """Count values that are made."""
        self._characters += characters
        if self._characters > MAX_CHARACTERS:
            raise AttestationError(
                "the policy makes too much", expected=f"at most {MAX_CHARACTERS} characters in all"
            )

    def compare(self, comparisons: int) -> None:
        """Count comparisons of values."""
        self._comparisons += comparisons
        if self._comparisons > MAX_COMPARISONS:
            raise AttestationError(
                "the policy compares too much", expected=f"at most {MAX_COMPARISONS} comparisons"
            )

    def step(self) -> None:
        """Count a step of a JMESPath expression."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise AttestationError(
                "JmesPath: the query takes too many steps", expected=f"at most {MAX_STEPS} in all"
            )

    def work(self, amount: int) -> None:
        """Count what is parsed or passed on."""
        self._work += amount
        if self._work > MAX_WORK:
            raise AttestationError(
                "JmesPath: the query works on too much", expected=f"at most {MAX_WORK} in all"
            )
