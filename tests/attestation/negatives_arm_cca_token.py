"""Arm CCA tokens with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from issuer_cca import DEBUG, DECOMMISSIONED, RIM, cpak_file, judge, key_of, raw_of, token

from pyenclave.attestation import AppraisalPolicy, AttestationResult

# The bytes of what follows; without them there is nothing to judge.
STRUCTURAL = ("token.format", "platform.format", "cpak.format", "realm.format", "realm.key")

_OTHER = "tag:arm.com,2099:else#1.0.0"

# check → changes of the token, changes of the appraisal
_WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "platform.format": ({"platform_payload": b"\xa0"}, {}),
    "platform.profile": ({"platform": {"profile": _OTHER}}, {}),
    "cpak.format": ({}, {"endorsements": cpak_file(d="AA")}),
    "platform.signature": ({"platform_key": key_of("forged")}, {}),
    "platform.lifecycle": ({"platform": {"lifecycle": DECOMMISSIONED}}, {}),
    "realm.format": ({"realm_payload": b"\xa0"}, {}),
    "realm.profile": ({"realm": {"profile": _OTHER}}, {}),
    "realm.key": ({"realm": {"public_key": raw_of(key_of("rak"))[:-1]}}, {}),
    "realm.binding": ({"platform": {"challenge": bytes(48)}}, {}),
    "realm.signature": ({"realm_key": key_of("forged")}, {}),
    "nonce": ({"realm": {"challenge": bytes(64)}}, {}),
    "report_data": ({}, {"nonce": None, "freshness": "not_checked", "report_data": bytes(64)}),
    "user_data": ({}, {"user_data": b"other"}),
    "debug": ({"platform": {"lifecycle": DEBUG}}, {}),
    "platform.implementation": (
        {},
        {"policy": AppraisalPolicy(rim=RIM, implementation_id=b"\x55" * 32)},
    ),
    "code.rim": ({}, {"policy": AppraisalPolicy(rim=b"\x55" * 32)}),
    "code.rems": ({}, {"policy": AppraisalPolicy(rim=RIM, rems={0: b"\x55" * 32})}),
    "code.rpv": ({}, {"policy": AppraisalPolicy(rim=RIM, rpv=bytes(64))}),
}


def _run(edit: Callable[[bytes], bytes], made: dict[str, Any], options: dict[str, Any]) -> Any:
    return judge(edit(token(**made)), **options)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    """Yield each check with evidence that only it refuses."""
    yield "token.format", partial(_run, lambda data: data + b"\0", {}, {})
    yield "platform.signature", partial(judge, token(), endorsements={})
    for check, (made, options) in _WRONG.items():
        yield check, partial(_run, lambda data: data, made, options)
