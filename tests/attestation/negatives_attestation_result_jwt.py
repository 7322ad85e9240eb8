"""Attestation results with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import token_negatives as t
from issuer_token import EAR_KEY, FORGED, ear_claims

KIND = t.Kind(claims=ear_claims, key=EAR_KEY, forged=FORGED, algorithm="ES256")
STRUCTURAL = t.STRUCTURAL
REDUNDANT = {
    **t.REDUNDANT,
    **t.UNTOLD,
    "token.claims": "detection reads the claims first and refuses what is no object",
}


def _status(status: str, hardware: int) -> dict[str, object]:
    vector = {"hardware": hardware}
    return {
        "submods": {"cpu0": {"ear.status": status, "ear.trustworthiness-vector": vector}},
    }


def negatives() -> Iterator[tuple[str, t.Run]]:
    """Yield each check with evidence that only it refuses."""
    yield from t.common(KIND)
    for check, changes in (
        ("ear.format", _status("affirming", 96)),
        ("ear.status", _status("warning", 32)),
        ("debug", {"dbgstat": "enabled"}),
        ("tcb.status", {"tdx": {"gcp_attester_tcb_status": "OutOfDate"}}),
    ):
        yield check, partial(KIND.run, changes, {})
