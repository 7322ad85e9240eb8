"""
Evidence of our own kind with one thing wrong each; see ``test_mutation.py`` for the form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from issuer_pyenclave import Issuer

from pyenclave.formats import dcap
from pyenclave.formats.sgx import Attributes

Make = Callable[[Any], dict[str, Any]]


@dataclass
class Refused:
    """Evidence with one thing wrong, judged by a policy that only that thing offends."""

    check: str
    make: Make = lambda i: {}  # changes of the evidence
    judge: Make = lambda i: {}  # changes of the appraisal
    edit: Callable[[bytes], bytes] = lambda data: data


def chain(**changes: Make) -> Make:
    return lambda i: {"chain": i.chain(**{place: make(i) for place, make in changes.items()})}


def body(**changes: Any) -> Make:
    return lambda i: {"body": changes}


def flags(value: int, xfrm: int = 3) -> Make:
    return body(attributes=Attributes(flags=value, xfrm=xfrm))


def policy(**changes: Any) -> Make:
    return lambda i: {"policy": i.policy(**changes)}


def constraints(place: str, *, ca: bool, length: int | None) -> Make:
    return chain(**{place: lambda i: {"constraints": x509.BasicConstraints(ca, length)}})


def usage(place: str, *, data: bool, certificates: bool) -> Make:
    wanted = {"sign_data": data, "sign_certificates": certificates}
    return chain(**{place: lambda i: {"usage": i.key_usage(**wanted)}})


def forged(place: str) -> Make:
    return chain(**{place: lambda i: {"signer": i.key("forger")}})


def other_root(issuer: Any) -> dict[str, Any]:
    """ATT-02: the same names, another key."""
    forger = issuer.key("forger")
    return {
        "chain": issuer.chain(
            root={"key": forger, "signer": forger}, intermediate={"signer": forger}
        )
    }


def padded_binding(issuer: Any) -> dict[str, Any]:
    """ATT-11: the right hash, and a byte behind it."""
    key = issuer.raw_public(issuer.key("attestation"))
    digest = hashlib.sha256(key + b"auth data of the quoting enclave").digest()
    return {"qe": {"report_data": digest + bytes(31) + b"\x01"}}


P384 = ec.SECP384R1()
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"")
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
CASES = [
    Refused("evidence.format", edit=lambda data: data + b"\0"),
    Refused("quote.format", lambda i: {"padding": b"\0"}),
    Refused("quote.format", lambda i: {"certification_type": dcap.CERTIFICATION_PCK_LEAF}),
    Refused("quote.vendor", lambda i: {"vendor": dcap.QE_VENDOR_INTEL}),
    Refused("chain.format", lambda i: {"pem": b"no certificates"}),
    Refused("chain.root", judge=lambda i: {"roots": []}),
    Refused("chain.root", other_root),
    Refused("chain.names", chain(leaf=lambda i: {"issuer": "somebody else"})),
    Refused("chain.names", chain(intermediate=lambda i: {"subject": "somebody else"})),
    Refused("chain.names", chain(root=lambda i: {"issuer": "somebody else"})),
    Refused(
        "chain.names",
        chain(leaf=lambda i: {"issuer": ""}, intermediate=lambda i: {"subject": ""}),
    ),
    Refused(
        "chain.algorithms",
        chain(
            intermediate=lambda i: {"key": i.key("p384", P384)},
            leaf=lambda i: {"signer": i.key("p384", P384)},
        ),
    ),
    Refused("chain.constraints", constraints("root", ca=True, length=0)),
    Refused("chain.constraints", constraints("leaf", ca=True, length=None)),
    Refused("chain.constraints", constraints("intermediate", ca=False, length=None)),
    Refused("chain.constraints", chain(intermediate=lambda i: {"constraints": None})),
    Refused("chain.constraints", chain(leaf=lambda i: {"constraints": None})),
    Refused("chain.constraints", chain(intermediate=lambda i: {"critical": False})),
    Refused("chain.constraints", chain(leaf=lambda i: {"extensions": [UNKNOWN]})),
    Refused("chain.key_usage", usage("leaf", data=True, certificates=True)),
    Refused("chain.key_usage", usage("leaf", data=False, certificates=False)),
    Refused("chain.key_usage", usage("root", data=True, certificates=False)),
    Refused("chain.key_usage", chain(intermediate=lambda i: {"usage": None})),
    Refused("chain.validity", judge=lambda i: {"at": i.START - SECOND}),
    Refused("chain.validity", judge=lambda i: {"at": i.END + SECOND}),
    Refused("chain.validity", chain(intermediate=lambda i: {"end": i.AT - DAY})),
    Refused("chain.validity", chain(leaf=lambda i: {"start": i.AT + DAY})),
    Refused("chain.signatures", forged("leaf")),
    Refused("chain.signatures", forged("intermediate")),
    Refused("chain.signatures", forged("root")),
    Refused("qe.signature", lambda i: {"qe_key": i.key("forger")}),
    Refused("qe.signature", lambda i: {"qe_key": i.key("attestation")}),
    Refused("qe.identity", lambda i: {"qe": {"mrenclave": bytes(32)}}),
    Refused("qe.identity", lambda i: {"qe": {"mrsigner": bytes(32)}}),
    Refused("qe.identity", lambda i: {"qe": {"attributes": Attributes(flags=0x7, xfrm=3)}}),
    Refused("qe.binding", lambda i: {"qe": {"report_data": bytes(64)}}),
    Refused("qe.binding", lambda i: {"quote": {"qe_auth_data": b"other auth data"}}),
    Refused("qe.binding", padded_binding),
    Refused("quote.signature", lambda i: {"quote_key": i.key("forger")}),
    Refused("quote.signature", lambda i: {"quote_key": i.key("leaf")}),
    Refused("quote.signature", lambda i: {"quote": {"qe_svn": 9}}),
    Refused("quote.signature", lambda i: {"quote": {"user_data": b"\x01" * 20}}),
    Refused("report.attributes", flags(0x4)),
    Refused("report.attributes", flags(0x1)),
    Refused("report.attributes", flags(0x15)),
    Refused("report.attributes", flags(0x5, xfrm=7)),
    Refused("report.attributes", body(misc_select=1)),
    Refused("report.attributes", body(config_svn=1)),
    Refused("report.attributes", body(isv_family_id=b"\x01" * 16)),
    Refused("report.attributes", body(isv_ext_prod_id=b"\x01" * 16)),
    Refused("report.attributes", body(cpu_svn=b"\x02\x00" + b"\x01" * 14)),
    Refused("record.format", lambda i: {"record_bytes": b"{}"}),
    Refused("record.signature", lambda i: {"record_key": i.key("forger")}),
    Refused("record.signature", lambda i: {"record_key": i.key("leaf")}),
    Refused("record.binding", body(config_id=bytes(64))),
    Refused("record.consistency", lambda i: {"record": {"platform_svn": 3}}),
    Refused("record.consistency", lambda i: {"record": {"debug": True}}),
    Refused(
        "record.consistency",
        lambda i: {"debug": True, "record": {"debug": False}},
        policy(allow_debug=True),
    ),
    Refused("record.tee", lambda i: {"record": {"tee": "sev-snp"}}),
    Refused("report_data.binding", body(report_data=bytes(64))),
    Refused("nonce", lambda i: {"nonce": b"another nonce"}),
    Refused("nonce", lambda i: {"nonce": i.NONCE[:-1]}),
    Refused("nonce", lambda i: {"nonce": i.NONCE + b"\0"}),
    Refused("nonce", lambda i: {"nonce": b""}),
    Refused("nonce", lambda i: {"raw": True}),
    Refused("report_data", judge=lambda i: {"report_data": bytes(64)}),
    Refused("user_data", judge=lambda i: {"user_data": b"user dat"}),
    Refused("user_data", judge=lambda i: {"user_data": b""}),
    Refused("user_data", lambda i: {"user_data": b""}, lambda i: {"user_data": b"x"}),
    Refused(
        "user_data",
        lambda i: {"raw": True},
        lambda i: {"user_data": b"", "freshness": "not_checked"},
    ),
    Refused("enclave.debug", lambda i: {"debug": True}),
    Refused("enclave.jit", lambda i: {"record": {"jit": True}}, policy(allow_jit=False)),
    Refused("platform.software", judge=policy(dangerous_allow_software=False)),
    Refused("platform.level", judge=policy(min_level="service")),
    Refused("platform.bits", judge=policy(required_bits=("mdwe",))),
    Refused("platform.bits", judge=policy(required_bits=("seccomp", "unheard_of"))),
    Refused("platform.svn", judge=policy(min_platform_svn=3)),
    Refused("code.mrenclave", body(mrenclave=b"\x12" * 32)),
    Refused("code.mrsigner", body(mrsigner=b"\x23" * 32)),
    Refused("code.mrsigner", body(mrsigner=bytes(32))),
    Refused("code.product_id", body(isv_prod_id=8)),
    Refused("code.security_version", body(isv_svn=2)),
]

# Forcing these to pass cannot make the evidence acceptable: without its bytes read there is
# nothing for the later checks, which then refuse as not reached.
STRUCTURAL = {"evidence.format", "quote.format", "chain.format", "record.format"}


def judged(case: Refused, issuer: Any) -> Any:
    evidence = case.edit(issuer.evidence(**case.make(issuer)))
    return issuer.appraise(evidence, **case.judge(issuer))


def negatives() -> Iterator[tuple[str, Callable[[], Any]]]:
    issuer = Issuer()
    for case in CASES:
        yield case.check, partial(judged, case, issuer)
