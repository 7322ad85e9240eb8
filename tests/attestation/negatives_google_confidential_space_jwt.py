"""Tokens of Confidential Space with one thing wrong each; see ``test_mutation.py``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import token_negatives as t
from issuer_token import NONCE, NOW

STRUCTURAL = t.STRUCTURAL
REDUNDANT = {
    **t.REDUNDANT,
    **t.UNTOLD,
    "token.claims": "detection reads the claims first and refuses what is no object",
    "code.container_image": "code.claims compares the same claim; this makes it an identity",
}


def _claims(**changes: Any) -> dict[str, Any]:
    return {
        "iss": "https://confidentialcomputing.googleapis.com",
        "eat_profile": "https://cloud.google.com/confidential-computing/x",
        "iat": NOW - 10,
        "nbf": NOW - 10,
        "exp": NOW + 300,
        "eat_nonce": NONCE.hex(),
        "secboot": True,
        "dbgstat": "disabled-since-boot",
        "submods": {"container": {"image_digest": "sha256:1"}},
    } | changes


KIND = t.Kind(claims=_claims, key=t.rsa_key(0), forged=t.rsa_key(1), algorithm="RS256")


def negatives() -> Iterator[tuple[str, t.Run]]:
    """Yield each check with evidence that only it refuses."""
    yield from t.common(KIND)
    for check, changes in (
        ("token.issuer", {"iss": "https://somebody"}),
        ("platform.software", {"hwmodel": "GCP_SHIELDED_VM"}),
        ("secure_boot", {"secboot": "true"}),
        ("debug", {"dbgstat": "enabled"}),
        ("tcb.status", {"tdx": {"gcp_attester_tcb_status": "OutOfDate"}}),
    ):
        yield check, partial(KIND.run, changes, {})
