"""Certificates of endorsement keys with one thing wrong each; see ``test_mutation.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import issuer_amd as amd

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.attestation.verify_vek import CHECKS

# The certificate is the evidence: without it there is none.
STRUCTURAL = {"chain.format", "vek.format"}
_CHAIN = {name for name in CHECKS.functions if CHECKS.parts[name] == "evidence"}


def judged(flaw: amd.Flaw, **options: Any) -> AttestationResult:
    made = flaw.build()
    files = {name: data for name, data in made.files.items() if name != "vek.der"}
    values: dict[str, Any] = {
        "policy": AppraisalPolicy.strict(),
        "freshness": "not_checked",
        "endorsements": files,
        "roots": [made.root],
        "at": amd.AT,
    }
    return appraise(made.files["vek.der"], **(values | options))


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    good = amd.Flaw("")
    for flaw in amd.FLAWS:
        if flaw.check in _CHAIN and flaw.check != "chain.format":
            yield flaw.check, partial(judged, flaw)
    broken = amd.maker(files={"ask.pem": b"\x30\x00"})
    yield "chain.format", partial(judged, amd.Flaw("chain.format", broken))
    yield "chain.root", partial(judged, good, roots=[])
    yield "nonce", partial(judged, good, nonce=amd.NONCE, freshness="required")
    yield "report_data", partial(judged, good, report_data=bytes(64))
    yield "user_data", partial(judged, good, user_data=b"x")
    yield "code.identity", partial(judged, good, policy=amd.policy())
