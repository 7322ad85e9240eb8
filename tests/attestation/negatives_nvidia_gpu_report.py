"""GPU reports with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from cryptography.hazmat.primitives import hashes
from issuer_nvidia import AT, FWID, chain, crl, judge, key_of, report

from pyenclave.attestation import AppraisalPolicy, AttestationResult

# The bytes of what follows; without them there is nothing to judge.
STRUCTURAL = ("report.format", "chain.format")

# check → changes of the report, of the certificates, of the appraisal
_WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "report.whole": ({"operation": 1}, {}, {}),
    "chain.format": ({}, {}, {"endorsements": {}}),
    "chain.root": ({}, {}, {"roots": []}),
    "chain.names": ({}, {"leaf": {"issuer": "other"}}, {}),
    "chain.algorithms": ({}, {"brom": {"hash": hashes.SHA256()}}, {}),
    "chain.constraints": ({}, {"product": {"path_length": 0}}, {}),
    "chain.key_usage": ({}, {"brom": {"cert_sign": False}}, {}),
    "chain.validity": ({}, {"leaf": {"end": AT - timedelta(seconds=1)}}, {}),
    "chain.signatures": ({}, {"leaf": {"signer": key_of("forged")}}, {}),
    "crl": ({}, {}, {"crl": crl(revoked=(1,))}),
    "report.signature": ({"key": key_of("forged")}, {}, {}),
    "report.fwid": ({"fields": {FWID: bytes(48)}}, {}, {}),
    "nonce": ({"nonce": bytes(32)}, {}, {}),
    "report_data": ({}, {}, {"report_data": bytes(64)}),
    "user_data": ({}, {}, {"user_data": b"other"}),
    "code.gpu_measurements": (
        {},
        {},
        {"policy": AppraisalPolicy(gpu_measurements={1: b"\x55" * 48})},
    ),
}


def _run(
    edit: Callable[[bytes], bytes],
    made: dict[str, Any],
    certificates: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    return judge(edit(report(**made)), chain=chain(**certificates), **options)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    """Yield each check with evidence that only it refuses."""
    yield "report.format", partial(_run, lambda data: data + b"\1", {}, {}, {})
    yield "crl", partial(judge, report(), crl=crl(issuer="stranger"))
    for check, (made, certificates, options) in _WRONG.items():
        yield check, partial(_run, lambda data: data, made, certificates, options)
