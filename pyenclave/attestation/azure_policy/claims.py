"""Claims of Azure Attestation's policy language ("Claim and claim rules", Claim)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pyenclave.errors import AttestationError

__all__ = ["ISSUERS", "MAX_INTEGER", "MAX_STRING", "Claim", "Issuer", "Value", "type_name"]

Value = str | int | bool
Issuer = Literal["AttestationService", "AttestationPolicy", "CustomClaim"]
ISSUERS: Final = ("AttestationService", "AttestationPolicy", "CustomClaim")
MAX_STRING: Final = 4 << 20  # characters: evidence as JSON is the largest value there is
MAX_INTEGER: Final = (1 << 63) - 1


def type_name(value: Value) -> str:
    """Return the ``valueType`` of a value."""
    if isinstance(value, bool):
        return "Boolean"
    return "Integer" if isinstance(value, int) else "String"


@dataclass(frozen=True, slots=True)
class Claim:
    """
    One claim.

    Attributes:
        type: Its name.
        value: String, integer (64 bits) or boolean.
        issuer: Who says so: the service (from verified evidence), the policy, or the attester.
        read_only: It may be looked at but neither issued nor anything that is made of it.
    """

    type: str
    value: Value
    issuer: Issuer = "CustomClaim"
    read_only: bool = False

    def __post_init__(self) -> None:
        if not self.type:
            raise AttestationError("claim: a type is a name", found=repr(self.type)[:100])
        if not isinstance(self.value, str | int):
            raise AttestationError(
                f"claim {self.type}: a value is a string, an integer or a boolean",
                found=type(self.value).__name__,
            )
        if isinstance(self.value, str):
            if len(self.value) > MAX_STRING:
                raise AttestationError(f"claim {self.type}: a string too long")
        elif not -MAX_INTEGER - 1 <= self.value <= MAX_INTEGER:
            raise AttestationError(f"claim {self.type}: an integer has 64 bits")
        if self.issuer not in ISSUERS:
            raise AttestationError(f"claim {self.type}: no such issuer", found=self.issuer)

    @property
    def value_type(self) -> str:
        """The ``valueType``: String, Integer or Boolean."""
        return type_name(self.value)
