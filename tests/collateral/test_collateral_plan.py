"""Evidence in, bundle out, and the bundle accepted: over doubles that serve synthetic vendors."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.attestation.endorsements import Endorsements
from pyenclave.cli import main
from pyenclave.collateral.describe import describe, holds_until
from pyenclave.collateral.fetcher import Fetcher
from pyenclave.collateral.http import Client
from pyenclave.collateral.kds import AmdSource, vcek_path
from pyenclave.collateral.pcs import IntelSource
from pyenclave.collateral.plan import Sources, fetch_sync
from pyenclave.errors import CollateralError
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.certificates import pem
from pyenclave.testing.intel import IntelPlatform

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(NOW)


@pytest.fixture(scope="module")
def chip() -> AmdChip:
    return AmdChip("milan")


@pytest.fixture
def services(double: Any, answer: Any, platform: IntelPlatform, chip: AmdChip) -> Any:
    """PCCS and KDS of the synthetic vendors."""
    for tee in ("sgx", "tdx"):
        files = platform.endorsements(tee)  # type: ignore[arg-type]
        base = f"/{tee}/certification/v4"
        double.answers[f"{base}/tcb?fmspc={platform.fmspc.hex()}"] = answer(
            files["tcb-info.json"],
            {"TCB-Info-Issuer-Chain": quote(files["tcb-info-issuer-chain.pem"])},
        )
        double.answers[f"{base}/qe/identity"] = answer(
            files["qe-identity.json"],
            {"SGX-Enclave-Identity-Issuer-Chain": quote(files["qe-identity-issuer-chain.pem"])},
        )
    double.answers["/sgx/certification/v4/pckcrl?ca=platform&encoding=der"] = answer(
        files["pck-crl.der"],
        {"SGX-PCK-CRL-Issuer-Chain": quote(files["pck-crl-issuer-chain.pem"])},
    )
    double.answers["/sgx/certification/v4/rootcacrl"] = answer(
        files["root-ca-crl.der"].hex().encode()
    )
    amd = chip.endorsements()
    double.answers["/vcek/v1/Milan/cert_chain"] = answer(amd["ask.pem"] + amd["ark.pem"])
    double.answers["/vcek/v1/Milan/crl"] = answer(amd["crl.der"])
    double.answers[vcek_path("Milan", chip.chip_id, chip.tcb)] = answer(amd["vek.der"])
    return double


def _sources(double: Any) -> Sources:
    return Sources(intel=IntelSource(double.url, caching=True), amd=AmdSource(double.url))


def _evidence(kind: str, platform: IntelPlatform, chip: AmdChip) -> tuple[bytes, bytes]:
    if kind == "sgx":
        return platform.enclave_quote(), platform.root
    if kind == "tdx":
        return platform.td_quote(), platform.root
    if kind == "snp":
        return chip.report(), chip.root
    vm = AzureVm(hardware=lambda data: chip.report(report_data=data))
    return vm.hcl_report(), chip.root


@pytest.mark.parametrize("kind", ["sgx", "tdx", "snp", "azure"])
def test_what_was_fetched_makes_evidence_accepted(
    services: Any, platform: IntelPlatform, chip: AmdChip, kind: str
) -> None:
    evidence, root = _evidence(kind, platform, chip)
    fetcher = Fetcher(Client(timeout=10, attempts=1))
    bundle = fetch_sync(evidence, sources=_sources(services), fetcher=fetcher)
    result = appraise(
        evidence,
        policy=AppraisalPolicy.strict(),
        endorsements=Endorsements.from_bundle(bundle.to_bytes()),
        freshness="not_checked",
        roots=[root],
    )
    assert result.accepted, [check for check in result.checks if not check.holds]
    described = describe(bundle.files)
    assert all(item.problem is None for item in described)
    until = holds_until(described)
    assert until is not None
    assert until > NOW + timedelta(days=28)


def test_what_needs_nothing_or_more_is_said(platform: IntelPlatform, chip: AmdChip) -> None:
    for evidence, word in (
        (
            platform.enclave_quote(
                quote={"certification_type": 4, "certification_data": pem(platform.pck)}
            ),
            "PCK",
        ),
        (AmdChip("milan", signer="vlek").report(), "VLEK"),
        (chip.report(version=2), "line of processors"),
        (chip.report(chip_id=bytes(64)), "masked"),
        (b"a.b.c", "kind"),
    ):
        with pytest.raises(Exception, match=word) as caught:
            fetch_sync(evidence)
        assert type(caught.value).__name__ in ("CollateralError", "EvidenceFormatError")


def test_what_cannot_be_read_is_described_as_that() -> None:
    described = describe({"crl.der": b"x", "vek.der": b"", "tcb-info.json": b"{}", "ask.pem": b"-"})
    assert len(described) == 4
    assert all(item.problem for item in described)
    assert holds_until(described) is None


def test_the_command_fetches_shows_and_checks(
    services: Any,
    platform: IntelPlatform,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "quote.bin").write_bytes(platform.enclave_quote())
    (tmp_path / "root.pem").write_bytes(platform.root)
    quote_, bundle, root = (str(tmp_path / n) for n in ("quote.bin", "b.json", "root.pem"))
    fetch = ["collateral", "fetch", quote_, "-o", bundle, "--pccs", services.url]
    cached = [*fetch, "--cache", str(tmp_path / "cache")]
    assert main([*cached, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 7
    assert main(cached) == 2, "an existing file is not replaced"
    assert "--force" in capsys.readouterr().err
    asked = len(services.asked)
    assert main([*cached, "--offline", "--force"]) == 0
    assert len(services.asked) == asked
    capsys.readouterr()
    assert main(["collateral", "show", bundle]) == 0
    assert "FMSPC" in capsys.readouterr().out
    assert main(["collateral", "check", bundle, "--root", root]) == 0
    capsys.readouterr()
    assert main(["collateral", "check", bundle]) == 1, "the synthetic root is nobody's anchor"
    capsys.readouterr()
    verify = ["verify", quote_, "--endorsements", bundle, "--root", root]
    assert main(verify) == 0
    assert "accepted" in capsys.readouterr().out
    late = ["collateral", "check", bundle, "--root", root, "--at", "2049-01-01T00:00:00Z"]
    assert main(late) == 1
    capsys.readouterr()
    assert main([*fetch, "--no-cache", "--offline", "--force"]) == 2
    assert main([*fetch, "--pcs", "https://a.example", "--force"]) == 2


def test_a_service_that_knows_nothing_is_an_error_of_one_line(
    double: Any, platform: IntelPlatform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quote.bin").write_bytes(platform.enclave_quote())
    arguments = ["collateral", "fetch", str(tmp_path / "quote.bin"), "-o", str(tmp_path / "b")]
    assert main([*arguments, "--pccs", double.url, "--no-cache"]) == 2
    shown = capsys.readouterr()
    assert "nothing is known of this platform" in shown.err
    assert not (tmp_path / "b").exists()


def test_a_bundle_with_a_stranger_in_it_is_refused(tmp_path: Path) -> None:
    from pyenclave.formats.bundle import Bundle

    data = Bundle({"strange.der": b""}, NOW).to_bytes()
    with pytest.raises(CollateralError, match="strange"):
        Endorsements.from_bundle(data)
