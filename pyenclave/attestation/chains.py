"""Who signed whom in a chain, remembered: a fact about bytes, and the slow part of a chain."""

from __future__ import annotations

from pyenclave.attestation import pki
from pyenclave.attestation.cache import known
from pyenclave.attestation.checks import PASSED, Verdict
from pyenclave.formats import cbor
from pyenclave.formats.x509 import Certificate

__all__ = ["check_signatures"]


class _FailedError(Exception):
    """Carries a failure past the cache, which remembers what holds and nothing else."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict


def check_signatures(chain: tuple[Certificate, ...]) -> Verdict:
    """Judge as `pki.check_signatures` does, once for the same certificates in the same order."""

    def judge() -> Verdict:
        verdict = pki.check_signatures(chain)
        if verdict is not PASSED:
            raise _FailedError(verdict)
        return verdict

    # As a list, so that no other cut of the same bytes is taken for this chain.
    entry = known("chain", cbor.dumps([item.der for item in chain]), lambda _: chain)
    try:
        return entry.fact("signatures", judge)
    except _FailedError as failure:
        return failure.verdict
