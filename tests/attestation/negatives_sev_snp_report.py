"""SEV-SNP reports with one thing wrong each; see ``test_mutation.py`` for the form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import issuer_amd as amd

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats.snp_certs import GUID_VCEK, CertificateTable

STRUCTURAL = amd.STRUCTURAL


def judged(flaw: amd.Flaw, **options: Any) -> AttestationResult:
    made = flaw.build()
    values: dict[str, Any] = {
        "policy": amd.policy(**flaw.policy),
        "nonce": amd.NONCE,
        "endorsements": made.files,
        "roots": [made.root],
        "at": amd.AT,
    }
    values |= options
    nonce = options.get("made_for", amd.NONCE)
    values.pop("made_for", None)
    return appraise(flaw.signed(nonce.ljust(64, b"\0")), **values)


def with_table(tail: bytes) -> AttestationResult:
    return judged(amd.Flaw("table.format", edit=lambda data: data + tail))


def unpinned(flaw: amd.Flaw, roots: Callable[[], list[bytes]]) -> AttestationResult:
    return judged(flaw, roots=roots())


def others() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    good = amd.Flaw("")
    table = CertificateTable(((GUID_VCEK, b"x"),)).to_bytes()
    for tail in (b"\x01", table[:24], table[:-1], bytes(70_000)):
        yield "table.format", partial(with_table, tail)
    # ATT-02: the same names and no anchor; and an anchor of the same name with another key.
    yield "chain.root", partial(unpinned, good, list)
    yield "chain.root", partial(unpinned, good, lambda: [amd.make(ark=_other_key()).root])
    fresh: Mapping[str, Any] = {"freshness": "not_checked", "nonce": None}
    for nonce in (b"another nonce", amd.NONCE[:-1], amd.NONCE + b"\1", amd.NONCE.ljust(65, b"\0")):
        yield "nonce", partial(judged, good, nonce=nonce)
    for data in (bytes(64), amd.NONCE.ljust(63, b"\0") + b"\1"):
        yield "report_data", partial(judged, good, report_data=data, **fresh)
    yield "user_data", partial(judged, good, user_data=b"")
    for strange in ({"mrenclave": b"\x11" * 32}, {"mrtd": b"\x11" * 48}, {"pcrs": {4: b"1" * 32}}):
        yield "code.kind", partial(judged, good, policy=AppraisalPolicy(**strange))


def _other_key() -> dict[str, Any]:
    return {"key": amd.forger(), "signer": amd.forger()}


def negatives() -> Iterator[tuple[str, Callable[[], AttestationResult]]]:
    for flaw in amd.FLAWS:
        yield flaw.check, partial(judged, flaw)
    yield from others()
