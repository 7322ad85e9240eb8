"""Tokens of every kind with one thing wrong each, for the ``negatives_…_jwt.py``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_token import AT, NOW, judge, keys_of, make_certificate, token

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.attestation.policy import REFERENCES

Run = Callable[[], AttestationResult]

STRUCTURAL = ("token.format", "token.claims", "keys.format")
REDUNDANT = {
    "key.trust": "without a key that is trusted token.signature refuses too; this says why",
    "token.algorithm": "token.signature allows the same algorithms only; this says which",
}
UNTOLD = {
    "code.mrsigner": "it needs product_id or mrenclave, which such a token does not tell either",
}


@cache
def rsa_key(index: int) -> rsa.RSAPrivateKey:
    """Return a key; *index* tells them apart."""
    return rsa.generate_private_key(65537, 2048)


@dataclass(frozen=True)
class Kind:
    """
    How to make tokens of a kind.

    Attributes:
        claims: Makes the claims of an acceptable token; changes by name.
        key: The issuer's key.
        forged: Another key of the same kind.
        algorithm: What it is signed with.
        header: Further parameters.
    """

    claims: Callable[..., dict[str, Any]]
    key: Any
    forged: Any
    algorithm: str
    header: Callable[[], dict[str, Any]] = dict

    def run(self, changes: dict[str, Any], options: dict[str, Any]) -> AttestationResult:
        """Judge a token whose key is given."""
        header = {"algorithm": self.algorithm, **self.header(), **options.get("header", {})}
        key = options.get("key", self.key)
        taken = ("header", "key", "edit")
        rest = {name: item for name, item in options.items() if name not in taken}
        rest.setdefault("endorsements", keys_of(self.key))
        data = token(self.claims(**changes), key, **header)
        return judge(
            options.get("edit", bytes)(data), **{n: v for n, v in rest.items() if n != "edit"}
        )

    def run_chain(
        self, certificates: Callable[[Kind], tuple[list[Any], list[Any]]]
    ) -> AttestationResult:
        """Judge a token that is believed for its certificates; the second list is pinned."""
        chain, roots = certificates(self)
        encoded = [base64.b64encode(c.public_bytes(Encoding.DER)).decode() for c in chain]
        header = {"algorithm": self.algorithm, **self.header(), "x5c": encoded}
        data = token(self.claims(), self.key, kid=None, **header)
        pinned = [root.public_bytes(Encoding.DER) for root in roots]
        return judge(data, endorsements={}, roots=pinned)


ROOT = ec.derive_private_key(21, ec.SECP256R1())
STRANGER = ec.derive_private_key(22, ec.SECP256R1())
ODD = ec.derive_private_key(23, ec.SECP256K1())


def _two(root: dict[str, Any], leaf: dict[str, Any]) -> Callable[[Kind], Any]:
    def make(kind: Kind) -> tuple[list[Any], list[Any]]:
        key = root.get("key", ROOT)
        options = {name: item for name, item in root.items() if name != "key"}
        above = make_certificate("root", key, **({"ca": True} | options))
        below = make_certificate("leaf", kind.key, **({"issuer": "root", "signer": key} | leaf))
        return [below, above], [above]

    return make


def _other_root(kind: Kind) -> tuple[list[Any], list[Any]]:
    chain, _ = _two({}, {})(kind)
    return chain, [make_certificate("another root", STRANGER, ca=True)]


def _long(kind: Kind) -> tuple[list[Any], list[Any]]:
    keys = [ec.derive_private_key(30 + index, ec.SECP256R1()) for index in range(6)]
    chain = [make_certificate("ca 5", keys[5], ca=True)]
    for index in range(4, -1, -1):
        above = f"ca {index + 1}"
        chain.insert(
            0,
            make_certificate(
                f"ca {index}", keys[index], issuer=above, signer=keys[index + 1], ca=True
            ),
        )
    chain.insert(0, make_certificate("leaf", kind.key, issuer="ca 0", signer=keys[0]))
    return chain, chain[-1:]


CHAINS: dict[str, Callable[[Kind], Any]] = {
    "chain.format": _long,
    "chain.root": _other_root,
    "chain.names": _two({}, {"issuer": "somebody"}),
    "chain.algorithms": _two({"key": ODD}, {}),
    "chain.constraints": _two({"ca": False, "signs": True}, {}),
    "chain.key_usage": _two({"signs": False}, {}),
    "chain.validity": _two({}, {"end": AT - timedelta(seconds=1)}),
    "chain.signatures": _two({}, {"signer": STRANGER}),
}

_VALUES = {name: b"\x5a" * sizes[0] for name, (sizes, _) in REFERENCES.items()}
_IDENTITIES = ("mrenclave", "mrtd", "launch_digest", "id_key_digest", "author_key_digest", "rim")


def _policy(**fields: Any) -> AppraisalPolicy:
    named = {*_IDENTITIES, "pcrs", "gpu_measurements", "claims"} & fields.keys()
    return AppraisalPolicy(**fields) if named else AppraisalPolicy.any_code(**fields)


def common(kind: Kind) -> Iterator[tuple[str, Run]]:
    """Yield what every kind of token has."""

    def wrong(check: str, changes: dict[str, Any] | None = None, **options: Any) -> Any:
        return check, partial(kind.run, changes or {}, options)

    yield wrong("token.format", edit=lambda data: data + b"=")
    yield wrong("keys.format", endorsements={"jwks.json": b"{}"})
    yield wrong("token.signature", key=kind.forged)
    yield wrong("token.times", {"exp": NOW - 100, "nbf": NOW - 200, "iat": NOW - 200})
    yield wrong("issuer", policy=_policy(issuers=("https://other",)))
    yield wrong("audience", policy=_policy(audience="me"))
    yield wrong("nonce", nonce=b"another nonce")
    yield wrong("report_data", report_data=bytes(64))
    yield wrong("user_data", user_data=b"x")
    yield wrong("token.age", policy=_policy(max_age=1))
    yield wrong("code.claims", policy=_policy(claims={"some.claim": 1}))
    for name in (
        "product_id",
        "min_security_version",
        "min_config_svn",
        "min_guest_svn",
        "max_vmpl",
    ):
        yield wrong(f"code.{name}", policy=_policy(**{name: 4 if name != "max_vmpl" else 0}))
    for name in ("rtmrs", "pcrs", "rems", "gpu_measurements"):
        yield wrong(f"code.{name}", policy=_policy(**{name: {0: b"\x5a" * 48}}))
    for name, value in _VALUES.items():
        if name != "mrsigner":
            yield wrong(f"code.{name}", policy=_policy(**{name: value}))
    for check, certificates in CHAINS.items():
        yield check, partial(kind.run_chain, certificates)
