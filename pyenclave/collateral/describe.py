"""What endorsements say of themselves: whose they are, of what, and until when they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import jsonstrict
from pyenclave.formats.x509 import Certificate, Crl

__all__ = ["Described", "describe", "holds_until"]

_MEMBERS: Final = {"tcb-info.json": "tcbInfo", "qe-identity.json": "enclaveIdentity"}


@dataclass(frozen=True, slots=True)
class Described:
    """
    One file. Nothing of it is verified.

    Attributes:
        name: Of the file.
        what: What it is, for people.
        since: When it was issued.
        until: When it ends or a newer one is due; None if it does not say.
        problem: Why it cannot be read.
    """

    name: str
    what: str
    since: datetime | None = None
    until: datetime | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        times = {"since": self.since, "until": self.until}
        said = {k: None if v is None else v.isoformat() for k, v in times.items()}
        return {"name": self.name, "what": self.what, **said, "problem": self.problem}


def _time(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return moment if moment is not None and moment.tzinfo is not None else None


def _json(name: str, data: bytes) -> Described:
    member = _MEMBERS[name]
    value = jsonstrict.object_of(data, name, error=CollateralError)
    inner = value.get(member)
    if not isinstance(inner, dict):
        raise CollateralError(f"{name}: no {member}")
    of = f"FMSPC {inner['fmspc']}" if "fmspc" in inner else "all platforms"
    what = f"{member} {inner.get('id')}, {of}, evaluation {inner.get('tcbEvaluationDataNumber')}"
    return Described(
        name, what[:200], _time(inner.get("issueDate")), _time(inner.get("nextUpdate"))
    )


def _one(name: str, data: bytes) -> Described:
    if name in _MEMBERS:
        return _json(name, data)
    if "crl" in name and name.endswith(".der"):
        crl = Crl.from_bytes(data)
        what = f"revocation list, {len(crl.revoked)} entries"
        return Described(name, what, crl.this_update, crl.next_update)
    if name.endswith(".pem") or name == "vek.der":
        chain = (
            Certificate.from_pem_chain(data)
            if name.endswith(".pem")
            else (Certificate.from_der(data),)
        )
        names = ", ".join(item.common_name or "?" for item in chain)
        since = max(item.not_before for item in chain)
        return Described(name, names[:200], since, min(item.not_after for item in chain))
    return Described(name, f"{len(data)} bytes")


def describe(files: Mapping[str, bytes]) -> tuple[Described, ...]:
    """Describe each of *files*; what cannot be read is said, not raised."""
    found = []
    for name in sorted(files):
        try:
            found.append(_one(name, files[name]))
        except (CollateralError, EvidenceFormatError) as error:
            found.append(Described(name, "cannot be read", problem=str(error)))
    return tuple(found)


def holds_until(described: tuple[Described, ...]) -> datetime | None:
    """Return when the first of the files ends; None if none says so."""
    ends = [item.until for item in described if item.until is not None]
    return min(ends) if ends else None
