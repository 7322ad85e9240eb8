"""
One key through the logs of a vault and of its attestation service.

Both chains are verified while they are read, once and in order; what is kept is bounded, however
long the logs are. A token joins the two: the row of a release has the id that the attestation
service's row has. What cannot be joined is said, with the reason, and what contradicts itself is
no detail but a verdict.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from pyenclave.errors import AuditError
from pyenclave.formats.audit_chain import Item, Report, verify_chain
from pyenclave.formats.audit_log import Checkpoint, PublicKey, Row, fields_of
from pyenclave.services.audit.happenings import (
    ROUTINE,
    Happening,
    KeyName,
    facts_of,
    host_of,
    kind_of,
    marks_of,
    table_of,
    text_of,
    told_of_evidence,
)
from pyenclave.services.audit.reader import Log

__all__ = ["Followed", "Routine", "Trust", "follow"]

_ATTEST: Final = "attestation/attest/"
_LIVES: Final = 10_000  # rows about a key's life that are kept: far more than it has versions
_CALLERS: Final = 100  # identities that are named
_NONE: Final = hashlib.sha256(b"").hexdigest()  # the digest of no policy


@dataclass(frozen=True, slots=True)
class Trust:
    """
    What a log is held against.

    Attributes:
        keys: Keys that may sign checkpoints, by kid; ``None``: those that the log names.
        kept: Checkpoints that were kept elsewhere.

    """

    keys: Mapping[str, PublicKey] | None = None
    kept: Sequence[Checkpoint] = ()


@dataclass(slots=True)
class Routine:
    """Reads and uses of one kind that were allowed: how many, by whom, when."""

    count: int = 0
    callers: set[str] = field(default_factory=set)
    first: str = ""
    last: str = ""

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.count += 1
        if len(self.callers) < _CALLERS:
            self.callers.add(text_of(row, "caller"))
        self.first = self.first or text_of(row, "at")
        self.last = text_of(row, "at")


@dataclass(slots=True)
class Followed:
    """
    A key's way through the logs.

    Attributes:
        key: Which.
        vault: What verifying the vault's log gave.
        attestation: The same of the attestation service's log, if there is one.
        happenings: What happened, in order.
        left_out: How many more there were than are kept.
        routine: Reads and uses, by action.
        issued: Tokens that the attestation service's log has.
        shown: Tokens that the kept releases and refusals name.
        unjoined: Those that were not found there: token, reference of the row, and why.
        notes: What a reviewer must know of the logs' limits.
        contradictions: What cannot both be true.
        has_attestations: The vault's log has rows of an attestation service, too.

    """

    key: KeyName
    vault: Report
    attestation: Report | None = None
    happenings: list[Happening] = field(default_factory=list)
    left_out: int = 0
    routine: dict[str, Routine] = field(default_factory=dict)
    issued: int = 0
    shown: set[str] = field(default_factory=set)
    unjoined: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    has_attestations: bool = False

    @property
    def found(self) -> bool:
        """Whether any row names the key itself."""
        return bool(self.routine) or any(
            f"/keys/{self.key.name}" in text_of(item.row, "resource") for item in self.happenings
        )

    @property
    def holds(self) -> bool:
        """Whether both chains verify, and nothing contradicts itself."""
        intact = self.vault.intact and (self.attestation is None or self.attestation.intact)
        return intact and not self.contradictions

    def counts(self) -> dict[str, int]:
        """Return how often each thing happened; what was refused or failed apart."""
        found: Counter[str] = Counter()
        for item in self.happenings:
            word = item.what if item.decision == "allowed" else f"{item.decision}:{item.what}"
            found[word] += 1
        for action in self.routine.values():
            found["routine"] += action.count
        return dict(found)


class _Few(msgspec.Struct):
    """What rows are chosen by. Only those that are kept are read whole."""

    action: str = ""
    decision: str = ""
    condition: str = ""
    resource: str = ""
    token_id: str = ""


_FEW: Final = msgspec.json.Decoder(_Few)


def _few(row: Row) -> _Few | None:
    try:
        return _FEW.decode(row.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # told of by the verification, if anybody changed it


def _whole(row: Row) -> dict[str, Any] | None:
    try:
        return {"seq": row.seq, **fields_of(row)}
    except AuditError:
        return None


def follow(
    vault: Log,
    key: KeyName,
    *,
    attestation: Log | None = None,
    trust: Trust | None = None,
    attestation_trust: Trust | None = None,
    everything: bool = False,
    limit: int = 1_000,
) -> Followed:
    """
    Follow a key from its creation to its releases.

    Args:
        vault: The vault's log.
        key: Which key.
        attestation: The log of the attestation service whose tokens were shown.
        trust: What the vault's log is held against.
        attestation_trust: What the attestation service's log is held against.
        everything: Reads and uses one by one, too.
        limit: Of releases, refusals, reads and uses the last so many are kept; all are counted.

    Returns:
        What happened. A log that does not verify is followed all the same: its rows that a finding
        names are marked, and `Followed.holds` is false.

    Raises:
        AuditError: A log cannot be read.

    """
    reader = _OfVault(key, everything=everything, limit=limit)
    trust = trust or Trust()
    report = verify_chain(
        reader.through(vault.items),
        start=vault.start,
        keys=trust.keys,
        kept=trust.kept,
        head=vault.head,
    )
    found = Followed(key, report, left_out=reader.left_out, routine=reader.routine)
    found.has_attestations = reader.has_attestations
    vaults = reader.kept()
    _mark(vaults, report)
    tokens: list[Happening] = []
    if attestation is not None:
        others = _OfAttestation(vaults, limit=limit)
        trust = attestation_trust or Trust()
        found.attestation = verify_chain(
            others.through(attestation.items),
            start=attestation.start,
            keys=trust.keys,
            kept=trust.kept,
            head=attestation.head,
        )
        found.issued = others.issued
        tokens = others.kept()
        _mark(tokens, found.attestation)
        _join(found, vaults, others)
        found.left_out += others.left_out
    else:
        _unjoinable(found, vaults)
    _check_policies(found, vaults)
    _check_address(found, vaults)
    found.happenings = _ordered(vaults, tokens)
    _notes(found, vaults, vault, attestation)
    return found


# ---- reading -----------------------------------------------------------------------------------


class _OfVault:
    """Keeps what the vault's log says of one key while it is read."""

    def __init__(self, key: KeyName, *, everything: bool, limit: int) -> None:
        self._key = key
        self._needle = key.name.encode()
        self._everything = everything
        self._life: list[Happening] = []
        self._often: deque[Happening] = deque(maxlen=limit)
        self.left_out = 0
        self.routine: dict[str, Routine] = {}
        self.has_attestations = False
        self._given: dict[str, Mapping[str, Any]] = {}  # details of role assignments by their ids

    def through(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield *items* as they are; what concerns the key is kept."""
        for item in items:
            if isinstance(item, Row):
                self._look(item)
            yield item

    def kept(self) -> list[Happening]:
        """Return what was kept, in the log's order."""
        return sorted([*self._life, *self._often], key=lambda item: int(item.row["seq"]))

    def _look(self, row: Row) -> None:
        few = _few(row)
        if few is None:
            return
        if few.action.startswith(_ATTEST):
            self.has_attestations = True
            return
        what = kind_of(few.action, few.decision, few.condition)
        mine = self._key.concerns(few.resource, few.action)
        if not mine and not (what == "damaged" and self._needle in row.body):
            return
        whole = _whole(row)
        if whole is None:
            return
        routine = what in ROUTINE and few.decision == "allowed"
        if routine and not self._everything:
            if few.resource.partition(" ")[0] != "/":
                self.routine.setdefault(few.action, Routine()).add(whole)
            return
        self._keep(Happening("vault", what, whole, facts_of(what, whole)), routine=routine)

    def _keep(self, item: Happening, *, routine: bool) -> None:
        if item.what == "role_given" and len(self._given) < _LIVES:
            self._given[str(item.facts.get("assignment"))] = item.facts
        elif item.what == "role_taken":
            before = self._given.get(str(item.facts.get("assignment")), {})
            item.facts |= {name: before[name] for name in ("principal", "role") if name in before}
        if item.decision == "allowed" and item.what != "released" and not routine:
            if len(self._life) < _LIVES:
                self._life.append(item)
            else:
                self.left_out += 1
            return
        if len(self._often) == self._often.maxlen:
            self.left_out += 1
        self._often.append(item)


class _OfAttestation:
    """Keeps the tokens that were shown for a key, and refusals of the same code."""

    def __init__(self, vaults: Sequence[Happening], *, limit: int) -> None:
        self._wanted = {str(item.facts["token"]) for item in vaults if "token" in item.facts}
        self._marks: set[str] = set()
        for item in vaults:
            self._marks |= marks_of(table_of(item.row, "claims"))
        self.tokens: dict[str, Happening] = {}
        self._refused: deque[Happening] = deque(maxlen=limit)
        self.issued = 0
        self.left_out = 0

    def through(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield *items* as they are; what belongs to the key is kept."""
        for item in items:
            if isinstance(item, Row):
                self._look(item)
            yield item

    def kept(self) -> list[Happening]:
        """Return tokens and refusals, in the log's order."""
        found = [*self.tokens.values(), *self._refused]
        return sorted(found, key=lambda item: int(item.row["seq"]))

    def _look(self, row: Row) -> None:
        few = _few(row)
        if few is None or not few.action.startswith(_ATTEST):
            return
        allowed = few.decision == "allowed"
        self.issued += allowed
        if allowed and few.token_id not in self._wanted:
            return
        whole = _whole(row)
        if whole is None:
            return
        if allowed:
            self.tokens[few.token_id] = _token(whole)
        elif same := sorted(marks_of(table_of(whole, "claims")) & self._marks):
            item = _token(whole)
            item.what = "no_token"
            item.facts["related_by"] = same
            if len(self._refused) == self._refused.maxlen:
                self.left_out += 1
            self._refused.append(item)


def _token(row: dict[str, Any]) -> Happening:
    facts: dict[str, Any] = {}
    if text_of(row, "decision") != "allowed":
        for name in ("condition", "expected", "found"):
            if row.get(name) is not None and row.get(name) != "":
                facts[name] = row[name]
    facts |= {
        "token": text_of(row, "token_id"),
        "evidence_digest": text_of(row, "evidence_digest"),
        "policy": text_of(row, "rule").removeprefix("policy "),
        "evidence": told_of_evidence(table_of(row, "claims")),
    }
    expires = table_of(row, "details").get("expires")
    if expires is not None:
        facts["expires"] = expires
    return Happening("attestation", "token", row, {k: v for k, v in facts.items() if v != ""})


# ---- what the rows say together ----------------------------------------------------------------


def _mark(found: Sequence[Happening], report: Report) -> None:
    """Mark rows that the verification names, and those that no checkpoint covers."""
    for item in found:
        seq = int(item.row["seq"])
        item.signed = seq <= report.signed
        item.verified = not report.more and not any(
            finding.first <= seq <= finding.last for finding in report.findings
        )


def _join(found: Followed, vaults: Sequence[Happening], others: _OfAttestation) -> None:
    begins = found.attestation.start.seq if found.attestation else 0
    for item in vaults:
        token = item.facts.get("token")
        if token is None:
            continue
        found.shown.add(str(token))
        issued = others.tokens.get(str(token))
        if issued is None:
            if token == item.facts.get("token_digest"):
                why = "the token has no id (jti)"
            elif begins:
                why = f"it may be in the first {begins} rows, which were cut off the log"
            else:
                why = "the attestation service's log that was given has no such token"
            _tell(found, item, why)
            continue
        item.facts["attested_by"] = issued.row["seq"]
        item.facts["evidence_digest"] = issued.facts.get("evidence_digest", "")
        before = {n: item.facts.get("evidence", {}).get(n) for n in issued.facts["evidence"]}
        for name, value in issued.facts["evidence"].items():
            if before[name] is not None and before[name] != value:
                found.contradictions.append(
                    f"token {token}: {name} is {before[name]} in the vault's row "
                    f"{item.row['seq']}, {value} in the attestation service's row "
                    f"{issued.row['seq']}"
                )
        item.facts["evidence"] = issued.facts["evidence"] | item.facts.get("evidence", {})


def _unjoinable(found: Followed, vaults: Sequence[Happening]) -> None:
    for item in vaults:
        if "token" in item.facts:
            found.shown.add(str(item.facts["token"]))
            _tell(found, item, "no log of an attestation service was given")


def _tell(found: Followed, item: Happening, why: str) -> None:
    found.unjoined.append(
        {
            "token": str(item.facts["token"]),
            "authority": str(item.facts.get("authority", "")),
            "reference": text_of(item.row, "reference"),
            "why": why,
        }
    )


def _check_policies(found: Followed, vaults: Sequence[Happening]) -> None:
    """Hold each release against the policy that the log says the version had then."""
    held: dict[str, str] = {}
    for item in vaults:
        if item.decision != "allowed":
            continue
        if item.what in ("created", "imported", "changed", "rotated", "restored"):
            held[item.version] = str(item.facts.get("policy", _NONE))
        elif item.what == "released" and item.version in held:
            policy = item.facts.get("policy")
            if policy != held[item.version]:
                found.contradictions.append(
                    f"row {item.row['seq']} released under the policy {policy}, and the log has "
                    f"{held[item.version]} for that version"
                )


def _check_address(found: Followed, vaults: Sequence[Happening]) -> None:
    """Hold the host of the key's URL against what rows say of the vault's address."""
    if not found.key.vault:
        return
    said = Counter(
        host_of(text_of(table_of(item.row, "details"), "vault"))
        for item in vaults
        if item.decision == "allowed" and found.key.names(text_of(item.row, "resource"))
    )
    del said[""]
    others = ", ".join(sorted(host for host in said if host != found.key.vault)[:5])
    if not said:
        found.notes.append(
            f"no row says the vault's address: {found.key.vault} was not compared with anything"
        )
    elif not said[found.key.vault]:
        found.contradictions.append(
            f"the key of the URL is in the vault {found.key.vault}, this log is of {others}"
        )
    elif others:
        found.notes.append(f"the vault was {others}, too, not only {found.key.vault}")


def _ordered(vaults: Sequence[Happening], tokens: Sequence[Happening]) -> list[Happening]:
    """Return everything by time; the log's order holds within a log, a token before its use."""
    first_use: dict[str, str] = {}
    placed: list[tuple[str, int, int, Happening]] = []
    latest = ""
    for item in vaults:
        latest = max(latest, item.at)
        placed.append((latest, 1, int(item.row["seq"]), item))
        if "token" in item.facts:
            first_use.setdefault(str(item.facts["token"]), latest)
    for item in tokens:
        at = min(item.at, first_use.get(str(item.facts.get("token")), item.at))
        placed.append((at, 0, int(item.row["seq"]), item))
    return [item for *_, item in sorted(placed, key=lambda place: place[:3])]


def _notes(found: Followed, vaults: list[Happening], vault: Log, attestation: Log | None) -> None:
    notes = found.notes
    for name, log in (("vault", vault), ("attestation service", attestation)):
        if log is not None and log.start.seq:
            notes.append(
                f"the {name}'s log begins at row {log.start.seq + 1}: what was before is in an "
                "export of it"
            )
    born = ("created", "imported", "restored")
    first = next((item for item in vaults if item.what in ROUTINE or item.version), None)
    if first is not None and not (first.what in born and first.decision == "allowed"):
        made = any(item.what in born and item.decision == "allowed" for item in vaults)
        notes.append(
            "rows name the key before it was made" if made else "no row tells of its creation"
        )
    unread = sum(
        item.what == "released" and item.decision == "refused" and "token" not in item.facts
        for item in vaults
    )
    if unread:
        notes.append(
            f"{unread} request{'s' * (unread > 1)} for release refused before the token was read: "
            "no token to join"
        )
    if found.left_out:
        notes.append(f"{found.left_out} older rows are counted, not listed: --last")
