"""Attested key sets with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from issuer_ratls import KEY, NOW, OTHER, attested, judge, judge_keys, key_set, made

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.formats import ratls
from pyenclave.testing.intel import IntelPlatform

STRUCTURAL = ("keys.format",)


def _stranger() -> bytes:
    """Return a certificate whose quote is of another platform, under another root."""
    text = ratls.key_forms(KEY.spki)["pem+nul"]
    data = hashlib.sha256(text).digest() + bytes(32)
    return made((ratls.OIDS_OPEN_ENCLAVE[0], IntelPlatform(NOW).enclave_quote(report_data=data)))


def _run(make: Callable[[], bytes], options: dict[str, Any]) -> AttestationResult:
    return judge_keys(make(), **options)


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    """Yield each check with evidence that only it refuses."""

    def wrong(check: str, make: Callable[[], bytes], **options: Any) -> Any:
        return check, partial(_run, make, options)

    def good() -> bytes:
        return key_set(attested())

    kid = base64.b64encode(bytes(32)).decode()
    yield wrong("keys.format", lambda: key_set(attested(), made(), kid="one"))
    yield wrong("keys.attested", lambda: key_set(attested(), _stranger()))
    other_code = {"mrenclave": b"\x33" * 32}
    yield wrong("keys.policy", lambda: key_set(attested(), attested(body=other_code)))
    yield wrong("certificate.signature", lambda: key_set(attested(signer=OTHER)))
    ended = NOW - timedelta(seconds=1)
    yield wrong("certificate.validity", lambda: key_set(attested(not_after=ended)))
    yield wrong("binding.key", lambda: key_set(attested(key=OTHER, signer=OTHER)))
    yield wrong("key.name", lambda: key_set(attested(), kid=kid))
    yield "nonce", partial(judge, good(), nonce=b"any nonce")
    yield wrong("report_data", good, report_data=bytes(64))
    yield wrong("user_data", good, user_data=b"x")
    yield wrong("quote.chain.root", good, roots=[], endorsements={})
    other = AppraisalPolicy(mrenclave=b"\x22" * 32)
    yield wrong("quote.code.mrenclave", good, policy=other)
