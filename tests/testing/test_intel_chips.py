"""Synthetic Intel platforms: an independent verifier accepts them under their own root only."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from pyenclave.formats.dcap import Quote, TdQuote
from pyenclave.formats.x509 import Certificate
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(NOW)


def _quote(platform: IntelPlatform, kind: str) -> tuple[bytes, str]:
    tee, _, version = kind.partition("-")
    if tee == "sgx":
        return platform.enclave_quote(version=int(version)), tee  # type: ignore[arg-type]
    return platform.td_quote(version=int(version)), tee  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sgx-3", "sgx-4", "sgx-5", "tdx-4", "tdx-5"])
def test_what_is_written_is_read(platform: IntelPlatform, kind: str) -> None:
    data, tee = _quote(platform, kind)
    quote: Quote | TdQuote = Quote.from_bytes(data) if tee == "sgx" else TdQuote.from_bytes(data)
    assert quote.version == int(kind[-1])
    assert quote.to_bytes() == data
    chain = Certificate.from_pem_chain(quote.certification_data)
    assert [item.common_name for item in chain] == [
        "Intel SGX PCK Certificate",
        "Intel SGX PCK Platform CA",
        "Intel SGX Root CA",
    ]


def _second_opinion(platform: IntelPlatform, data: bytes, files: dict[str, bytes]) -> Any:
    other = pytest.importorskip("dcap_qvl", reason="the second opinion is not installed")
    tcb, qe = (json.loads(files[n]) for n in ("tcb-info.json", "qe-identity.json"))

    def inner(name: str, member: str) -> str:
        text = files[name].decode()
        begin = text.index(f'"{member}":') + len(member) + 3
        return text[begin : text.rindex(',"signature"')]

    collateral = other.QuoteCollateralV3(
        pck_crl_issuer_chain=files["pck-crl-issuer-chain.pem"].decode(),
        root_ca_crl=files["root-ca-crl.der"],
        pck_crl=files["pck-crl.der"],
        tcb_info_issuer_chain=files["tcb-info-issuer-chain.pem"].decode(),
        tcb_info=inner("tcb-info.json", "tcbInfo"),
        tcb_info_signature=bytes.fromhex(tcb["signature"]),
        qe_identity_issuer_chain=files["qe-identity-issuer-chain.pem"].decode(),
        qe_identity=inner("qe-identity.json", "enclaveIdentity"),
        qe_identity_signature=bytes.fromhex(qe["signature"]),
    )
    now = int(NOW.timestamp())
    return other.verify_with_root_ca(data, collateral, platform.root_ca.der, now)


@pytest.mark.parametrize("kind", ["sgx-3", "tdx-4", "tdx-5"])
def test_an_independent_verifier_accepts_our_quotes(platform: IntelPlatform, kind: str) -> None:
    data, tee = _quote(platform, kind)
    files = platform.endorsements(tee)  # type: ignore[arg-type]
    report = _second_opinion(platform, data, files)
    assert report.status == "UpToDate"


@pytest.mark.parametrize("kind", ["sgx-3", "tdx-4"])
def test_an_independent_verifier_sees_each_flaw(platform: IntelPlatform, kind: str) -> None:
    data, tee = _quote(platform, kind)
    good = platform.endorsements(tee)  # type: ignore[arg-type]
    level = platform.tcb_level(
        "OutOfDate", td_components=(4, 1, 2, *bytes(13)) if tee == "tdx" else None
    )
    old = platform.endorsements(tee, tcb_info={"tcbLevels": [level]})  # type: ignore[arg-type]
    assert _second_opinion(platform, data, old).status == "OutOfDate"
    changed = bytearray(data)
    changed[120] ^= 1
    stranger = IntelPlatform(NOW)
    revoked = good | {
        "pck-crl.der": platform.pck_crl(revoked=[Certificate.from_der(platform.pck).serial])
    }
    for wrong, files in (
        (bytes(changed), good),
        (data, stranger.endorsements(tee)),  # type: ignore[arg-type]
        (data, revoked),
        (data, platform.endorsements(tee, tcb_info={"fmspc": "000000000000"})),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - the other's messages are its own
            _second_opinion(platform, wrong, files)
