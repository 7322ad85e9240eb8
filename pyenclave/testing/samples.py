"""One piece of evidence of each kind, made by synthetic chips: for tutorials and first trials."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pyenclave.formats import jose, ratls
from pyenclave.formats.hcl import REPORT_TYPE_TDX
from pyenclave.formats.jwk import public_members
from pyenclave.formats.tdx import td_report_of
from pyenclave.measurement.sev import snp_launch_digest
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.certificates import Authority, Key, certificate, name, pem
from pyenclave.testing.firmware import firmware
from pyenclave.testing.intel import IntelPlatform
from pyenclave.testing.nitro import NitroHost

__all__ = ["AUDIENCE", "MAA", "Sample", "sample", "samples", "write"]

AUDIENCE: Final = "https://relying-party.example"
MAA: Final = "https://synthetic.weu.attest.azure.net"
_GOOGLE: Final = "https://confidentialcomputing.googleapis.com"
_README: Final = """\
Synthetic evidence, made by `python -m pyenclave.testing`. The roots here are worth nothing: their
keys were made on the spot. Never pin one outside a trial.
"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """
    Evidence with all that judging it takes.

    Attributes:
        file: Name for the evidence.
        evidence: Its bytes.
        endorsements: The files beside it, by name.
        root: What to pin, PEM; None where a key set (``jwks.json``) is what is trusted.
        files: Further files: what was measured.
    """

    file: str
    evidence: bytes
    endorsements: Mapping[str, bytes] = field(default_factory=dict)
    root: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def _intel(now: datetime, nonce: bytes) -> Iterator[tuple[str, Sample]]:
    machine = IntelPlatform(now)
    data = nonce.ljust(64, b"\0")
    common: dict[str, Any] = {"file": "quote.bin", "root": machine.root}
    yield (
        "sgx",
        Sample(
            evidence=machine.enclave_quote(report_data=data),
            endorsements=machine.endorsements(),
            **common,
        ),
    )
    behind = machine.tcb_level("SWHardeningNeeded", advisories=["INTEL-SA-00615"])
    yield (
        "sgx-behind",
        Sample(
            evidence=machine.enclave_quote(report_data=data),
            endorsements=machine.endorsements(tcb_info={"tcbLevels": [behind]}),
            **common,
        ),
    )
    yield (
        "tdx",
        Sample(
            evidence=machine.td_quote(version=5, report_data=data),
            endorsements=machine.endorsements("tdx"),
            **common,
        ),
    )
    key = Key.ec()
    said = ratls.claims_buffer(key.spki, nonce=nonce)
    quote = machine.enclave_quote(report_data=hashlib.sha256(said).digest() + bytes(32))
    made = certificate(
        subject=name(CN="RA-TLS"),
        issuer=name(CN="RA-TLS"),
        key=key,
        signer=key,
        key_ids=False,
        not_before=now - timedelta(minutes=5),
        not_after=now + timedelta(days=1),
        extensions=[
            (ratls.OID_EVIDENCE, False, ratls.evidence_extension(quote, claims_buffer=said))
        ],
    )
    yield (
        "ra-tls",
        Sample(
            file="certificate.pem",
            evidence=pem(made),
            endorsements=machine.endorsements(),
            root=machine.root,
        ),
    )


def _amd(now: datetime, nonce: bytes) -> Iterator[tuple[str, Sample]]:
    del now
    chip = AmdChip("genoa")
    launched = firmware()
    digest = snp_launch_digest(launched, vcpus=2, vcpu_type="EPYC-Genoa")
    yield (
        "snp",
        Sample(
            file="report.bin",
            evidence=chip.report(report_data=nonce.ljust(64, b"\0"), measurement=digest),
            endorsements=chip.endorsements(),
            root=chip.root,
            files={"firmware.fd": launched, "firmware-new.fd": firmware(fill=3)},
        ),
    )


def _azure(now: datetime, nonce: bytes) -> Iterator[tuple[str, Sample]]:
    chip = AmdChip("milan")
    vm = AzureVm(hardware=lambda data: chip.report(report_data=data))
    yield (
        "azure-snp",
        Sample(
            file="hcl-report.bin",
            evidence=vm.hcl_report(),
            endorsements={**chip.endorsements(), **vm.endorsements(nonce)},
            root=chip.root,
        ),
    )
    machine = IntelPlatform(now)
    quotes: list[bytes] = []

    def measured(data: bytes) -> bytes:
        from pyenclave.formats.dcap import TdQuote

        quotes.append(machine.td_quote(report_data=data))
        return td_report_of(TdQuote.from_bytes(quotes[-1]).report_body)

    vm = AzureVm(hardware=measured, report_type=REPORT_TYPE_TDX)
    yield (
        "azure-tdx",
        Sample(
            file="hcl-report.bin",
            evidence=vm.hcl_report(),
            endorsements={
                **machine.endorsements("tdx"),
                **vm.endorsements(nonce),
                "td-quote.bin": quotes[-1],
            },
            root=machine.root,
        ),
    )


def _nitro(now: datetime, nonce: bytes) -> Iterator[tuple[str, Sample]]:
    host = NitroHost(now)
    yield (
        "nitro",
        Sample(file="document.cbor", evidence=host.document(nonce=nonce), root=host.root),
    )


def _tokens(now: datetime, nonce: bytes) -> Iterator[tuple[str, Sample]]:
    issued = int(now.timestamp())
    times = {"iat": issued, "nbf": issued, "exp": issued + 8 * 3600}
    key = Key.rsa(2048, index=8)
    text = base64.urlsafe_b64encode(nonce).rstrip(b"=").decode("ascii")
    said: dict[str, Any] = {
        "iss": MAA,
        **times,
        "nonce": text,
        "x-ms-ver": "1.0",
        "x-ms-attestation-type": "sgx",
        "x-ms-sgx-is-debuggable": False,
        "x-ms-sgx-mrenclave": bytes(range(32)).hex(),
        "x-ms-sgx-mrsigner": bytes(range(32, 64)).hex(),
        "x-ms-sgx-product-id": 1,
        "x-ms-sgx-svn": 3,
    }
    token = jose.sign(said, key=key.private, algorithm="RS256", kid="1")
    keys = {"keys": [{"kid": "1", **public_members(key.private.public_key())}]}
    yield (
        "maa",
        Sample(
            file="token.jwt",
            evidence=token.encode("ascii"),
            endorsements={"jwks.json": json.dumps(keys).encode()},
        ),
    )
    root_key = Key.rsa(2048, index=9)
    root = Authority.root(
        name(CN="Confidential Space Root"), root_key, algorithm="rsa-pkcs1-sha256"
    )
    leaf = certificate(
        subject=name(CN="Confidential Space Signer"),
        issuer=root.subject,
        key=key,
        signer=root_key,
        algorithm="rsa-pkcs1-sha256",
        ca=False,
        usages=("digitalSignature",),
    )
    said = {
        "iss": _GOOGLE,
        "aud": AUDIENCE,
        **times,
        "eat_nonce": [text],
        "swname": "CONFIDENTIAL_SPACE",
        "hwmodel": "GCP_AMD_SEV_ES",
        "secboot": True,
        "dbgstat": "disabled-since-boot",
        "submods": {"container": {"image_digest": "sha256:" + bytes(range(32)).hex()}},
    }
    x5c = [base64.b64encode(item).decode("ascii") for item in (leaf, root.der)]
    token = jose.sign(said, key=key.private, algorithm="RS256", header={"x5c": x5c})
    yield (
        "google",
        Sample(file="token.jwt", evidence=token.encode("ascii"), root=pem(root.der)),
    )


_MAKERS: Final[tuple[Callable[[datetime, bytes], Iterator[tuple[str, Sample]]], ...]] = (
    _intel,
    _amd,
    _azure,
    _nitro,
    _tokens,
)


def samples(now: datetime, nonce: bytes) -> dict[str, Sample]:
    """
    Make evidence of each kind.

    Args:
        now: When it is made.
        nonce: The challenge that it answers, 8 to 64 bytes.

    Raises:
        ValueError: A nonce of another length.

    """
    if not 8 <= len(nonce) <= 64:
        raise ValueError(f"a nonce for every kind has 8 to 64 bytes, not {len(nonce)}")
    return {kind: sample for make in _MAKERS for kind, sample in make(now, nonce)}


def sample(kind: str, now: datetime, nonce: bytes) -> Sample:
    """
    Make evidence of one kind; as :func:`samples`, which names the kinds.

    Raises:
        ValueError: There is no such kind, or a nonce of another length.

    """
    if not 8 <= len(nonce) <= 64:
        raise ValueError(f"a nonce for every kind has 8 to 64 bytes, not {len(nonce)}")
    known = []
    for make in _MAKERS:
        for this, made in make(now, nonce):
            if this == kind:
                return made
            known.append(this)
    raise ValueError(f"no evidence of kind {kind!r}; there is: {', '.join(known)}")


def write(folder: str | os.PathLike[str], made: Mapping[str, Sample]) -> None:
    """
    Write samples: a folder each, with the evidence, ``endorsements/`` and ``root.pem``.

    Args:
        folder: A new or empty folder.
        made: What `samples` returned.

    Raises:
        FileExistsError: There is something in the folder.
        OSError: It cannot be written.

    """
    top = Path(folder)
    top.mkdir(parents=True, exist_ok=True)
    if any(top.iterdir()):
        raise FileExistsError(f"{top} is not empty")
    (top / "README.txt").write_text(_README, encoding="utf-8")
    for kind, sample in made.items():
        place = top / kind
        place.mkdir()
        (place / sample.file).write_bytes(sample.evidence)
        beside = {} if sample.root is None else {"root.pem": sample.root}
        for file, data in (beside | dict(sample.files)).items():
            (place / file).write_bytes(data)
        if sample.endorsements:
            (place / "endorsements").mkdir()
            for file, data in sample.endorsements.items():
                (place / "endorsements" / file).write_bytes(data)
