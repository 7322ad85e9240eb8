"""Nitro documents with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from cryptography.hazmat.primitives import hashes
from issuer_nitro import AT, ISSUER, PCR0, judge, key_of

from pyenclave.attestation import AppraisalPolicy, AttestationResult

# The bytes of what follows; without them there is nothing to judge.
STRUCTURAL = ("document.format", "chain.format")

_ANY = AppraisalPolicy.any_code()
_LONG = {index: bytes([index + 1]) * 64 for index in range(16)}
_MILLISECONDS = int(AT.timestamp() * 1000)

# check → changes of the document, changes of the appraisal
_WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "document.digest": ({"digest": "SHA512", "pcrs": _LONG}, {"policy": _ANY}),
    "document.pcrs": ({"pcrs": {0: PCR0}}, {}),
    "chain.format": ({"certificate": b"\x30\x00"}, {}),
    "chain.root": ({}, {"roots": []}),
    "chain.names": ({"leaf": {"issuer": "other"}}, {}),
    "chain.algorithms": ({"instance": {"hash": hashes.SHA256()}}, {}),
    "chain.constraints": ({"region": {"path_length": 0}}, {}),
    "chain.key_usage": ({"instance": {"cert_sign": False}}, {}),
    "chain.validity": ({"leaf": {"end": AT - timedelta(seconds=1)}}, {}),
    "chain.signatures": ({"leaf": {"signer": key_of("forged")}}, {}),
    "document.signature": ({"key": key_of("forged")}, {}),
    "document.time": ({"timestamp": _MILLISECONDS + 360_000}, {}),
    "nonce": ({"nonce": b"another nonce"}, {}),
    "report_data": ({}, {"report_data": bytes(64)}),
    "user_data": ({}, {"user_data": b"other"}),
    "document.age": ({}, {"policy": AppraisalPolicy(pcrs={0: PCR0}, max_age=1)}),
    "debug": ({"pcrs": {index: bytes(48) for index in range(16)}}, {"policy": _ANY}),
    "code.kind": (
        {"pcrs": {0: PCR0, 1: PCR0, 2: PCR0, 4: PCR0}},
        {"policy": AppraisalPolicy(pcrs={1: PCR0, 4: PCR0})},
    ),
    "code.pcrs": ({}, {"policy": AppraisalPolicy(pcrs={0: b"\x22" * 48})}),
}


def _run(edit: Callable[[bytes], bytes], document: dict[str, Any], options: dict[str, Any]) -> Any:
    return judge(edit(ISSUER.document(**document)), **options)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    """Yield each check with evidence that only it refuses."""
    yield "document.format", partial(_run, lambda data: data + b"\0", {}, {})
    for check, (document, options) in _WRONG.items():
        yield check, partial(_run, lambda data: data, document, options)
