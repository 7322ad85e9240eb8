"""Hostile quotes of SGX and TDX, by the entries of the threat catalogue (B.4)."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from issuer_intel import ALL, DAY, NOW, Given, Tee, level_of, machine, other_pck, qe_level

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise, kinds
from pyenclave.attestation.cache import clear
from pyenclave.attestation.policy import TCB_STATUSES
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.dcap import read_quote
from pyenclave.testing.certificates import Key, pem
from pyenclave.testing.intel import IntelPlatform

TEES: tuple[Tee, ...] = ("sgx", "tdx")
both = pytest.mark.parametrize("tee", TEES)


@both
@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_good_quote_of_every_version_is_accepted(tee: Tee, version: int) -> None:
    if (tee, version) == ("tdx", 3):
        return
    result = Given(tee=tee, quote={"version": version}).run()
    assert result.accepted, result.refused_by
    assert not result.identified
    assert not result.fresh


@both
def test_att_02_a_root_that_is_not_pinned_is_none_whatever_it_is_called(tee: Tee) -> None:
    """The synthetic root has Intel's names; only the caller's word makes it an anchor."""
    result = Given(tee=tee, roots=False).run()
    assert "chain.root" in result.refused_by
    assert not result.genuine
    other = Given(tee=tee, platform=IntelPlatform(NOW), roots=False)
    data, files = other.evidence(), other.platform.endorsements(tee)
    judged = appraise(
        data,
        policy=AppraisalPolicy.permissive(),
        freshness="not_checked",
        endorsements=files,
        roots=[machine().root],
        at=NOW,
    )
    assert not judged.genuine


@both
@pytest.mark.parametrize("name", [name for name in ALL if "chain" not in name])
def test_att_05_what_is_missing_is_not_accepted_and_what_is_empty_not_genuine(
    tee: Tee, name: str
) -> None:
    missing = Given(tee=tee, files={"leave_out": (name,)}).run()
    assert missing.genuine
    assert not missing.accepted
    for junk in (b"", b"\0", b"{}", b"\x30\x00", b"[" * 100):
        assert not Given(tee=tee, extra={name: junk}).run().genuine


@both
def test_att_05_a_list_of_another_authority_revokes_nothing_and_is_refused(tee: Tee) -> None:
    other = IntelPlatform(NOW)
    result = Given(tee=tee, extra={"pck-crl.der": other.pck_crl()}).run()
    assert "crl.pck" in result.refused_by


@both
@pytest.mark.parametrize("status", [*TCB_STATUSES[:4], *TCB_STATUSES[6:], "Revoked", "Great", ""])
def test_att_06_every_status_against_every_policy(tee: Tee, status: str) -> None:
    for accepted in TCB_STATUSES:
        policy = AppraisalPolicy.any_code(tcb_statuses=(accepted,))
        result = Given(
            tee=tee, files={"tcb_info": level_of(tee, status=status)}, policy=policy
        ).run()
        known = status in TCB_STATUSES
        assert result.genuine is known
        assert result.accepted is (known and status == accepted)


@both
@pytest.mark.parametrize("delta", [-1, 1])
def test_att_07_one_component_that_is_too_low_is_not_made_up_for(tee: Tee, delta: int) -> None:
    own = list(machine().components)
    for index, svn in enumerate(own):
        need = [max(0, n - 1) for n in own]
        need[index] = svn + delta
        if need[index] < 0:
            continue
        result = Given(tee=tee, files={"tcb_info": level_of(tee, components=need)}).run()
        assert ("tcb.level" in result.refused_by) is (delta > 0)


@both
def test_att_08_collateral_of_the_other_tee_is_refused(tee: Tee) -> None:
    m, other = machine(), "tdx" if tee == "sgx" else "sgx"
    for name, data in (
        ("tcb-info.json", m.signed("tcbInfo", m.tcb_info(other))),  # type: ignore[arg-type]
        ("qe-identity.json", m.signed("enclaveIdentity", m.qe_identity(other))),  # type: ignore[arg-type]
    ):
        assert not Given(tee=tee, extra={name: data}).run().genuine


@both
def test_att_09_collateral_counts_only_in_its_time(tee: Tee) -> None:
    for at in (NOW - 2 * DAY, NOW + 30 * DAY):
        result = Given(tee=tee, at=at).run()
        assert {"tcb.validity", "qe.identity.validity", "crl.pck.validity"} <= set(
            result.refused_by
        )
    policy = AppraisalPolicy.any_code(min_tcb_evaluation_number=18)
    for part in ("tcb_info", "qe_identity"):
        newer = {"tcb_info": {"tcbEvaluationDataNumber": 18}, "qe_identity": {
            "tcbEvaluationDataNumber": 18}}  # fmt: skip
        assert Given(tee=tee, files=newer, policy=policy).run().accepted
        newer[part] = {}
        assert not Given(tee=tee, files=newer, policy=policy).run().accepted


@both
def test_att_11_any_change_of_what_binds_the_attestation_key_is_refused(tee: Tee) -> None:
    forger = Key.ec()
    own_key = Given(tee=tee, quote={"quote": {"attestation_key": forger.point}}).run()
    assert "qe.binding" in own_key.refused_by
    auth = Given(tee=tee, quote={"quote": {"qe_auth_data": b"other"}}).run()
    assert auth.refused_by == ("qe.binding",)
    good = read_quote(Given(tee=tee).evidence()).qe_report.report_data
    for index in range(64):
        bad = good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :]
        result = Given(tee=tee, quote={"qe": {"report_data": bad}}).run()
        assert result.refused_by == ("qe.binding",)


@both
def test_att_12_each_byte_of_report_data_counts(tee: Tee) -> None:
    data = bytes(range(1, 65))
    assert Given(tee=tee, quote={"report_data": data}, report_data=data).run().accepted
    for index in range(64):
        other = data[:index] + bytes([data[index] ^ 0x80]) + data[index + 1 :]
        result = Given(tee=tee, quote={"report_data": data}, report_data=other).run()
        assert result.refused_by == ("report_data",)
    for wrong in (b"", data[:63], data + b"\0"):
        with pytest.raises(ValueError, match="report_data"):
            Given(tee=tee, quote={"report_data": data}, report_data=wrong).run()


@both
def test_att_13_a_quote_is_fresh_for_its_own_nonce_only(tee: Tee) -> None:
    nonce = bytes(range(32))
    given = Given(tee=tee, quote={"report_data": nonce + bytes(32)}, nonce=nonce)
    assert given.run().fresh
    for other in (nonce[:-1] + b"\0", nonce[:16], nonce + b"\1", bytes(32)):
        result = dataclasses.replace(given, nonce=other).run()
        assert not result.fresh
        assert not result.accepted


@both
def test_att_14_collateral_of_another_platform_is_refused(tee: Tee) -> None:
    m = machine()
    other = IntelPlatform(NOW, fmspc=b"other!")
    result = Given(tee=tee, extra={
        "tcb-info.json": m.signed("tcbInfo", other.tcb_info(tee))}).run()  # fmt: skip
    assert result.refused_by == ("tcb.fmspc",)


@both
def test_att_20_att_21_signatures_and_keys_out_of_range_are_refused(tee: Tee) -> None:
    order = bytes.fromhex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551")
    for bad in (bytes(64), order * 2, b"\xff" * 64, bytes(32) + order, b"\0" * 63 + b"\1"):
        for field in ("signature", "qe_report_signature"):
            assert not Given(tee=tee, quote={"quote": {field: bad}}).run().genuine
        result = Given(tee=tee, quote={"quote": {"attestation_key": bad}}).run()
        assert {"quote.signature", "qe.binding"} <= set(result.refused_by)


@both
def test_att_22_every_byte_of_a_quote_counts(tee: Tee) -> None:
    """Whatever single byte is changed, the quote is not genuine, or it says nothing else."""
    given = Given(tee=tee)
    good = given.evidence()
    quote = read_quote(good)
    signed = len(quote.signed_bytes)
    chain_at = good.index(b"-----BEGIN")
    places = [*range(signed + 4 + 128 + 460 + 40), *range(chain_at, len(good), 97)]
    files = given.platform.endorsements(tee)
    for at in places:
        data = good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :]
        try:
            result = appraise(
                data,
                policy=AppraisalPolicy.strict(),
                freshness="not_checked",
                endorsements=files,
                roots=[given.platform.root],
                at=NOW,
            )
        except EvidenceFormatError:
            continue
        if result.genuine:
            # White space of PEM, or a bit of base64 that no byte has.
            assert at >= chain_at
            changed = read_quote(data)
            assert changed.signed_bytes == quote.signed_bytes
    assert signed > 400


@both
def test_att_22_what_follows_a_quote_is_zero_or_refused(tee: Tee) -> None:
    assert Given(tee=tee, edit=lambda data: data + bytes(70)).run().accepted
    for tail in (b"\1", bytes(70) + b"\1", b"\n"):
        result = Given(tee=tee, edit=lambda data, tail=tail: data + tail).run()  # type: ignore[misc]
        assert result.refused_by == ("quote.format",)


@pytest.mark.parametrize("number", [0, 3, 4, 16, 30, 62])
def test_att_25_attributes_that_nobody_knows_are_refused_unless_accepted(number: int) -> None:
    flags = (1 << number).to_bytes(8, "little")
    result = Given(tee="tdx", quote={"td_attributes": flags}).run()
    assert result.genuine
    assert result.accepted is (number == 30)
    permissive = AppraisalPolicy.permissive()
    assert Given(tee="tdx", quote={"td_attributes": flags}, policy=permissive).run().accepted


def test_att_25_a_module_that_was_updated_advises_to_relaunch() -> None:
    """Old at launch, new now: said so, and never taken for up to date."""
    levels = [
        {"tcb": {"isvsvn": svn}, "tcbDate": "2024-03-13T00:00:00Z", "tcbStatus": status}
        for svn, status in ((7, "UpToDate"), (4, "OutOfDate"))
    ]
    identity = machine().tcb_info("tdx")["tdxModuleIdentities"][0] | {"tcbLevels": levels}
    body = {
        "version": 5,
        "tee_tcb_svn": bytes((4, 1, 2, *bytes(13))),
        "tee_tcb_svn2": bytes((7, 1, 2, *bytes(13))),
    }
    given = Given(tee="tdx", quote=body, files={"tcb_info": {"tdxModuleIdentities": [identity]}})
    result = given.run()
    assert result.genuine
    assert result.refused_by == ("tcb.status",)
    assert result.claims["tcb_status"] == "TDRelaunchAdvised"
    status = next(check for check in result.checks if check.name == "tcb.status")
    assert "start the TD again" in (status.advice or "")
    policy = AppraisalPolicy.any_code(tcb_statuses=("TDRelaunchAdvised",))
    assert dataclasses.replace(given, policy=policy).run().accepted


def test_att_25_each_register_and_field_of_a_td_is_compared() -> None:
    fields: dict[str, tuple[str, Any]] = {
        "mrtd": ("mr_td", b"a" * 48),
        "mr_config_id": ("mr_config_id", b"b" * 48),
        "mr_owner": ("mr_owner", b"c" * 48),
        "mr_owner_config": ("mr_owner_config", b"d" * 48),
        "mr_seam": ("mr_seam", b"e" * 48),
    }
    body = dict(fields.values()) | {f"rtmr{n}": bytes([n]) * 48 for n in range(4)}
    named = {name: value for name, (_, value) in fields.items()}
    rtmrs = {n: bytes([n]) * 48 for n in range(4)}
    good = Given(tee="tdx", quote=body, policy=AppraisalPolicy(**named, rtmrs=rtmrs))
    assert good.run().identified
    assert good.run().accepted
    for name, (_, value) in fields.items():
        for index in (0, 47):
            bad = value[:index] + bytes([value[index] ^ 1]) + value[index + 1 :]
            policy = AppraisalPolicy(**named | {name: bad}, rtmrs=rtmrs)
            assert not dataclasses.replace(good, policy=policy).run().accepted
    for n in range(4):
        policy = AppraisalPolicy(**named, rtmrs=rtmrs | {n: b"x" * 48})
        assert not dataclasses.replace(good, policy=policy).run().accepted


def test_att_26_floors_and_equalities_of_an_enclave() -> None:
    body = {"isv_prod_id": 7, "isv_svn": 5, "config_id": b"c" * 64, "mrsigner": b"s" * 32}
    for policy, accepted in (
        ({"min_security_version": 5}, True),
        ({"min_security_version": 6}, False),
        ({"config_id": b"c" * 64}, True),
        ({"config_id": b"c" * 63 + b"d"}, False),
        ({"mrenclave": bytes(range(32))}, True),
        ({"mrenclave": bytes(range(31)) + b"x"}, False),
    ):
        options: dict[str, Any] = {"mrsigner": b"s" * 32, "product_id": 7}
        result = Given(quote=body, policy=AppraisalPolicy(**options | policy)).run()
        assert result.accepted is result.identified is accepted
    for product in (6, 8):
        wrong = AppraisalPolicy(mrsigner=b"s" * 32, product_id=product)
        assert not Given(quote=body, policy=wrong).run().accepted


def test_att_30_a_policy_for_one_tee_is_not_met_by_the_other() -> None:
    assert not Given(tee="tdx", policy=AppraisalPolicy(mrenclave=b"m" * 32)).run().accepted
    assert not Given(tee="sgx", policy=AppraisalPolicy(mrtd=b"m" * 48)).run().accepted


def test_att_30_each_sample_before_each_verifier(vectors: Path) -> None:
    """A quote is genuine for the verifier of its own TEE only, whatever its header claims."""
    genuine = 0
    for path in sorted((vectors / "attestation").glob("*/quote.bin")):
        case = json.loads((path.parent / "case.json").read_text())
        at = datetime.fromisoformat(case["verify_at"] or "2026-01-01T00:00:00Z")
        data = path.read_bytes()
        for tee in (0, 0x81):
            for version in (3, 4, 5):
                head = version.to_bytes(2, "little") + data[2:4] + tee.to_bytes(4, "little")
                for kind in ("sgx-quote", "tdx-quote"):
                    loaded = kinds.load(kind)
                    judged = loaded.checks.run(
                        loaded.case(
                            data=head + data[8:], policy=AppraisalPolicy.permissive(), at=at
                        )
                    )
                    holds = all(check.holds for check in judged if check.part == "evidence")
                    own = head == data[:8] and kind == ("tdx-quote" if tee else "sgx-quote")
                    assert own or not holds, (path.parent.name, kind, tee, version)
                    genuine += holds
    assert genuine >= 30


@both
def test_att_32_what_is_remembered_depends_on_nothing_else(tee: Tee) -> None:
    """Time, policy, nonce, roots and each file are judged anew, also with everything known."""
    clear()
    nonce = bytes(range(32))
    good = Given(tee=tee, quote={"report_data": nonce + bytes(32)}, nonce=nonce)
    data = good.evidence()
    good = dataclasses.replace(good, edit=lambda _: data)
    assert good.run().accepted
    m = machine()
    revoked = m.pck_crl(revoked=(_serial(m.pck),))
    for change in (
        {"nonce": bytes(32)},
        {"at": NOW + timedelta(days=40)},
        {"roots": False},
        {"policy": AppraisalPolicy(mrenclave=b"m" * 32)},
        {"policy": AppraisalPolicy.any_code(min_tcb_evaluation_number=99)},
        {"extra": {"pck-crl.der": revoked}},
        {"extra": {"tcb-info.json": m.signed("tcbInfo", m.tcb_info(tee, fmspc="00" * 6))}},
        {"files": {"leave_out": ("pck-crl.der",)}},
        {"files": {"qe_identity": qe_level("Revoked")}},
        {"edit": lambda _: data[:-400] + bytes([data[-400] ^ 1]) + data[-399:]},
    ):
        assert not dataclasses.replace(good, **change).run().accepted
        assert good.run().accepted


def _serial(certificate: bytes) -> int:
    from pyenclave.formats.x509 import Certificate

    return Certificate.from_der(certificate).serial


def test_one_pem_in_two_roles_is_judged_for_each() -> None:
    """A fact about a chain of issuers must not answer for the chain of a quote."""
    m = machine()
    issuers = pem(m.pck_ca.der) + pem(m.root_ca.der)
    result = Given(quote={"quote": {"certification_data": issuers}}).run()
    assert not result.genuine
    assert "chain.roles" in result.refused_by
    assert Given().run().accepted
    whole = Given(extra={"pck-crl-issuer-chain.pem": m.pck_chain}).run()
    assert "crl.chain" in whole.refused_by
    assert Given().run().accepted


def test_a_pck_signed_by_the_signer_of_tcb_infos_is_none() -> None:
    """The key for TCB infos is under the same root, but certifies no platform."""
    m = machine()
    made = other_pck(issuer=named_signer(), signer=m.tcb_key)
    chain = pem(made.pck) + pem(m.tcb_signing) + pem(m.root_ca.der)
    result = Given(platform=made, quote={"quote": {"certification_data": chain}}).run()
    assert {"chain.roles", "chain.constraints", "chain.key_usage"} <= set(result.refused_by)


def named_signer() -> bytes:
    from issuer_intel import named

    return named("Intel SGX TCB Signing")


@both
def test_a_tcb_info_signed_by_a_pck_key_is_refused(tee: Tee) -> None:
    """The owner of a machine may get at one PCK key; it must sign no collateral."""
    m = machine()
    info = m.signed("tcbInfo", m.tcb_info(tee), key=m.key)
    chain = pem(m.pck) + pem(m.pck_ca.der) + pem(m.root_ca.der)
    result = Given(tee=tee, extra={"tcb-info.json": info, "tcb-info-issuer-chain.pem": chain}).run()
    assert result.refused_by == ("tcb.chain",)


def test_quotes_without_certificates_need_them_beside() -> None:
    m = machine()
    ids = {"certification_type": 2, "certification_data": bytes(276)}
    without = Given(quote={"quote": ids}).run()
    assert without.refused_by[0] == "chain.format"
    advice = next(check.advice for check in without.checks if check.name == "chain.format")
    assert "pck-chain.pem" in (advice or "")
    assert Given(quote={"quote": ids}, extra={"pck-chain.pem": m.pck_chain}).run().accepted
    leaf = {"certification_type": 4, "certification_data": pem(m.pck)}
    assert Given(quote={"quote": leaf}).run().accepted
    lone = Given(quote={"quote": leaf}, files={"leave_out": ALL}).run()
    assert not lone.genuine
    other = IntelPlatform(NOW)
    wrong = {"quote": ids}
    assert not Given(quote=wrong, extra={"pck-chain.pem": other.pck_chain}).run().genuine


def test_a_chain_in_another_order_is_put_in_order_and_a_double_is_refused() -> None:
    """Some platforms hand out the root before the intermediate."""
    m = machine()
    a, b, c = pem(m.pck), pem(m.pck_ca.der), pem(m.root_ca.der)
    for parts, genuine in (((a, c, b), True), ((b, a, c), False), ((a, b, c, c), False)):
        quote = {"quote": {"certification_data": b"".join(parts)}}
        assert Given(quote=quote).run().genuine is genuine


def test_advice_says_what_to_do() -> None:
    result = Given(
        files={"tcb_info": level_of("sgx", status="SWHardeningNeeded", advisories=("INTEL-SA-1",))}
    ).run()
    check = next(check for check in result.checks if check.name == "tcb.status")
    assert check.found == "SWHardeningNeeded, INTEL-SA-1"
    for part in ("2024-03-13", "INTEL-SA-1", "hardened", "tcb_statuses", "accepted_advisories"):
        assert part in (check.advice or "")
    for name in [check.name for check in result.checks if check.outcome == "failed"]:
        assert next(check.advice for check in result.checks if check.name == name)


# ---- a second opinion ---------------------------------------------------------------------------


def _second_opinion(evidence: bytes, files: dict[str, bytes], at: datetime) -> Any:
    other = pytest.importorskip("dcap_qvl", reason="the second opinion is not installed")

    def inner(name: str, member: str) -> str:
        text = files[name].decode()
        begin = text.index(f'"{member}":') + len(member) + 3
        return text[begin : json.JSONDecoder().raw_decode(text, begin)[1]]

    collateral = other.QuoteCollateralV3(
        pck_crl_issuer_chain=files["pck-crl-issuer-chain.pem"].decode(),
        root_ca_crl=files["root-ca-crl.der"],
        pck_crl=files["pck-crl.der"],
        tcb_info_issuer_chain=files["tcb-info-issuer-chain.pem"].decode(),
        tcb_info=inner("tcb-info.json", "tcbInfo"),
        tcb_info_signature=bytes.fromhex(json.loads(files["tcb-info.json"])["signature"]),
        qe_identity_issuer_chain=files["qe-identity-issuer-chain.pem"].decode(),
        qe_identity=inner("qe-identity.json", "enclaveIdentity"),
        qe_identity_signature=bytes.fromhex(json.loads(files["qe-identity.json"])["signature"]),
    )
    try:
        return other.verify(evidence, collateral, int(at.timestamp()))
    except Exception as error:  # noqa: BLE001,RUF100 - whatever it raises is its opinion
        return error


def test_an_independent_verifier_agrees_on_every_published_quote(vectors: Path) -> None:
    """What it accepts, we accept with the same status and advisories; it refuses debug itself."""
    count = 0
    for path in sorted((vectors / "attestation").glob("*/case.json")):
        case = json.loads(path.read_text())
        if "quote.bin" not in case["files"].values() or not set(ALL) <= set(case["files"].values()):
            continue
        files = {name: (path.parent / name).read_bytes() for name in ALL}
        evidence = (path.parent / "quote.bin").read_bytes()
        at = datetime.fromisoformat(case["verify_at"])
        ours: AttestationResult = appraise(
            evidence,
            policy=AppraisalPolicy.permissive(),
            freshness="not_checked",
            endorsements=files,
            at=at,
        )
        theirs = _second_opinion(evidence, files, at)
        count += 1
        if isinstance(theirs, Exception):
            # Its default policy also wants no debug, and SEPT_VE_DISABLE.
            strict = "Debug mode" in str(theirs) or "SEPT_VE_DISABLE" in str(theirs)
            assert strict or not ours.genuine, (path.parent.name, str(theirs))
            continue
        assert ours.genuine, path.parent.name
        assert theirs.status == ours.claims["tcb_status"]
        assert sorted(theirs.advisory_ids) == ours.claims["advisory_ids"]
    assert count >= 30
