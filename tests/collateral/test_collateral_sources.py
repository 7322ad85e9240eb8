"""PCS, PCCS, KDS and THIM doubles that serve real vectors, and what is refused of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pyenclave.collateral.cache import Cache
from pyenclave.collateral.fetcher import Fetcher
from pyenclave.collateral.http import Client, Response
from pyenclave.collateral.kds import AmdSource, fetch_amd, vcek_path
from pyenclave.collateral.pcs import PCS_ROOT_CRL, IntelSource, fetch_intel
from pyenclave.collateral.thim import fetch_thim
from pyenclave.errors import CollateralError
from pyenclave.formats.x509 import Certificate

FMSPC = bytes.fromhex("00606a000000")


@pytest.fixture
def case(vectors: Path) -> Path:
    """An SGX case with its collateral."""
    return vectors / "attestation" / "sgx-v3-icx-automata-outofdate"


@pytest.fixture
def pccs(double: Any, answer: Any, case: Path) -> Any:
    """A caching service that serves the collateral of the case."""

    def chain(name: str) -> str:
        return quote((case / name).read_text())

    root = f"{''}/sgx/certification/v4"
    double.answers |= {
        f"{root}/tcb": answer(
            (case / "tcb-info.json").read_bytes(),
            {"TCB-Info-Issuer-Chain": chain("tcb-info-issuer-chain.pem")},
        ),
        f"{root}/qe/identity": answer(
            (case / "qe-identity.json").read_bytes(),
            {"SGX-Enclave-Identity-Issuer-Chain": chain("qe-identity-issuer-chain.pem")},
        ),
        f"{root}/pckcrl": answer(
            (case / "pck-crl.der").read_bytes(),
            {"SGX-PCK-CRL-Issuer-Chain": chain("pck-crl-issuer-chain.pem")},
        ),
        f"{root}/rootcacrl": answer((case / "root-ca-crl.der").read_bytes().hex().encode()),
    }
    return double


def intel(double: Any, fetcher: Fetcher | None = None, **options: Any) -> dict[str, bytes]:
    source = IntelSource(double.url, caching=True, **options)
    subject = fetcher or Fetcher(Client(timeout=5, attempts=1))
    return asyncio.run(fetch_intel(subject, source, tee="sgx", fmspc=FMSPC, ca="platform"))


def test_a_caching_service_gives_what_verification_needs(pccs: Any, case: Path) -> None:
    files = intel(pccs)
    for name in ("tcb-info.json", "qe-identity.json", "pck-crl.der", "root-ca-crl.der"):
        assert files[name] == (case / name).read_bytes(), name
    for name in files:
        if name.endswith(".pem"):
            assert Certificate.from_pem_chain(files[name])
    asked = sorted(path for path, _ in pccs.asked)
    assert asked == [
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/sgx/certification/v4/qe/identity",
        "/sgx/certification/v4/rootcacrl",
        "/sgx/certification/v4/tcb?fmspc=00606a000000",
    ]


def test_the_newest_set_is_asked_for_by_name() -> None:
    source = IntelSource(update="early")
    assert source.url("tdx", "tcb", fmspc="aa").endswith(
        "tdx/certification/v4/tcb?fmspc=aa&update=early"
    )
    assert source.url("sgx", "pckcrl", ca="platform").endswith("pckcrl?ca=platform")
    assert PCS_ROOT_CRL.startswith("https://")
    with pytest.raises(ValueError, match="no TDX"):
        IntelSource(version=3).url("tdx", "tcb")


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("tcb", b"{}", None),
        ("tcb", b'{"tcbInfo":1,"signature":"00"}', None),
        ("tcb", b'{"tcbInfo":{"fmspc":"000000000000"},"signature":"00"}', None),
        ("tcb", b'{"tcbInfo":{"fmspc":"00606a000000"},"signature":"00"}', None),
        ("tcb", b'{"tcbInfo":{},"tcbInfo":{},"signature":"00"}', None),
        ("qe/identity", b"[]", None),
        ("qe/identity", b"\xff", None),
        ("pckcrl", b"", None),
        ("pckcrl", b"not a list", None),
        ("rootcacrl", b"3082", None),
        ("tcb", None, {}),
        ("tcb", None, {"TCB-Info-Issuer-Chain": "none"}),
        ("pckcrl", None, {"SGX-PCK-CRL-Issuer-Chain": "%FF"}),
    ],
)
def test_what_was_not_asked_for_is_refused(
    pccs: Any, path: str, body: bytes | None, headers: dict[str, str] | None
) -> None:
    served = pccs.answers[f"/sgx/certification/v4/{path}"]
    if body is not None:
        served.body = body
    if headers is not None:
        served.headers = headers
    with pytest.raises(CollateralError):
        intel(pccs)


def test_att_09_older_collateral_than_was_seen_is_refused(pccs: Any, tmp_path: Path) -> None:
    served = pccs.answers["/sgx/certification/v4/tcb"]
    now = json.loads(served.body)["tcbInfo"]["tcbEvaluationDataNumber"]
    older = served.body.replace(
        b'"tcbEvaluationDataNumber":%d' % now, b'"tcbEvaluationDataNumber":%d' % (now - 1)
    )
    assert older != served.body
    client = Client(timeout=5, attempts=1)
    fetcher = Fetcher(client, Cache(tmp_path / "c"), keep=0)
    intel(pccs, fetcher)
    served.body = older
    with pytest.raises(CollateralError, match="older than what was seen"):
        intel(pccs, fetcher)
    intel(pccs, Fetcher(client, Cache(tmp_path / "c"), keep=0, allow_older=True))
    intel(pccs, Fetcher(client, Cache(tmp_path / "other"), keep=0))


def test_att_09_what_nobody_signed_is_not_remembered_as_seen(pccs: Any, tmp_path: Path) -> None:
    served = pccs.answers["/sgx/certification/v4/tcb"]
    genuine = served.body
    now = json.loads(genuine)["tcbInfo"]["tcbEvaluationDataNumber"]
    served.body = genuine.replace(
        b'"tcbEvaluationDataNumber":%d' % now, b'"tcbEvaluationDataNumber":%d' % (now + 9)
    )
    fetcher = Fetcher(Client(timeout=5, attempts=1), Cache(tmp_path / "c"), keep=0)
    intel(pccs, fetcher)  # it is handed out, and refused when evidence is verified
    served.body = genuine
    assert intel(pccs, fetcher)["tcb-info.json"] == genuine


def test_the_cache_answers_until_it_is_too_old(pccs: Any, tmp_path: Path) -> None:
    client = Client(timeout=5, attempts=1)
    first = intel(pccs, Fetcher(client, Cache(tmp_path / "c")))
    asked = len(pccs.asked)
    assert intel(pccs, Fetcher(client, Cache(tmp_path / "c"), offline=True)) == first
    assert len(pccs.asked) == asked
    with pytest.raises(CollateralError, match="not in the cache"):
        intel(pccs, Fetcher(client, Cache(tmp_path / "empty"), offline=True))


def test_a_damaged_or_foreign_entry_is_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    answer = Response(b"x", {"a": "b"})
    cache.put("https://a/1", answer, seconds=60)
    assert cache.get("https://a/1") == answer
    (entry,) = (tmp_path / "c").glob("*.json")
    whole = entry.read_bytes()
    for wrong in (b"", whole[:-1], whole.replace(b"a/1", b"a/2"), b"[]", b"{}", b"\0" * 9):
        entry.write_bytes(wrong)
        assert cache.get("https://a/1") is None
    cache.put("https://a/1", answer, seconds=0)
    assert cache.get("https://a/1") is None


def test_the_cache_must_be_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir(mode=0o777)
    (tmp_path / "c").chmod(0o777)
    with pytest.raises(CollateralError, match="own"):
        Cache(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(CollateralError, match="cannot be used"):
        Cache(tmp_path / "file")
    Cache(tmp_path / "made" / "new")
    assert (tmp_path / "made" / "new").stat().st_mode & 0o777 == 0o700


def test_the_record_of_what_was_seen_is_not_lost_by_damage(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.check_not_older("a", 5, remember=True)
    cache.check_not_older("b", 1, remember=True)
    for damage in (b"", b"[]", b'{"a":"x"}', b'{"a":true}'):
        (tmp_path / "seen.state").write_bytes(damage)
        with pytest.raises(CollateralError):
            cache.check_not_older("a", 5, remember=True)


# ---- AMD --------------------------------------------------------------------------------------


def test_paths_of_certificates_are_those_of_the_service() -> None:
    tcb = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219, "fmc": 1}
    chip = bytes(range(64))
    assert vcek_path("Milan", chip, tcb) == (
        f"/vcek/v1/Milan/{chip.hex()}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
    )
    assert vcek_path("Turin", chip, tcb) == (
        "/vcek/v1/Turin/0001020304050607?fmcSPL=01&blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
    )
    with pytest.raises(CollateralError, match="masked"):
        vcek_path("Milan", bytes(64), tcb)


def test_amd_and_azure_services_give_certificates(double: Any, answer: Any, vectors: Path) -> None:
    case = vectors / "attestation" / "snp-v2-milan-vcek-coco"
    vek, ask, ark = ((case / n).read_bytes() for n in ("vek.der", "ask.pem", "ark.pem"))
    genuine = next((vectors / "attestation").glob("*/pck-crl.der")).read_bytes()  # any CRL reads
    tcb = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 4}
    double.answers |= {
        "/vcek/v1/Milan/cert_chain": answer(ask + ark),
        "/vcek/v1/Milan/crl": answer(genuine),
        vcek_path("Milan", bytes(range(64)), tcb): answer(vek),
    }
    fetcher = Fetcher(Client(timeout=5, attempts=1))

    def fetch() -> dict[str, bytes]:
        return asyncio.run(
            fetch_amd(
                fetcher,
                AmdSource(double.url),
                product="Milan",
                signer="vcek",
                chip_id=bytes(range(64)),
                tcb=tcb,
            )
        )

    files = fetch()
    assert files["vek.der"] == vek
    assert Certificate.from_bytes(files["ark.pem"]) == Certificate.from_bytes(ark)
    for wrong in (b"", ask, ask + ark + ark, b"-----BEGIN CERTIFICATE-----"):
        double.answers["/vcek/v1/Milan/cert_chain"].body = wrong
        with pytest.raises(CollateralError):
            fetch()

    document = {
        "vcekCert": _pem(vek),
        "certificateChain": (ask + ark).decode(),
        "tcbm": "00",
        "cacheControl": "86400",
    }
    thim = double.answers["/metadata/THIM/amd/certification"] = answer(
        json.dumps(document).encode()
    )
    found = asyncio.run(fetch_thim(fetcher, base=double.url))
    assert found["vek.der"] == vek
    assert double.asked[-1][1]["Metadata"] == "true"
    for wrong_document in ({}, document | {"vcekCert": 1}, document | {"certificateChain": "x"}):
        thim.body = json.dumps(wrong_document).encode()
        with pytest.raises(CollateralError):
            asyncio.run(fetch_thim(fetcher, base=double.url))


def _pem(der: bytes) -> str:
    import ssl

    return ssl.DER_cert_to_PEM_cert(der)
