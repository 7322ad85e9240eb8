"""Tokens with certificates with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import partial
from typing import Any

import token_negatives as t
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_token import EAR_KEY, FORGED, NONCE, NOW, make_certificate

STRUCTURAL = t.STRUCTURAL
REDUNDANT = {
    **t.REDUNDANT,
    **t.UNTOLD,
    "token.claims": "detection reads the claims first and refuses what is no object",
}


def _claims(**changes: Any) -> dict[str, Any]:
    return {"iss": "https://somebody", "iat": NOW - 10, "nonce": NONCE.hex()} | changes


def _header() -> dict[str, Any]:
    leaf = make_certificate("leaf", EAR_KEY).public_bytes(Encoding.DER)
    return {"x5c": [base64.b64encode(leaf).decode()]}


KIND = t.Kind(claims=_claims, key=EAR_KEY, forged=FORGED, algorithm="ES256", header=_header)


def negatives() -> Iterator[tuple[str, t.Run]]:
    """Yield each check with evidence that only it refuses."""
    yield from t.common(KIND)
    yield "debug", partial(KIND.run, {"dbgstat": "enabled"}, {})
    status = {"tdx": {"gcp_attester_tcb_status": "OutOfDate"}}
    yield "tcb.status", partial(KIND.run, status, {})
