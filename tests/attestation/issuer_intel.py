"""
A synthetic Intel platform, and evidence of it with one thing wrong each.

`shared` gives what quotes of enclaves and TDs have in common; the form is ``test_mutation.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Literal

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats.x509 import Certificate
from pyenclave.testing.certificates import Key, certificate, pem
from pyenclave.testing.certificates import name as dn
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
Tee = Literal["sgx", "tdx"]


@cache
def machine(**changes: Any) -> IntelPlatform:
    return IntelPlatform(NOW, **changes)


def other_pck(**fields: Any) -> IntelPlatform:
    """A copy of the machine whose PCK certificate differs."""
    made = object.__new__(IntelPlatform)
    made.__dict__.update(machine().__dict__)
    changes = fields.pop("changes", {})
    made.pck = made.make_pck(changes, **fields)
    return made


def with_ca(**fields: Any) -> IntelPlatform:
    """A copy of the machine whose PCK authority has another certificate for the same key."""
    made = object.__new__(IntelPlatform)
    made.__dict__.update(machine().__dict__)
    values: dict[str, Any] = {
        "subject": made.pck_ca.subject,
        "issuer": made.root_ca.subject,
        "key": made.pck_ca.key,
        "signer": made.root_ca.key,
        "ca": True,
        "path_length": 0,
        "usages": ("keyCertSign", "cRLSign"),
    }
    made.pck_ca = replace(made.pck_ca, der=certificate(**(values | fields)))
    return made


@dataclass
class Given:
    """What is appraised; every part can be replaced."""

    tee: Tee = "sgx"
    platform: IntelPlatform = field(default_factory=machine)
    quote: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[bytes], bytes] = lambda data: data
    extra: dict[str, bytes] = field(default_factory=dict)
    policy: AppraisalPolicy | None = None
    roots: bool = True
    at: datetime = NOW
    nonce: bytes | None = None
    report_data: bytes | None = None
    user_data: bytes | None = None

    def evidence(self) -> bytes:
        make = self.platform.enclave_quote if self.tee == "sgx" else self.platform.td_quote
        return self.edit(make(**self.quote))

    def run(self) -> AttestationResult:
        return appraise(
            self.evidence(),
            policy=self.policy or AppraisalPolicy.strict(),
            endorsements=self.platform.endorsements(self.tee, **self.files) | self.extra,
            roots=[self.platform.root] if self.roots else [],
            at=self.at,
            nonce=self.nonce,
            freshness="not_checked" if self.nonce is None else "required",
            report_data=self.report_data,
            user_data=self.user_data,
        )


ALL = (
    "tcb-info.json",
    "tcb-info-issuer-chain.pem",
    "qe-identity.json",
    "qe-identity-issuer-chain.pem",
    "pck-crl.der",
    "pck-crl-issuer-chain.pem",
    "root-ca-crl.der",
)
PERMISSIVE = AppraisalPolicy.permissive()


def named(common: str) -> bytes:
    return dn(CN=common, O="Intel Corporation", L="Santa Clara", ST="CA", C="US")


def signing(**changes: Any) -> bytes:
    """The chain of a signer of documents whose certificate differs."""
    m = machine()
    return pem(m.make_tcb_signing(**changes)) + pem(m.root_ca.der)


def serial_of(data: bytes) -> int:
    return Certificate.from_der(data).serial


def level_of(tee: Tee, **changes: Any) -> dict[str, Any]:
    m = machine()
    if tee == "tdx":
        changes.setdefault("td_components", (4, 1, 2, *bytes(13)))
    return {"tcbLevels": [m.tcb_level(**changes)]}


def qe_level(status: str = "UpToDate", svn: int = 8) -> dict[str, Any]:
    date = "2024-03-13T00:00:00Z"
    return {"tcbLevels": [{"tcb": {"isvsvn": svn}, "tcbDate": date, "tcbStatus": status}]}


def old(what: str) -> dict[str, str]:
    return {what: "2026-06-01T00:00:00Z"}


def shared(tee: Tee) -> Iterator[tuple[str, Callable[[], Given]]]:
    """Yield check and evidence for every check that both kinds have."""

    def given(**changes: Any) -> Given:
        return Given(tee=tee, **changes)

    def quoted(**changes: Any) -> Given:
        return given(quote={"quote": changes})

    def pck(**changes: Any) -> Given:
        return given(platform=other_pck(**changes))

    def files(**changes: Any) -> Given:
        return given(files=changes)

    def info(**changes: Any) -> Given:
        return files(tcb_info=changes)

    def identity(**changes: Any) -> Given:
        return files(qe_identity=changes)

    def ask(**changes: Any) -> Given:
        return given(policy=AppraisalPolicy.any_code(**changes))

    m = machine()
    forger = Key.ec()
    yield "quote.format", lambda: given(edit=lambda data: data + b"\1")
    yield "quote.vendor", lambda: quoted(qe_vendor_id=b"v" * 16)
    yield "chain.format", lambda: quoted(certification_data=b"no certificates")
    yield "chain.format", lambda: quoted(certification_type=2, certification_data=bytes(276))
    yield "chain.root", lambda: given(roots=False, files={"leave_out": ALL}, policy=PERMISSIVE)
    yield "chain.roles", lambda: pck(subject=named("Intel SGX TCB Signing"))
    yield "chain.names", lambda: pck(issuer=named("Intel SGX PCK Processor CA"))
    yield "chain.algorithms", lambda: pck(algorithm="ecdsa-sha384")
    yield "chain.constraints", lambda: pck(ca=True)
    yield "chain.constraints", lambda: pck(ca=None)
    yield "chain.constraints", lambda: given(platform=with_ca(ca=False, path_length=None))
    yield "chain.key_usage", lambda: pck(usages=("keyEncipherment",))
    yield "chain.key_usage", lambda: given(platform=with_ca(usages=("cRLSign",)))
    yield "chain.validity", lambda: pck(not_after=NOW - DAY)
    yield "chain.validity", lambda: pck(not_before=NOW + DAY)
    yield "chain.signatures", lambda: pck(signer=forger, key_ids=False)
    yield (
        "pck.format",
        lambda: given(
            platform=other_pck(changes={"2.3": None}), files={"leave_out": ALL}, policy=PERMISSIVE
        ),
    )
    yield (
        "pck.platform",
        lambda: given(
            quote={"quote": {"certification_type": 1, "certification_data": b"p" * 16 + bytes(20)}},
            extra={"pck-chain.pem": m.pck_chain},
        ),
    )
    yield (
        "pck.platform",
        lambda: given(
            quote={"quote": {"certification_type": 3, "certification_data": b"\1" * 404}},
            extra={"pck-chain.pem": m.pck_chain},
        ),
    )
    yield "qe.signature", lambda: quoted(qe_report_signature=m.key.sign_raw(b"something else"))
    yield "qe.binding", lambda: given(quote={"qe": {"report_data": bytes(64)}})
    yield (
        "qe.origin",
        lambda: given(
            quote={"qe": {"mrsigner": b"s" * 32}}, files={"leave_out": ALL}, policy=PERMISSIVE
        ),
    )
    yield "quote.signature", lambda: quoted(signature=m.attestation_key.sign_raw(b"else"))
    yield "crl.root", lambda: files(root_ca_crl=m.root_crl(signer=forger, key_id=False, number=1))
    yield "crl.root", lambda: files(root_ca_crl=m.root_crl(number=None))
    yield "crl.root.validity", lambda: files(root_ca_crl=m.root_crl(next_update=NOW - DAY / 2))
    yield "crl.root.validity", lambda: files(root_ca_crl=m.root_crl(this_update=NOW + DAY))
    yield "crl.pck", lambda: files(pck_crl=m.pck_crl(issuer=m.root_ca.subject))
    yield "crl.pck.validity", lambda: files(pck_crl=m.pck_crl(next_update=NOW - DAY / 2))
    yield "crl.pck.validity", lambda: files(pck_crl=m.pck_crl(next_update=None))
    yield (
        "crl.chain",
        lambda: files(
            pck_crl_issuer_chain=pem(m.root_ca.issue(m.pck_ca.subject, Key.ec()).der)
            + pem(m.root_ca.der)
        ),
    )
    yield "crl.chain", lambda: files(pck_crl_issuer_chain=pem(m.root_ca.der))
    yield "crl.chain", lambda: files(pck_crl_issuer_chain=b"none")
    yield "revocation.pck", lambda: files(pck_crl=m.pck_crl(revoked=(serial_of(m.pck),)))
    for revoked in (m.pck_ca.der, m.tcb_signing):
        number = serial_of(revoked)
        yield "revocation.ca", lambda n=number: files(root_ca_crl=m.root_crl(revoked=(n,)))
    yield "tcb.format", lambda: info(version=4)
    yield "tcb.chain", lambda: files(tcb_info_issuer_chain=signing(not_after=NOW - DAY))
    yield "tcb.chain", lambda: files(tcb_info_issuer_chain=signing(subject=named("Intel SGX PCK")))
    yield "tcb.signature", lambda: given(extra=forged(tee, "tcbInfo", forger))
    yield "tcb.validity", lambda: info(**old("nextUpdate"))
    yield "tcb.validity", lambda: info(issueDate="2026-07-02T00:00:00Z")
    yield "tcb.fmspc", lambda: info(fmspc="00a06f000001")
    yield "tcb.pce_id", lambda: info(pceId="0001")
    yield "tcb.level", lambda: info(**level_of(tee, pce_svn=14))
    yield "tcb.level", lambda: info(**level_of(tee, components=(7, *m.components[1:])))
    yield "tcb.level", lambda: info(**level_of(tee, status="Splendid"))
    yield "tcb.revoked", lambda: info(**level_of(tee, status="Revoked"))
    yield "qe.identity.format", lambda: identity(version=1)
    yield "qe.identity.chain", lambda: files(qe_identity_issuer_chain=signing(ca=True))
    yield "qe.identity.chain", lambda: files(qe_identity_issuer_chain=b"x")
    yield "qe.identity.signature", lambda: given(extra=forged(tee, "enclaveIdentity", forger))
    yield "qe.identity.validity", lambda: identity(**old("nextUpdate"))
    yield "qe.identity.tee", lambda: identity(id="QVE")
    yield "qe.identity", lambda: identity(mrsigner="00" * 32)
    yield "qe.identity", lambda: identity(isvprodid=9)
    yield "qe.identity", lambda: identity(attributes="15" + "00" * 15)
    yield "qe.identity", lambda: identity(miscselect="01000000")
    yield "qe.level", lambda: identity(**qe_level(svn=9))
    yield "qe.level", lambda: identity(**qe_level("Revoked"))
    # ---- policy
    yield "nonce", lambda: given(nonce=b"n" * 32)
    yield "report_data", lambda: given(report_data=b"r" * 64)
    yield "user_data", lambda: given(user_data=b"u")
    for name in ("tcb-info.json", "qe-identity.json", "pck-crl.der", "root-ca-crl.der"):
        yield "collateral.complete", lambda n=name: files(leave_out=(n,))
    yield "tcb.evaluation", lambda: ask(min_tcb_evaluation_number=18)
    yield "tcb.status", lambda: info(**level_of(tee, status="OutOfDate", advisories=("SA-1",)))
    yield (
        "tcb.status",
        lambda: given(
            policy=AppraisalPolicy.any_code(
                tcb_statuses=("SWHardeningNeeded",), accepted_advisories=("SA-1",)
            ),
            files={"tcb_info": level_of(tee, status="SWHardeningNeeded", advisories=("SA-2",))},
        ),
    )
    yield "tcb.status", lambda: identity(**qe_level("OutOfDate"))


def forged(tee: Tee, member: str, key: Key) -> dict[str, bytes]:
    """A document signed by somebody else."""
    m = machine()
    if member == "tcbInfo":
        return {"tcb-info.json": m.signed(member, m.tcb_info(tee), key=key)}
    return {"qe-identity.json": m.signed(member, m.qe_identity(tee), key=key)}


#: Checks of the shared ones without which the later ones have nothing to judge.
STRUCTURAL = {"quote.format", "chain.format", "tcb.format", "qe.identity.format"}
