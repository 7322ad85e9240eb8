"""How a key's way looks to people: a head, a line and facts for each thing, what it comes to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pyenclave.cli import output
from pyenclave.formats.audit_chain import Report
from pyenclave.services.audit.follow import Followed
from pyenclave.services.audit.happenings import Happening, text_of
from pyenclave.services.identity.roles import BUILT_IN

__all__ = ["alarms", "timeline", "whole"]

_WORDS: Final[Mapping[str, str]] = {
    "backed_up": "backed up",
    "expires_soon": "expires soon",
    "rotation_policy": "rotation policy",
    "role_given": "role given",
    "role_taken": "role taken",
    "role_defined": "role defined",
    "role_removed": "role removed",
    "kek": "KEK",
    "log_cut": "log cut",
    "token": "token issued",
    "no_token": "no token",
    "damaged": "ROW DAMAGED",
    "released": "RELEASED",
}
# What was asked, where it was refused.
_ASKED: Final[Mapping[str, str]] = {
    "created": "create",
    "imported": "import",
    "changed": "change",
    "rotated": "rotate",
    "deleted": "delete",
    "recovered": "recover",
    "purged": "purge",
    "backed_up": "back up",
    "restored": "restore",
    "released": "release",
    "role_given": "give a role",
    "role_taken": "take a role",
    "used": "use",
}
_LABELS: Final[Mapping[str, str]] = {
    "policy_text": "policy says",
    "key_ops": "operations",
    "evidence_digest": "evidence digest",
    "attested_by": "attested in row",
    "token_digest": "token digest",
    "transfer_key": "transfer key",
    "answer_signer": "answer signed by",
    "related_by": "same code",
}
# Shown in one place already, or of no use to a reader; `--json` has them.
_HIDDEN: Final = frozenset(
    {"enabled", "token_digest", "answer_signer", "expires", "scope", "vault"}
)
_BRIEF: Final = frozenset(
    {"condition", "expected", "found", "reference", "policy_text", "role", "principal", "mrenclave"}
    | {"launch measurement", "mrtd", "algorithm", "kek"}
)
_LONG: Final = 240
_DIGEST: Final = 32  # characters from which a value has a line of its own


def whole(found: Followed, *, brief: bool = False) -> Iterator[str]:
    """Yield everything: what is followed, the timeline, what it comes to."""
    yield from _head(found)
    yield ""
    yield from timeline(found, brief=brief)
    yield ""
    yield from _summary(found)


def alarms(found: Followed) -> Iterator[str]:
    """Yield what must not be overlooked."""
    for name, report in _reports(found):
        for finding in report.findings:
            yield f"{name}: {output.paint(finding.kind, 'red')}: {output.line(finding.message)}"
        if report.more:
            yield f"{name}: … and {report.more} more"
    for text in found.contradictions:
        yield f"{output.paint('contradiction', 'red')}: {output.line(text)}"


def _reports(found: Followed) -> Iterator[tuple[str, Report]]:
    yield "vault", found.vault
    if found.attestation is not None:
        yield "attestation", found.attestation


def _head(found: Followed) -> Iterator[str]:
    yield f"{'key':<13}{output.paint(str(found.key), 'bold')}"
    for name, report in _reports(found):
        word = (
            output.paint("intact", "green")
            if report.intact
            else output.paint("DOES NOT VERIFY", "red")
        )
        rows = f"rows {report.start.seq + 1} to {report.last}"
        signed = f"signed up to row {report.signed}" if report.newest else "NOT SIGNED"
        yield f"{name:<13}log {report.start.log.hex()}: {word}, {rows}, {signed}"


def timeline(found: Followed, *, brief: bool = False) -> Iterator[str]:
    """Yield a line for each thing that happened, and its facts under it."""
    shown: set[str] = set()  # policies whose text was shown already
    for item in found.happenings:
        report = found.vault if item.service == "vault" else found.attestation
        unsigned = report is not None and report.newest is not None and not item.signed
        marks = ("" if item.verified else "  DOES NOT VERIFY") + ("  not signed" * unsigned)
        yield from _lines(item, shown, marks, brief=brief)


def _word(item: Happening) -> str:
    word = _WORDS.get(item.what, item.what.replace("_", " "))
    if item.what == "kek":  # vault/kek/made, moved or destroyed
        word = f"{word} {text_of(item.row, 'action').removeprefix('vault/kek').strip('/')}".rstrip()
    if item.service == "vault" and item.decision != "allowed":
        return f"{output.line(item.decision)}: {_ASKED.get(item.what, word)}"
    return word


def _lines(item: Happening, shown: set[str], marks: str, *, brief: bool) -> Iterator[str]:
    word = _word(item)
    colour = {"allowed": "green", "refused": "red"}.get(item.decision, "yellow")
    at = output.line(item.at).replace("T", " ")[:19]
    where = f"{item.service} {item.row['seq']}"
    yield (
        f"{at}  {output.paint(word.ljust(20), colour)}  {where:<15}  "
        f"{_caller(item)}{output.paint(marks, 'red')}"
    ).rstrip()
    facts = dict(item.facts)
    if item.service == "vault" and item.version:
        facts = {"version": item.version, **facts}
    if item.decision != "allowed":
        facts["reference"] = text_of(item.row, "reference")
    policy = facts.get("policy")
    if "policy_text" in facts and isinstance(policy, str):
        if policy in shown:
            del facts["policy_text"]
        shown.add(policy)
    if isinstance(facts.get("found"), dict):
        facts["found"] = _of_interest(facts["found"], str(facts.get("expected")))
    evidence = facts.pop("evidence", None)
    if isinstance(evidence, dict):
        facts |= _evidence(evidence)
    for name, value in facts.items():
        if name not in _HIDDEN and (not brief or name in _BRIEF):
            yield f"    {_LABELS.get(name, name.replace('_', ' ')):<16} {_value(name, value)}"


def _of_interest(found: dict[str, Any], expected: str) -> dict[str, Any]:
    """Return of the claims that were found those that *expected* speaks of, if there are any."""
    return {name: value for name, value in found.items() if name in expected} or found


def _evidence(evidence: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured as lines of their own, the rest as one."""
    long = {name: value for name, value in evidence.items() if len(_plain(value)) >= _DIGEST}
    rest = {name: value for name, value in evidence.items() if name not in long}
    return {**long, "code": rest} if rest else long


def _caller(item: Happening) -> str:
    caller = text_of(item.row, "caller").rpartition("/")[2]
    if not caller:
        return ""
    word = "to" if item.what == "released" and item.decision == "allowed" else "by"
    return output.line(f"{word} {caller}")


def _value(name: str, value: Any) -> str:
    if name == "role" and isinstance(value, str):
        known = BUILT_IN.get(value.rpartition("/")[2].lower())
        return known.name if known else output.line(value)
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    elif isinstance(value, list):
        value = ("; " if name in ("expected", "found") else ", ").join(map(_plain, value))
    text = output.line(_plain(value))
    return text if len(text) <= _LONG or name == "policy_text" else f"{text[: _LONG - 1]}…"


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _summary(found: Followed) -> Iterator[str]:
    def said(name: str, text: str) -> str:
        return f"{name:<13}{output.line(text)}"

    counted = Counter(_word(item) for item in found.happenings)
    counts = [f"{number} {word}" for word, number in counted.items()]
    times = sorted(item.at for item in found.happenings)
    span = f", {times[0][:19]}Z to {times[-1][:19]}Z" if times else ""
    yield said("in all", ", ".join(counts) + span)
    if found.routine:
        used = (
            f"{action} {r.count} {'time' if r.count == 1 else 'times'} by {len(r.callers)}"
            for action, r in found.routine.items()
        )
        yield said("routine", ", ".join(used) + " (--all lists them)")
    yield said("tokens", _tokens(found))
    for entry in found.unjoined[:10]:
        yield said("not joined", f"{entry['reference']}: token {entry['token']}: {entry['why']}")
    if len(found.unjoined) > 10:
        yield said("not joined", f"… and {len(found.unjoined) - 10} more")
    for note in found.notes:
        yield said("note", note)
    for name, report in _reports(found):
        newest = report.newest
        text = (
            f"{name}: none that holds: whoever owns the database can have written all of it"
            if newest is None
            else f"{name} row {report.signed}, {newest.at[:19]}Z, key {newest.token.kid or ''}"
        )
        yield said("checkpoint", text)
    unsigned = sum(not item.signed for item in found.happenings)
    if unsigned:
        yield said("not signed", f"{unsigned} of these, newer than the last checkpoint")
    verdict = (
        output.paint("holds", "green") if found.holds else output.paint("DOES NOT HOLD", "red")
    )
    yield f"{'verdict':<13}{verdict}"


def _tokens(found: Followed) -> str:
    if found.attestation is None:
        return f"{len(found.shown)} shown, none joined: no attestation service's log was given"
    joined = len(found.shown) - len({entry["token"] for entry in found.unjoined})
    return (
        f"{len(found.shown)} shown for this key, {joined} joined with the attestation service's "
        f"log, which issued {found.issued}"
    )
