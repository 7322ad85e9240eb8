"""Synthetic Azure confidential VMs with flaws, whatever hardware is below."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from issuer_amd import AT, DAY, NONCE

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import der, tpm
from pyenclave.formats.tpm import PcrSelection, TpmSignature
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.certificates import Authority, Key, certificate, name, pem

AK_USAGE = ("2.5.29.37", False, der.encode_sequence(der.encode_oid("2.23.133.8.3")))
USER_DATA = bytes(range(64))


@cache
def authorities() -> tuple[Authority, Authority]:
    root = Authority.root(
        name(CN="Azure Virtual TPM Root"), Key.rsa(2048, index=20), algorithm="rsa-pkcs1-sha256"
    )
    below = root.issue(
        name(CN="Global Virtual TPM CA"), Key.rsa(2048, index=21), algorithm="rsa-pkcs1-sha256"
    )
    return root, below


def vtpm_root() -> bytes:
    return authorities()[0].der


def ak_certificate(**changes: Any) -> bytes:
    """Return the AK's certificate with its issuer, PEM."""
    root, below = authorities()
    fields: dict[str, Any] = {
        "subject": name(CN="vm.example"),
        "issuer": below.subject,
        "key": Key.rsa(2048, index=7),
        "signer": below.key,
        "algorithm": "rsa-pkcs1-sha256",
        "usages": ("digitalSignature",),
        "extensions": [AK_USAGE],
    }
    leaf = certificate(**(fields | changes))
    del root
    return pem(leaf) + pem(below.der)


def intermediate(**changes: Any) -> bytes:
    """Return the AK's certificate below an issuer with a flaw, PEM."""
    root, below = authorities()
    fields: dict[str, Any] = {
        "subject": below.subject,
        "issuer": root.subject,
        "key": below.key,
        "signer": root.key,
        "algorithm": "rsa-pkcs1-sha256",
        "ca": True,
        "usages": ("keyCertSign",),
    }
    leaf, _, rest = ak_certificate().partition(b"-----END CERTIFICATE-----\n")
    del rest
    return leaf + b"-----END CERTIFICATE-----\n" + pem(certificate(**(fields | changes)))


@dataclass
class Flaw:
    """A VM with one thing wrong around a good hardware report."""

    check: str
    hcl: Mapping[str, Any] = field(default_factory=dict)  # arguments of hcl_report
    runtime: Mapping[str, Any] | None = None  # members of the runtime claims
    quote: Mapping[str, Any] = field(default_factory=dict)  # arguments of endorsements
    files: Callable[[Mapping[str, bytes]], Mapping[str, bytes | None]] = lambda files: {}
    edit: Callable[[bytes], bytes] = lambda data: data  # of the HCL report
    nonce: bytes = NONCE


def machine(hardware: Callable[[bytes], bytes], **fields: Any) -> AzureVm:
    return AzureVm(hardware=hardware, user_data=USER_DATA, **fields)


def appraised(
    flaw: Flaw,
    hardware: Callable[[bytes], bytes],
    *,
    files: Mapping[str, bytes],
    vm: Mapping[str, Any] | None = None,
    **options: Any,
) -> AttestationResult:
    virtual = machine(hardware, **(vm or {}))
    claims = dict(flaw.hcl)
    if flaw.runtime is not None:
        claims["runtime_data"] = virtual.runtime_data(**flaw.runtime)
    evidence = flaw.edit(virtual.hcl_report(**claims))
    given: dict[str, bytes | None] = dict(files)
    given |= virtual.endorsements(flaw.nonce, **flaw.quote)
    given |= {"ak-cert.pem": ak_certificate()}
    given |= flaw.files({key: data for key, data in given.items() if data is not None})
    values: dict[str, Any] = {"nonce": NONCE, "at": AT}
    endorsements = {key: data for key, data in given.items() if data is not None}
    return appraise(evidence, endorsements=endorsements, **(values | options))


def without(*names: str) -> Callable[[Mapping[str, bytes]], Mapping[str, bytes | None]]:
    return lambda files: dict.fromkeys(names)


def put(**files: bytes) -> Callable[[Mapping[str, bytes]], Mapping[str, bytes | None]]:
    return lambda _: {key.replace("_", "-", 1).replace("_", "."): v for key, v in files.items()}


def one(file: str, edit: Callable[[bytes], bytes]) -> Any:
    return lambda files: {file: edit(files[file])}


def signature(**fields: Any) -> Any:
    """Sign with another scheme, as a TPMT_SIGNATURE."""

    def make(files: Mapping[str, bytes]) -> Mapping[str, bytes | None]:
        made = TpmSignature(value=files["tpm-quote.sig"], **fields)
        return {"tpm-quote.sig": made.to_bytes()}

    return make


def values(edit: Callable[[dict[str, Any]], Any]) -> Any:
    """Change the PCR values."""

    def change(data: bytes) -> bytes:
        found = json.loads(data)
        edit(found["sha256"])
        return json.dumps(found).encode()

    return one("tpm-pcrs.json", change)


JWK = AzureVm(hardware=bytes).jwk
FLAWS = [
    Flaw("hcl.format", edit=lambda data: data + b"\1"),
    Flaw("hcl.format", edit=lambda data: data[:16] + b"\1" + data[17:]),  # status
    Flaw("hcl.format", {"data_version": 2}),
    Flaw("hcl.format", {"version": 3}),
    Flaw("hcl.claims", runtime={"keys": [JWK(), JWK()]}),
    Flaw("hcl.claims", {"runtime_data": b"{}"}),
    Flaw("hcl.claims", {"runtime_data": b"not JSON"}),
    Flaw("hcl.copy", files=lambda _: {"runtime-data.json": b"{}"}),
    Flaw("hcl.copy", files=lambda _: {"runtime-data.json": b""}),
    Flaw("hcl.binding", {"report_data": bytes(64)}),
    Flaw("hcl.binding", {"report_data": b"\1" * 64}),
    Flaw(
        "hcl.binding", edit=lambda data: data.replace(b'"secure-boot":true', b'"secure-boot":null')
    ),
    Flaw("hcl.binding", edit=lambda data: data[:1228] + b"\2" + data[1229:]),  # type of the hash
    Flaw("quote.format", files=without("tpm-quote.msg")),
    Flaw("quote.format", quote={"parts": {"message": b"\xff"}}),
    Flaw("quote.format", files=one("tpm-quote.msg", lambda data: b"\xfe" + data[1:])),
    Flaw("quote.signature", quote={"key": Key.rsa(2048, index=8)}),
    Flaw("quote.signature", files=without("tpm-quote.sig")),
    Flaw("quote.signature", quote={"parts": {"signature": bytes(256)}}),
    Flaw("quote.signature", files=signature(hash="sha1")),
    Flaw("quote.signature", files=signature(hash="sha384"), quote={"pcr_digest": bytes(48)}),
    Flaw("quote.signature", files=signature(scheme=tpm.ALG_RSAPSS)),
    Flaw("quote.signature", files=signature(scheme=tpm.ALG_ECDSA)),
    Flaw("quote.signature", runtime={"keys": [JWK(Key.rsa(2048, index=8))]}),
    Flaw("quote.signature", runtime={"keys": [JWK(kid="HCLEkPub")]}),
    Flaw(
        "quote.selection",
        quote={"selections": (), "pcr_digest": tpm.pcr_digest({}, (), "sha256")},
        files=without("ak-cert.pem"),
    ),
    Flaw(
        "quote.selection",
        quote={
            "selections": (PcrSelection("sha256", ()),),
            "pcr_digest": tpm.pcr_digest({}, (), "sha256"),
        },
    ),
    Flaw(
        "quote.selection",
        quote={"selections": (PcrSelection("sha1", (0, 7)),)},
        files=without("tpm-pcrs.json"),
    ),
    Flaw("quote.pcr_digest", quote={"pcr_digest": bytes(32)}),
    Flaw("quote.pcr_digest", files=values(lambda found: found.update({"3": "00" * 32}))),
    Flaw("quote.pcr_digest", files=values(lambda found: found.pop("3"))),
    Flaw("quote.pcr_digest", files=one("tpm-pcrs.json", lambda _: b"[]")),
    Flaw("ak.format", files=one("ak-cert.pem", lambda data: b"x" + data)),
    Flaw("ak.format", files=lambda _: {"ak-cert-nv.der": b"\x30\x00" + bytes(9)}),
    Flaw("ak.format", files=lambda _: {"ak-cert-nv.der": vtpm_root() + bytes(99)}),
    Flaw("ak.key", files=lambda _: {"ak-cert.pem": ak_certificate(key=Key.rsa(2048, index=8))}),
    Flaw("ak.validity", files=lambda _: {"ak-cert.pem": bare(not_after=AT - DAY)}),
    Flaw("ak.validity", files=lambda _: {"ak-cert.pem": bare(not_before=AT + DAY)}),
    Flaw("ak.usage", files=lambda _: {"ak-cert.pem": ak_certificate(extensions=[])}),
    Flaw(
        "ak.chain", files=lambda _: {"ak-cert.pem": ak_certificate(signer=Key.rsa(2048, index=8))}
    ),
    Flaw("ak.chain", files=lambda _: {"ak-cert.pem": ak_certificate(ca=True)}),
    Flaw("ak.chain", files=lambda _: {"ak-cert.pem": intermediate(ca=False)}),
    Flaw("ak.chain", files=lambda _: {"ak-cert.pem": intermediate(usages=("cRLSign",))}),
    Flaw(
        "ak.chain",
        files=lambda _: {"ak-cert.pem": intermediate(signer=Key.rsa(2048, index=8), key_ids=False)},
    ),
    Flaw("eventlog.replay", files=lambda _: {"tpm-eventlog.bin": b"not a log"}),
    Flaw("eventlog.replay", files=lambda _: {"tpm-eventlog.bin": _log()}),
    Flaw("nonce", nonce=b"another nonce"),
    Flaw("nonce", nonce=NONCE + b"\0"),
    Flaw("nonce", nonce=b""),
    Flaw("nonce", files=without("tpm-quote.msg", "tpm-quote.sig", "tpm-pcrs.json")),
]
# Without these nothing can be read that the other checks judge.
STRUCTURAL = {"hcl.format", "hcl.claims", "quote.format", "ak.format"}


def bare(**changes: Any) -> bytes:
    """Return the AK's certificate without its issuers: then its time alone is judged."""
    return ak_certificate(**changes).partition(b"-----END CERTIFICATE-----\n")[0] + (
        b"-----END CERTIFICATE-----\n"
    )


def _log() -> bytes:
    """Return a log of the TCG2 form with one event in PCR 0, which nobody quoted."""
    spec = b"Spec ID Event03\0" + bytes(4) + b"\0\2\0\2" + b"\1\0\0\0" + b"\x0b\0\x20\0" + b"\0"
    first = bytes(4) + b"\3\0\0\0" + bytes(20) + len(spec).to_bytes(4, "little") + spec
    event = bytes(4) + b"\4\0\0\0" + b"\1\0\0\0" + b"\x0b\0" + b"\x11" * 32 + b"\4\0\0\0" + bytes(4)
    return first + event


PCR0 = AzureVm(hardware=bytes).pcrs[0]
# The firmware of either machine: PCRs mean nothing without it.
FIRMWARE = {"launch_digest": bytes(range(48)), "mrtd": bytes(range(48))}
# Checks that only what the relying party asks for offends, with arguments of `appraise`.
JUDGED: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("report_data", lambda: {"report_data": bytes(64)}),
    ("user_data", lambda: {"user_data": b"x"}),
    ("user_data", lambda: {"user_data": USER_DATA + b"\0"}),
    ("code.pcrs", lambda: {"policy": AppraisalPolicy(pcrs={0: b"\x11" * 32}, **FIRMWARE)}),
    ("code.pcrs", lambda: {"policy": AppraisalPolicy(pcrs={0: PCR0, 24: PCR0}, **FIRMWARE)}),
    ("code.kind", lambda: {"policy": AppraisalPolicy(pcrs={0: PCR0})}),
    ("code.kind", lambda: {"policy": AppraisalPolicy(mrenclave=b"\x11" * 32)}),
]
