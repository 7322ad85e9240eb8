"""Collateral of the service: where it comes from, and who can make it be fetched."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'services' is not installed")

from pyenclave.attestation import Endorsements
from pyenclave.errors import CollateralError
from pyenclave.formats import jose
from pyenclave.services.attestation.collateral import Collateral, family_of
from pyenclave.services.attestation.defaults import DEFAULT_POLICIES
from pyenclave.services.attestation.requests import read_request
from pyenclave.services.attestation.verification import Prepared, prepare
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.intel import IntelPlatform

AT = datetime.now(UTC)


@pytest.fixture(scope="module")
def machine() -> IntelPlatform:
    return IntelPlatform(AT)


def _prepared(helpers: Any, quote: bytes, kind: str = "SgxEnclave") -> Prepared:
    return prepare(read_request(kind, {"quote": helpers.b64(quote)}))


def _write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


class _Source:
    """Fetches from a machine; counts, waits, fails as it is told."""

    def __init__(self, machine: IntelPlatform) -> None:
        self.machine = machine
        self.asked = 0
        self.fails = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, quote: bytes, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        del quote, files
        self.asked += 1
        await self.gate.wait()
        if self.fails:
            raise CollateralError("the source does not answer")
        return self.machine.endorsements()


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- files ------------------------------------------------------------------------------------


def test_a_folder_may_hold_one_family_or_folders_of_them(
    machine: IntelPlatform, helpers: Any, tmp_path: Path
) -> None:
    other = IntelPlatform(AT, fmspc=bytes.fromhex("00906ed50000"))
    _write(tmp_path / "one", machine.endorsements())
    _write(tmp_path / "several" / "a", machine.endorsements())
    _write(tmp_path / "several" / "b", other.endorsements())

    async def run() -> None:
        one = Collateral([tmp_path / "one"])
        assert (await one.of(_prepared(helpers, machine.enclave_quote()), AT)).files
        several = Collateral([tmp_path / "several"])
        for platform in (machine, other):
            found = await several.of(_prepared(helpers, platform.enclave_quote()), AT)
            assert platform.fmspc.hex().encode() in found.files["tcb-info.json"]
        unknown = IntelPlatform(AT, fmspc=bytes.fromhex("00606a000000"))
        with pytest.raises(CollateralError, match="no collateral of this platform family"):
            await several.of(_prepared(helpers, unknown.enclave_quote()), AT)

    asyncio.run(run())


def test_changed_files_are_read_again_and_half_an_update_is_not(
    machine: IntelPlatform, helpers: Any, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "one", machine.endorsements())
    clock = _Clock()
    prepared = _prepared(helpers, machine.enclave_quote())

    async def run() -> None:
        store = Collateral([folder], clock=clock)
        first = await store.of(prepared, AT)
        assert await store.of(prepared, AT) is first
        clock.now += 60
        assert await store.of(prepared, AT) is first  # unchanged files are not read
        (folder / "tcb-info.json").write_bytes(b"{")
        clock.now += 60
        assert await store.of(prepared, AT) is first
        newer = machine.endorsements(tcb_info={"tcbEvaluationDataNumber": 18})
        _write(folder, newer)
        os.utime(folder / "tcb-info.json", ns=(1, 1))
        clock.now += 60
        found = await store.of(prepared, AT)
        assert found.files["tcb-info.json"] == newer["tcb-info.json"]
        assert store.baselines["sgx"][0][0] == 18
        shutil.rmtree(folder)
        clock.now += 60
        assert await store.of(prepared, AT) is found

    asyncio.run(run())


def test_what_is_no_collateral_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(CollateralError):
        Collateral([_write(tmp_path / "a", {"tcb-info.json": b"{}"})])
    (tmp_path / "bundle").write_bytes(b"no bundle")
    with pytest.raises(CollateralError):
        Collateral([tmp_path / "bundle"])
    with pytest.raises(OSError, match="missing"):
        Collateral([tmp_path / "missing"])


def test_revocation_lists_of_amd_belong_to_their_issuer(helpers: Any, tmp_path: Path) -> None:
    milan, genoa = AmdChip("milan"), AmdChip("genoa")
    for chip in (milan, genoa):
        crl = chip.endorsements()["crl.der"]
        _write(tmp_path / chip.product, {"crl.der": crl})
    store = Collateral([tmp_path])

    async def run() -> None:
        for chip in (milan, genoa):
            body = {"report": helpers.b64(helpers.proof(chip, chip.report()))}
            found = await store.of(prepare(read_request("SevSnpVm", body)), AT)
            assert found.files["crl.der"] == (tmp_path / chip.product / "crl.der").read_bytes()

    asyncio.run(run())


def test_a_revoked_chip_is_refused(site: Any, helpers: Any) -> None:
    from pyenclave.errors import AppraisalError
    from pyenclave.services.attestation.verification import verify

    chip = AmdChip()
    revoked = chip.endorsements(revoked=[1])["crl.der"]
    body = {"report": helpers.b64(helpers.proof(chip, chip.report()))}
    prepared = prepare(read_request("SevSnpVm", body))
    files = Endorsements.of({"crl.der": revoked})
    verify(prepared, endorsements=files, roots=[chip.root], at=AT)
    from pyenclave.formats.x509 import Certificate

    ask = Certificate.from_der(chip.ask.der)
    files = Endorsements.of({"crl.der": chip.endorsements(revoked=[ask.serial])["crl.der"]})
    with pytest.raises(AppraisalError, match="refused by"):
        verify(prepared, endorsements=files, roots=[chip.root], at=AT)


# ---- the network ------------------------------------------------------------------------------


def test_only_genuine_quotes_are_fetched_for(machine: IntelPlatform, helpers: Any) -> None:
    async def run() -> None:
        source = _Source(machine)
        store = Collateral(fetch=source)  # knows no root but the vendors'
        with pytest.raises(CollateralError, match="nothing is fetched"):
            await store.of(_prepared(helpers, machine.enclave_quote()), AT)
        quote = bytearray(machine.enclave_quote())
        quote[100] ^= 1
        store = Collateral(fetch=source, roots=[machine.root])
        with pytest.raises(CollateralError, match="nothing is fetched"):
            await store.of(_prepared(helpers, bytes(quote)), AT)
        assert source.asked == 0

    asyncio.run(run())


def test_many_requests_make_one_fetch_and_it_is_kept(machine: IntelPlatform, helpers: Any) -> None:
    async def run() -> None:
        source, clock = _Source(machine), _Clock()
        store = Collateral(fetch=source, roots=[machine.root], clock=clock)
        quotes = [_prepared(helpers, machine.enclave_quote()) for _ in range(5)]
        source.gate.clear()
        waiting = [asyncio.create_task(store.of(quote, AT)) for quote in quotes]
        await asyncio.sleep(0)
        waiting[0].cancel()  # one client leaves
        await asyncio.sleep(0)
        source.gate.set()
        found = await asyncio.gather(*waiting[1:])
        assert len({id(item) for item in found}) == 1
        assert source.asked == 1
        assert await store.of(quotes[0], AT) is found[0]
        # Later it is fetched again beside the requests, and a failure takes nothing away.
        clock.now += 7 * 3600
        source.fails = True
        assert await store.of(quotes[0], AT) is found[0]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert source.asked == 2
        assert await store.of(quotes[0], AT) is found[0]
        assert source.asked == 2
        await store.close()

    asyncio.run(run())


def test_what_is_not_to_be_had_is_not_asked_for_again_at_once(
    machine: IntelPlatform, helpers: Any
) -> None:
    async def run() -> None:
        source, clock = _Source(machine), _Clock()
        source.fails = True
        store = Collateral(fetch=source, roots=[machine.root], clock=clock)
        prepared = _prepared(helpers, machine.enclave_quote())
        for _ in range(3):
            with pytest.raises(CollateralError, match="does not answer"):
                await store.of(prepared, AT)
        assert source.asked == 1
        clock.now += 61
        source.fails = False
        assert (await store.of(prepared, AT)).files
        assert source.asked == 2

    asyncio.run(run())


def test_the_family_is_that_of_the_certificate(machine: IntelPlatform) -> None:
    assert family_of(machine.enclave_quote()) == ("sgx", "00a06f000000")
    assert family_of(machine.td_quote()) == ("tdx", "00a06f000000")


@pytest.mark.parametrize("at", [datetime(2025, 3, 1, 12, tzinfo=UTC)])
def test_recorded_evidence_is_judged_as_of_its_time_and_every_token_says_so(
    make_site: Any, helpers: Any, at: datetime
) -> None:
    """A machine and its collateral of long ago: refused today, marked where they are accepted."""
    recorded = make_site(at=at)
    recorded.clock.ahead = timedelta(0)
    runtime = b'{"nonce":"old"}'
    body = {
        "quote": helpers.b64(recorded.quote(runtime)),
        "runtimeData": helpers.bound(runtime),
    }
    assert recorded.refused("/attest/SgxEnclave", body)[1] == "AttestationFailed"
    site = make_site(like=recorded, dangerous_evidence_time=at)
    said = site.claims("/attest/SgxEnclave", body)
    assert said["x-pyenclave-evidence-time"] == at.isoformat()
    assert abs(said["iat"] - datetime.now(UTC).timestamp()) < 60
    ear = site.claims("/attest/SgxEnclave", body, query={"format": "ear"})
    assert ear["x-pyenclave-evidence-time"] == at.isoformat()
    (appraisal,) = ear["submods"].values()
    assert appraisal["ear.status"] != "affirming"
    draft = site.post(
        "/attest/SgxEnclave",
        body | {"draftPolicyForAttestation": DEFAULT_POLICIES["SgxEnclave"]},
    ).json()["token"]
    tried = json.loads(jose.b64url_decode(draft.split(".")[1], "draft"))
    assert tried["x-pyenclave-evidence-time"] == at.isoformat()
    policy = site.client.get(
        "/policies/SgxEnclave",
        params={"api-version": "2025-06-01"},
        headers={"authorization": "Bearer admin"},
    ).json()["token"]
    assert site.verified(policy)["x-pyenclave-evidence-time"] == at.isoformat()
    starts = [row for row in site.audit() if row["action"] == "attestation/start"]
    assert starts[-1]["details"]["x-pyenclave-evidence-time"] == at.isoformat()
