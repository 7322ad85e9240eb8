"""Tokens of Azure Attestation with one thing wrong each; see ``test_mutation.py``."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import partial

import token_negatives as t
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_token import GONE, MRENCLAVE, maa_claims, make_certificate

from pyenclave.attestation import AppraisalPolicy

STRUCTURAL = t.STRUCTURAL
REDUNDANT = {
    **t.REDUNDANT,
    "token.claims": "detection reads the claims first and refuses what is no object",
}
KIND = t.Kind(claims=maa_claims, key=t.rsa_key(0), forged=t.rsa_key(1), algorithm="RS256")
_TEE = {
    "x-ms-attestation-type": "azurevm",
    "x-ms-isolation-tee": {"x-ms-attestation-type": "sevsnpvm", "x-ms-compliance-status": "no"},
}


def _keys() -> dict[str, bytes]:
    leaf = make_certificate("https://other.eus.attest.azure.net", KIND.key)
    x5c = [base64.b64encode(leaf.public_bytes(Encoding.DER)).decode()]
    keys = {"keys": [{"kid": "one", "kty": "RSA", "x5c": x5c}]}
    return {"jwks.json": json.dumps(keys).encode()}


def negatives() -> Iterator[tuple[str, t.Run]]:
    """Yield each check with evidence that only it refuses."""
    yield from t.common(KIND)
    for check, changes in (
        ("token.issuer", {"iss": "https://evil.example/.attest.azure.net"}),
        ("token.type", {"x-ms-attestation-type": GONE}),
        ("token.type", {"x-ms-attestation-type": 5}),
        ("platform.software", {"x-ms-attestation-type": "tpm"}),
        ("platform.software", {"x-ms-attestation-type": "azurevm"}),
        ("compliance", _TEE),
        ("debug", {"x-ms-sgx-is-debuggable": "false"}),
        ("tcb.status", {"attester_tcb_status": "OutOfDate"}),
    ):
        yield check, partial(KIND.run, changes, {})
    yield "key.issuer", partial(KIND.run, {}, {"endorsements": _keys()})
    signer = {"x-ms-sgx-mrsigner": "22" * 32}
    policy = AppraisalPolicy(mrsigner=b"\x33" * 32, product_id=1)
    yield "code.mrsigner", partial(KIND.run, signer, {"policy": policy})
    product = AppraisalPolicy(mrenclave=MRENCLAVE, product_id=2)
    yield "code.product_id", partial(KIND.run, {}, {"policy": product})
