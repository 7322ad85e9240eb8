"""Documents of collateral with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from issuer_intel import NOW, forged, machine, old, signing

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.testing.certificates import Key, pem

STRUCTURAL = {"document.format"}


def judged(
    data: bytes | None = None,
    *,
    chain: bytes | None = None,
    policy: AppraisalPolicy | None = None,
    **changes: Any,
) -> AttestationResult:
    m = machine()
    evidence = m.signed("tcbInfo", m.tcb_info()) if data is None else data
    nonce = changes.pop("nonce", None)
    return appraise(
        evidence,
        policy=policy or AppraisalPolicy.strict(),
        endorsements={
            "issuer-chain.pem": pem(m.tcb_signing) + pem(m.root_ca.der) if chain is None else chain
        },
        roots=[m.root],
        at=NOW,
        nonce=nonce,
        freshness="not_checked" if nonce is None else "required",
        **changes,
    )


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    m = machine()
    yield "document.format", lambda: judged(m.signed("tcbInfo", m.tcb_info(version=9)))
    yield "document.format", lambda: judged(m.signed("enclaveIdentity", m.qe_identity(version=9)))
    yield "chain", lambda: judged(chain=signing(not_after=NOW.replace(year=2025)))
    yield "signature", lambda: judged(forged("sgx", "tcbInfo", Key.ec())["tcb-info.json"])
    yield "validity", lambda: judged(m.signed("tcbInfo", m.tcb_info(**old("nextUpdate"))))
    yield "nonce", lambda: judged(nonce=bytes(32))
    yield "report_data", lambda: judged(report_data=bytes(64))
    yield "user_data", lambda: judged(user_data=b"")
    yield "code.kind", lambda: judged(policy=AppraisalPolicy(mrenclave=b"m" * 32))
