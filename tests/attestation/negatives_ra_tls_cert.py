"""RA-TLS certificates with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from issuer_ratls import (
    DICE,
    GONE,
    NOW,
    OTHER,
    claims_of,
    extension,
    judge,
    made,
    report_data,
)

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.formats import cbor
from pyenclave.formats.cbor import Tag

STRUCTURAL = ("certificate.format", "certificate.quote")
REDUNDANT = {
    "certificate.form": "it says that a form is legacy and never refuses",
}


def _dice(value: bytes, **changes: Any) -> bytes:
    return made((DICE, value), **changes)


def _run(make: Callable[[], bytes], options: dict[str, Any]) -> AttestationResult:
    return judge(make(), **options)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    """Yield each check with evidence that only it refuses."""

    def wrong(check: str, value: Callable[[], bytes] = extension, **changes: Any) -> Any:
        names = ("nonce", "report_data", "user_data", "roots", "policy", "td", "endorsements")
        options = {name: changes.pop(name) for name in names if name in changes}
        return check, partial(_run, lambda: _dice(value(), **changes), options)

    yield wrong("certificate.format", lambda: extension() + b"\0")
    yield wrong("certificate.quote", lambda: cbor.dumps(Tag(60000, [bytes(600), claims_of()])))
    yield wrong("certificate.signature", signer=OTHER)
    yield wrong("certificate.validity", not_after=NOW - timedelta(seconds=1))
    yield (
        "certificate.extensions",
        partial(_run, lambda: made((DICE, extension()), ("1.2.3", True, b"")), {}),
    )
    yield wrong("binding.claims", lambda: extension(quoted=report_data(b"other")))
    yield wrong("binding.key", key=OTHER, signer=OTHER)
    yield wrong("binding.key", lambda: extension(claims_of(pubkey_hash=GONE)))
    yield wrong("nonce", nonce=b"another nonce")
    yield wrong("report_data", report_data=bytes(64))
    yield wrong("user_data", user_data=b"x")
    yield wrong("sgx.chain.root", roots=[], endorsements={})
    yield wrong("sgx.code.mrenclave", policy=AppraisalPolicy(mrenclave=b"\x22" * 32))
    other = AppraisalPolicy(mrtd=b"\x22" * 48)
    yield wrong("tdx.code.mrtd", lambda: extension(td=True), td=True, policy=other)
