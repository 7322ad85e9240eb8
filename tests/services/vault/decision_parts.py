"""A release with everything right, for tests that change one thing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pyenclave.formats import jose
from pyenclave.formats.jwk import Jwk, Jwks, public_members
from pyenclave.formats.release_decision import Decision, decide

NOW = 1_800_000_000
AUTHORITY = "https://sharedeus.eus.attest.azure.net"
MRENCLAVE = "ab" * 32
MRSIGNER = "cd" * 32

POLICY: dict[str, Any] = {
    "version": "1.0.0",
    "anyOf": [
        {
            "authority": f"{AUTHORITY}/",
            "allOf": [
                {"claim": "x-ms-attestation-type", "equals": "sgx"},
                {"claim": "x-ms-sgx-is-debuggable", "equals": False},
                {"claim": "x-ms-sgx-mrsigner", "equals": MRSIGNER},
                {"claim": "x-ms-sgx-product-id", "equals": 7},
                {"claim": "x-ms-sgx-svn", "greaterOrEquals": 3},
                {"claim": "x-ms-runtime.nonce", "exists": True},
                {
                    "anyOf": [
                        {"claim": "x-ms-sgx-mrenclave", "equals": MRENCLAVE},
                        {"claim": "x-ms-sgx-mrenclave", "equals": "ef" * 32},
                    ]
                },
            ],
        }
    ],
}


@functools.cache
def transfer_members() -> dict[str, Any]:
    """The public key that an enclave made for the release."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return {**public_members(key.public_key()), "kid": "transfer", "key_ops": ["encrypt"]}


def claims_of(**changes: Any) -> dict[str, Any]:
    """What the authority says."""
    return {
        "iss": AUTHORITY,
        "iat": NOW - 10,
        "nbf": NOW - 10,
        "exp": NOW + 3600,
        "jti": "0123",
        "x-ms-ver": "1.0",
        "x-ms-attestation-type": "sgx",
        "x-ms-sgx-is-debuggable": False,
        "x-ms-sgx-mrenclave": MRENCLAVE,
        "x-ms-sgx-mrsigner": MRSIGNER,
        "x-ms-sgx-product-id": 7,
        "x-ms-sgx-svn": 3,
        "x-ms-runtime": {"keys": [transfer_members()], "nonce": "n"},
        **changes,
    }


@functools.cache
def signer() -> ec.EllipticCurvePrivateKey:
    """The authority's key."""
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def jwks() -> Jwks:
    """What the authority shows of it."""
    document = {"keys": [{"kid": "one", "use": "sig", **public_members(signer().public_key())}]}
    return Jwks.from_bytes(json.dumps(document).encode())


def signed(claims: dict[str, Any], **options: Any) -> str:
    """A token of the authority."""
    return jose.sign(claims, **{"key": signer(), "kid": "one", **options})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key's record, as far as it matters here."""

    enabled: bool = True
    not_before: int | None = None
    expires: int | None = None
    exportable: bool = True
    kty: str = "RSA-HSM"
    release_policy: bytes | None = json.dumps(POLICY).encode()


def judge(
    target: str | None = None,
    *,
    claims: dict[str, Any] | None = None,
    policy: Any = None,
    key: Key | None = None,
    find: Callable[[str, str | None], Jwk | None] | None = None,
    **options: Any,
) -> Decision:
    """Decide with everything right but what is given."""
    key = key or Key()
    if policy is not None:
        key = dataclasses.replace(key, release_policy=json.dumps(policy).encode())
    if target is None:
        target = signed(claims_of() if claims is None else claims)
    found = find or (lambda authority, kid: jwks().find(kid) if authority == AUTHORITY else None)
    return decide(key, target, find=found, **{"now": NOW, **options})


def refused(decision: Decision, name: str) -> None:
    """It is not released, for that reason and no other."""
    assert decision.transfer is None
    assert decision.failed is not None
    assert decision.failed.name == name, decision.failed
    assert decision.failed is decision.steps[-1]


def put(tree: Any, path: tuple[Any, ...], value: Any, *, drop: bool = False) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for name in path[:-1]:
        node = node[name]
    if drop:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


SILENT: dict[str, Any] = {
    "anyOf": [
        {"authority": AUTHORITY, "allOf": [{"claim": "x-ms-sgx-mrsigner", "equals": MRSIGNER}]}
    ]
}
