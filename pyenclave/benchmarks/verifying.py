"""
Rows ``verify_…`` and ``import_attestation``: judging evidence of synthetic chips.

``verify_sgx_quote`` and ``verify_tdx_quote`` have a new platform for each quote: its PCK
certificate and attestation key were never seen, the collateral was. The rows with ``_known`` judge
quotes of one platform. The peer is dcap-qvl where it is installed, which takes the collateral anew
with each quote; else the three P-256 verifications that a quote of a new platform cannot do
without, and nothing else. Everything is made beforehand, and both must accept. Sides take turns of
twenty items each, which side is first alternates, and of each turn the first two do not count: so
both sides see the same clock, the same noise and the same items, and each runs as it does for
somebody who verifies one quote after another, without what the other side left in the caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from time import perf_counter
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.attestation import AppraisalPolicy, Appraisers, Endorsements, appraise, cache
from pyenclave.benchmarks.rows import spread
from pyenclave.formats.dcap import read_quote
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.certificates import Key
from pyenclave.testing.intel import IntelPlatform

__all__ = [
    "import_attestation",
    "verify_batch",
    "verify_sgx_quote",
    "verify_sgx_quote_known",
    "verify_snp_report",
    "verify_tdx_quote",
    "verify_tdx_quote_known",
]

_NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
_QUOTES = 400
_TURN = 20
_WARM = 2  # at the start of each turn
_BATCH = 600
_BATCH_ROUNDS = 5
_IMPORTS = 7
_IMPORT_GOAL = 80.0  # ms
_POLICY = AppraisalPolicy.strict()

Judge = Callable[[bytes], bool]


def _quotes(platform: IntelPlatform, tee: str, *, known: bool, count: int) -> list[bytes]:
    """Return quotes, all different; of one platform if *known*, else each of a new one."""
    made: list[bytes] = []
    # A quoting enclave is certified once, and signs many quotes with that.
    certified: dict[str, Any] = {}
    for index in range(count):
        if not known:
            platform.key = Key.ec()
            platform.attestation_key = Key.ec()
            platform.pck = platform.make_pck({})
        make = platform.enclave_quote if tee == "sgx" else platform.td_quote
        made.append(make(report_data=index.to_bytes(64, "big"), quote=certified))
        if known and not certified:
            first = read_quote(made[0])
            certified = {"qe_report_signature": first.qe_report_signature}
    return made


def _ours(platform: IntelPlatform, files: dict[str, bytes]) -> Judge:
    given, roots = Endorsements.of(files), [platform.root]

    def judge(quote: bytes) -> bool:
        return appraise(
            quote,
            policy=_POLICY,
            freshness="not_checked",
            endorsements=given,
            roots=roots,
            at=_NOW,
        ).accepted

    return judge


def _signed_text(data: bytes, member: str) -> str:
    """Return one member of a signed document as its bytes were signed."""
    text = data.decode()
    start = text.index(f'"{member}":') + len(member) + 3
    return text[start : text.rindex(',"signature"')]


def _peer(platform: IntelPlatform, files: dict[str, bytes]) -> tuple[str, Judge]:
    """Return the peer's name and a call of it."""
    try:
        import dcap_qvl  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        return "three bare P-256 verifications", _bare()
    tcb, identity = files["tcb-info.json"], files["qe-identity.json"]
    collateral = dcap_qvl.QuoteCollateralV3(
        pck_crl_issuer_chain=files["pck-crl-issuer-chain.pem"].decode(),
        root_ca_crl=files["root-ca-crl.der"],
        pck_crl=files["pck-crl.der"],
        tcb_info_issuer_chain=files["tcb-info-issuer-chain.pem"].decode(),
        tcb_info=_signed_text(tcb, "tcbInfo"),
        tcb_info_signature=bytes.fromhex(json.loads(tcb)["signature"]),
        qe_identity_issuer_chain=files["qe-identity-issuer-chain.pem"].decode(),
        qe_identity=_signed_text(identity, "enclaveIdentity"),
        qe_identity_signature=bytes.fromhex(json.loads(identity)["signature"]),
    )
    root, now = platform.root_ca.der, int(_NOW.timestamp())

    def judge(quote: bytes) -> bool:
        return bool(dcap_qvl.verify_with_root_ca(quote, collateral, root, now).status == "UpToDate")

    return "dcap-qvl", judge


def _bare() -> Judge:
    key, algorithm = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256())
    public, data = key.public_key(), bytes(432)
    signature = key.sign(data, algorithm)

    def judge(_: bytes) -> bool:
        for _turn in range(3):
            public.verify(signature, data, algorithm)
        return True

    return judge


def _turn(name: str, items: list[bytes], judge: Judge) -> list[float]:
    """Judge *items* one after the other; seconds of each but the first ones."""
    taken: list[float] = []
    for item in items:
        start = perf_counter()
        accepted = judge(item)
        taken.append(perf_counter() - start)
        if not accepted:
            raise AssertionError(f"{name}: evidence that is genuine was refused")
    return taken[_WARM:]


def _measured(name: str, items: list[bytes], ours: Judge, peer: str, theirs: Judge) -> Any:
    """Return the row of two judges that take turns on *items*, by medians, in microseconds."""
    sides: tuple[tuple[Judge, list[float]], ...] = ((ours, []), (theirs, []))
    (_, own), (_, other) = sides
    for number, start in enumerate(range(0, len(items), _TURN)):
        for judge, taken in sides[:: -1 if number % 2 else 1]:
            found = _turn(name, items[start : start + _TURN], judge)
            if number:  # the first turn of each warms up
                taken.extend(found)
    return {
        "name": name,
        "value": median(own) * 1e6,
        "unit": "us",
        "peer": peer,
        "peer_value": median(other) * 1e6,
        "ratio": median(other) / median(own),
        **spread(own, other, scale=1e6),
    }


def _verify(name: str, tee: Any, *, known: bool) -> Any:
    cache.clear()
    platform = IntelPlatform(_NOW)
    files = platform.endorsements(tee)
    items = _quotes(platform, tee, known=known, count=_QUOTES)
    peer, theirs = _peer(platform, files)
    return _measured(name, items, _ours(platform, files), peer, theirs)


def verify_sgx_quote() -> dict[str, Any]:
    """Judge quotes of enclaves, each of a platform that was never seen; known collateral."""
    found: dict[str, Any] = _verify("verify_sgx_quote", "sgx", known=False)
    return found


def verify_sgx_quote_known() -> dict[str, Any]:
    """Judge different quotes of enclaves of one platform."""
    found: dict[str, Any] = _verify("verify_sgx_quote_known", "sgx", known=True)
    return found


def verify_tdx_quote() -> dict[str, Any]:
    """Judge quotes of TDs, each of a platform that was never seen; known collateral."""
    found: dict[str, Any] = _verify("verify_tdx_quote", "tdx", known=False)
    return found


def verify_tdx_quote_known() -> dict[str, Any]:
    """Judge different quotes of TDs of one platform."""
    found: dict[str, Any] = _verify("verify_tdx_quote_known", "tdx", known=True)
    return found


def verify_snp_report() -> dict[str, Any]:
    """Judge reports of one SEV-SNP chip against one bare P-384 verification each."""
    cache.clear()
    chip = AmdChip()
    given, roots = Endorsements.of(chip.endorsements()), [chip.root]
    reports = [chip.report(report_data=index.to_bytes(64, "big")) for index in range(_QUOTES)]
    algorithm = ec.ECDSA(hashes.SHA384())
    key = ec.generate_private_key(ec.SECP384R1())
    public, signature = key.public_key(), key.sign(reports[0][:0x2A0], algorithm)

    def ours(report: bytes) -> bool:
        return appraise(
            report,
            policy=_POLICY,
            freshness="not_checked",
            endorsements=given,
            roots=roots,
            at=_NOW,
        ).accepted

    def theirs(_: bytes) -> bool:
        public.verify(signature, reports[0][:0x2A0], algorithm)
        return True

    name = "one bare P-384 verification"
    found: dict[str, Any] = _measured("verify_snp_report", reports, ours, name, theirs)
    return found


def verify_batch() -> dict[str, Any]:
    """
    Judge a batch with a process for each core against the same in one process.

    The processes are started beforehand; quotes a second, by the fastest round of each side.
    """
    cache.clear()
    platform = IntelPlatform(_NOW)
    files = platform.endorsements()
    given: dict[str, Any] = {
        "policy": _POLICY,
        "freshness": "not_checked",
        "endorsements": files,
        "roots": [platform.root],
    }
    one = two = float("inf")
    with Appraisers(**given) as many, Appraisers(workers=1, **given) as single:
        warm = _quotes(platform, "sgx", known=False, count=20 * many.workers)
        many.appraise(warm, at=_NOW)
        single.appraise(warm, at=_NOW)
        for _ in range(_BATCH_ROUNDS):
            items = _quotes(platform, "sgx", known=False, count=_BATCH)
            start = perf_counter()
            alone = single.appraise(items, at=_NOW)
            middle = perf_counter()
            together = many.appraise(items, at=_NOW)
            end = perf_counter()
            if alone != together or not all(getattr(item, "accepted", False) for item in alone):
                raise AssertionError("verify_batch: the two batches came out differently")
            one, two = min(one, middle - start), min(two, end - middle)
        workers = many.workers
    return {
        "name": "verify_batch",
        "value": _BATCH / two,
        "unit": "quotes/s",
        "peer": f"one process, against {workers}",
        "peer_value": _BATCH / one,
        "ratio": one / two,
    }


def import_attestation() -> dict[str, Any]:
    """
    Import ``pyenclave.attestation`` in new interpreters, against the goal of 80 ms.

    Its bytecode is compiled beforehand, as it is in every installation, also where the
    environment forbids to write it. The fastest counts: against a goal in milliseconds, what
    others do on the machine only adds.
    """
    code = (
        "from time import perf_counter as t; a = t(); import pyenclave.attestation; "
        "print((t() - a) * 1e3)"
    )
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONPYCACHEPREFIX": folder,
        }
        for _ in range(_IMPORTS + 1):
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            taken.append(float(done.stdout))
    del taken[0]  # that one compiled
    return {
        "name": "import_attestation",
        "value": min(taken),
        "unit": "ms",
        "peer": "the goal",
        "peer_value": _IMPORT_GOAL,
        "ratio": _IMPORT_GOAL / min(taken),
    }
