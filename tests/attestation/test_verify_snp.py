"""SEV-SNP reports under attack, and what must not be refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import issuer_amd as amd
import pytest
from negatives_sev_snp_report import judged

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.attestation.amd import kds_url
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import snp
from pyenclave.formats.snp_certs import (
    GUID_ARK,
    GUID_ASK,
    GUID_VCEK,
    GUID_VLEK,
    CertificateTable,
)
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.certificates import Key, pem

GOOD = amd.Flaw("")
# What these change also changes what the policy compares.
TWICE = {"report.signature", "code.author_key_digest"}


def outcome(result: AttestationResult, name: str) -> Any:
    return next(check for check in result.checks if check.name == name)


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
@pytest.mark.parametrize("signer", ["vcek", "vlek"])
def test_a_good_report_is_accepted_identified_and_fresh(product: str, signer: str) -> None:
    result = judged(amd.Flaw("", lambda: amd.genuine(product, signer)))
    assert result.accepted, result.refused_by
    assert result.identified
    assert result.fresh
    assert result.claims["product"] == product
    assert result.claims["vek_chain_ok"]
    assert result.claims["report_signature_ok"]


@pytest.mark.parametrize("flaw", amd.FLAWS, ids=lambda flaw: flaw.check)
def test_each_flaw_is_found_by_its_check_and_no_other(flaw: amd.Flaw) -> None:
    """ATT-01 to 05, 16 to 20 and 23: the list names what is wrong with each."""
    result = judged(flaw)
    assert not result.accepted
    assert flaw.check in result.refused_by
    if flaw.check not in TWICE:
        assert result.refused_by == (flaw.check,)
    failed = outcome(result, flaw.check)
    assert failed.expected or failed.found


def test_att_02_a_root_of_the_same_name_is_no_anchor() -> None:
    result = judged(GOOD, roots=[])
    assert result.refused_by == ("chain.root",)
    # And AMD's chain is not one of a relying party's that pinned another root only by name.
    assert not judged(GOOD, roots=[amd.make(ark=other_key()).root]).genuine


def other_key() -> dict[str, Any]:
    return {"key": amd.forger(), "signer": amd.forger()}


def test_att_02_a_root_among_the_endorsements_is_no_anchor() -> None:
    made = amd.genuine()
    result = judged(GOOD, roots=[], endorsements=made.files | {"ark.pem": made.root})
    assert not result.genuine


def test_att_05_without_a_revocation_list_the_check_is_skipped_and_says_so() -> None:
    files = {name: data for name, data in amd.genuine().files.items() if name != "crl.der"}
    result = judged(GOOD, endorsements=files)
    assert result.accepted
    assert outcome(result, "crl").outcome == "skipped"
    assert "crl" in outcome(result, "crl").advice


@pytest.mark.parametrize("changes", [{"number": None}, {"key_id": False}])
def test_att_05_a_list_without_number_or_key_identifier_is_judged_by_its_signature(
    changes: dict[str, Any],
) -> None:
    made = amd.make(crl=changes)
    assert judged(amd.Flaw("", lambda: made)).accepted
    revoked = amd.make(crl=changes | {"revoked": (0x10001,)})
    assert judged(amd.Flaw("", lambda: revoked)).refused_by == ("crl",)
    forged = amd.make(crl=changes | {"signer": amd.forger(), "key_id": False})
    assert judged(amd.Flaw("", lambda: forged)).refused_by == ("crl",)


def test_the_whole_chain_may_stand_behind_the_endorsement_key() -> None:
    chip, files = amd.genuine().chip, amd.genuine().files
    leaf, ask, ark = pem(chip.vek), pem(chip.ask.der), pem(chip.ark.der)
    chain = leaf + ask + ark
    for given in (chain, chain + b"\0", leaf + ask):
        assert judged(GOOD, endorsements={"vek.der": given}).accepted
    assert judged(GOOD, endorsements=files | {"vek.der": chain}).accepted
    # A root in it is no anchor, and what stands there is judged like files of their own.
    assert judged(GOOD, endorsements={"vek.der": chain}, roots=[]).refused_by == ("chain.root",)
    for wrong in (leaf + ask + pem(AmdChip("genoa").ark.der), leaf + ark + ask, chain + ark):
        assert not judged(GOOD, endorsements={"vek.der": wrong}).genuine


def test_att_05_each_day_of_a_revocation_list_counts() -> None:
    made = amd.make(crl={"next_update": amd.AT})
    flaw = amd.Flaw("", lambda: made)
    assert judged(flaw).accepted
    assert judged(flaw, at=amd.AT + timedelta(seconds=1)).refused_by == ("crl",)


def test_att_12_each_byte_of_the_report_data_counts() -> None:
    expected = amd.NONCE.ljust(64, b"\0")
    for place in range(64):
        wrong = amd.flipped(place)(expected)
        result = judged(GOOD, report_data=wrong, nonce=None, freshness="not_checked")
        assert result.refused_by == ("report_data",)
    for size in (0, 32, 63, 65):
        with pytest.raises(ValueError, match="report_data"):
            judged(GOOD, report_data=bytes(size))


def test_att_13_a_report_for_another_nonce_is_refused() -> None:
    result = judged(GOOD, nonce=b"fresh challenge!")
    assert result.refused_by == ("nonce",)
    assert result.genuine
    assert not result.fresh


def test_a_hashed_nonce_counts_if_its_report_data_is_given() -> None:
    data = bytes(range(64))
    result = judged(amd.Flaw("", report={"report_data": data}), report_data=data)
    assert result.accepted
    assert result.fresh


def test_att_16_every_component_of_the_tcb_is_compared_by_itself() -> None:
    """Neither a higher component nor a bigger number makes up for a lower one."""
    held = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}
    assert judged(GOOD, policy=amd.policy(min_tcb=held)).accepted
    for name, level in held.items():
        demanded = dict.fromkeys(held, 0) | {name: level + 1}
        assert judged(GOOD, policy=amd.policy(min_tcb=demanded)).refused_by == ("tcb.minimum",)


def test_att_16_a_masked_chip_is_refused_unless_the_policy_allows_it() -> None:
    flaw = amd.Flaw("", report={"chip_id": bytes(64)})
    result = judged(flaw)
    assert result.genuine
    assert result.refused_by == ("platform.chip",)
    assert judged(flaw, policy=amd.policy(allow_masked_chip_id=True)).accepted


def test_att_16_a_vlek_is_no_vcek() -> None:
    """The certificate of a VLEK does not stand in for a VCEK, whatever the report says."""
    vlek, vcek = amd.genuine(signer="vlek"), amd.genuine()
    mixed = vcek.files | {"vek.der": vlek.files["vek.der"]}
    assert "chain.names" in judged(GOOD, endorsements=mixed).refused_by
    swapped = vlek.files | {"vek.der": vcek.files["vek.der"]}
    flaw = amd.Flaw("", lambda: amd.genuine(signer="vlek"))
    assert not judged(flaw, endorsements=swapped).genuine


def test_att_16_version_2_takes_the_product_from_the_certificate() -> None:
    for product in ("milan", "turin"):
        flaw = amd.Flaw("", lambda product=product: amd.genuine(product), {"version": 2})
        result = judged(flaw)
        assert result.accepted
        assert result.claims["product"] == product
        assert ("fmc" in result.claims["reported_tcb_decoded"]) is (product == "turin")


@pytest.mark.parametrize("vmpl", range(4))
@pytest.mark.parametrize("most", [None, 0, 1, 2, 3])
def test_att_17_levels_above_the_policys_are_refused(vmpl: int, most: int | None) -> None:
    flaw = amd.Flaw("", report={"vmpl": vmpl})
    result = judged(flaw, policy=amd.policy(max_vmpl=most))
    assert result.accepted is (most is None or vmpl <= most)


@pytest.mark.parametrize("name", sorted(set(snp.POLICY_BITS) - {"debug", "migrate_ma"}))
def test_att_18_each_bit_of_the_guest_policy_can_be_demanded(name: str) -> None:
    off, on = 1 << 17, 1 << 17 | snp.POLICY_BITS[name]
    for bits, demand, forbid in ((off, False, True), (on, True, False)):
        flaw = amd.Flaw("", report={"policy": bits})
        demanded = judged(flaw, policy=amd.policy(required_policy_bits=(name,)))
        assert demanded.accepted is demand
        forbidden = judged(flaw, policy=amd.policy(forbidden_policy_bits=(name,)))
        assert forbidden.accepted is forbid


def test_att_18_debug_and_migration_need_the_policys_consent() -> None:
    for bit, option in ((19, "allow_debug"), (18, "allow_migration_agent")):
        flaw = amd.Flaw("", report={"policy": 1 << 17 | 1 << bit})
        assert judged(flaw).genuine
        assert not judged(flaw).accepted
        assert judged(flaw, policy=amd.policy(**{option: True})).accepted
    permissive = AppraisalPolicy.permissive()
    flaw = amd.Flaw("", report={"policy": 7 << 17, "chip_id": bytes(64)})
    assert judged(flaw, policy=permissive).accepted


@pytest.mark.parametrize(("name", "size"), [("family_id", 16), ("image_id", 16), ("host_data", 32)])
def test_att_19_identities_of_the_id_block_are_compared_whole(name: str, size: int) -> None:
    value = bytes(range(size))
    flaw = amd.Flaw("", report={name: value})
    assert judged(flaw, policy=amd.policy(**{name: value})).accepted
    for place in range(size):
        wanted = {name: amd.flipped(place)(value)}
        assert judged(flaw, policy=amd.policy(**wanted)).refused_by == (f"guest.{name}",)


def test_att_19_the_signer_of_the_id_block_identifies_the_guest() -> None:
    flaw = amd.Flaw(
        "",
        report={"id_key_digest": b"\x5a" * 48, "author_key_digest": b"\x5b" * 48, "key_info": 1},
    )
    for named in ({"id_key_digest": b"\x5a" * 48}, {"author_key_digest": b"\x5b" * 48}):
        result = judged(flaw, policy=AppraisalPolicy(**named))
        assert result.accepted
        assert result.identified


@pytest.mark.parametrize(
    "half",
    [bytes(48), b"\xff" * 48, int.to_bytes(1, 48, "little")],
    ids=["zero", "too large", "one"],
)
def test_att_20_signatures_out_of_range_are_refused(half: bytes) -> None:
    for place in (0x2A0, 0x2E8):
        edit = lambda data, at=place: data[:at] + half + data[at + 48 :]  # noqa: E731
        assert judged(amd.Flaw("", edit=edit)).refused_by == ("report.signature",)


def test_att_20_big_endian_halves_are_no_signature() -> None:
    def edit(data: bytes) -> bytes:
        report = snp.SnpReport.from_bytes(data)
        r, s = report.signature_r[::-1], report.signature_s[::-1]
        return replace(report, signature_r=r, signature_s=s).to_bytes()

    assert judged(amd.Flaw("", edit=edit)).refused_by == ("report.signature",)


def test_att_30_reports_of_other_sizes_are_no_reports() -> None:
    data = GOOD.signed(bytes(64))
    for wrong in (data[:-1], data[32:], bytes(32) + data):
        options: dict[str, Any] = {
            "policy": amd.policy(),
            "freshness": "not_checked",
            "endorsements": amd.genuine().files,
            "roots": [amd.genuine().root],
            "at": amd.AT,
        }
        try:
            assert not appraise(wrong, **options).genuine
        except EvidenceFormatError:
            continue  # no kind of evidence at all


def test_att_31_a_policy_that_names_other_code_is_not_met() -> None:
    result = judged(GOOD, policy=AppraisalPolicy(mrenclave=b"\x11" * 32))
    assert result.genuine
    assert result.refused_by == ("code.kind",)


def test_att_36_a_floor_for_the_tcb_shuts_out_firmware_that_was_broken() -> None:
    """A signature by a genuine key says nothing of firmware from before its extraction."""
    result = judged(GOOD, policy=amd.policy(min_tcb={"bootloader": 5}))
    assert result.genuine
    assert result.refused_by == ("tcb.minimum",)
    assert "firmware" in outcome(result, "tcb.minimum").advice


# ---- where endorsements come from --------------------------------------------------------------


def table(made: amd.Made, guid: str, *others: str) -> bytes:
    files = {guid: "vek.der", GUID_ASK: "ask.pem", GUID_ARK: "ark.pem"}
    entries = [(g, made.files[files[g]]) for g in (guid, *others)]
    return CertificateTable(tuple(entries)).to_bytes()


@pytest.mark.parametrize("others", [(), (GUID_ASK,), (GUID_ASK, GUID_ARK)])
def test_the_hosts_certificate_table_is_as_good_as_files(others: tuple[str, ...]) -> None:
    made = amd.genuine()
    tail = table(made, GUID_VCEK, *others).ljust(8192, b"\0")
    rest = {GUID_ASK: "ask.pem", GUID_ARK: "ark.pem"}
    files = {name: made.files[name] for guid, name in rest.items() if guid not in others}
    flaw = amd.Flaw("", edit=lambda data: data + tail)
    assert judged(flaw, endorsements=files).accepted
    assert judged(flaw, endorsements=files, roots=[]).refused_by in (
        ("chain.root",),
        ("chain.signatures", "chain.root"),
    )


def test_the_table_gives_the_key_that_the_report_names() -> None:
    """A VLEK's certificate under the VCEK's GUID is not looked at, and the other way round."""
    made = amd.genuine(signer="vlek")
    files = {name: made.files[name] for name in ("ask.pem", "ark.pem")}
    for guid, holds in ((GUID_VLEK, True), (GUID_VCEK, False)):
        tail = table(made, guid)
        flaw = amd.Flaw("", lambda: made, edit=lambda data, tail=tail: data + tail)
        assert judged(flaw, endorsements=files).accepted is holds


def test_forms_in_which_services_hand_certificates_out_are_read() -> None:
    made = amd.genuine()
    leaf, ask, ark = (made.files[name] for name in ("vek.der", "ask.pem", "ark.pem"))
    for files in (
        {"vek.der": pem(leaf), "ask.pem": pem(ask), "ark.pem": pem(ark)},
        {"vek.der": leaf, "ask.pem": pem(ask) + pem(ark)},
        {"vek.der": leaf, "ask.pem": pem(ask) + pem(ark), "ark.pem": ark},
        {"vek.der": leaf, "ask.pem": ask},
    ):
        assert judged(GOOD, endorsements=files).accepted, files.keys()
    other = amd.make(ark=other_key()).files["ark.pem"]
    both = {"vek.der": leaf, "ask.pem": pem(ask) + pem(ark), "ark.pem": other}
    assert judged(GOOD, endorsements=both).refused_by == ("chain.format",)


def test_a_missing_certificate_comes_with_the_address_to_fetch_it_from() -> None:
    for product, text in (
        ("milan", "/vcek/v1/Milan/0102030405060708090a"),
        ("genoa", "?blSPL=09&teeSPL=00&snpSPL=23&ucodeSPL=72"),
        ("turin", "/vcek/v1/Turin/0102030405060708?fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=02&"),
    ):
        flaw = amd.Flaw("", lambda product=product: amd.genuine(product))
        result = judged(flaw, endorsements={})
        assert result.refused_by == ("chain.format",)
        assert text in outcome(result, "chain.format").advice
    vlek = amd.Flaw("", lambda: amd.genuine(signer="vlek"))
    advice = outcome(judged(vlek, endorsements={}), "chain.format").advice
    assert "cloud provider" in advice
    masked = amd.Flaw("", report={"chip_id": bytes(64)})
    assert "operator" in outcome(judged(masked, endorsements={}), "chain.format").advice


def test_the_address_names_the_chip_and_each_level() -> None:
    report = amd.genuine().chip.fields()
    assert kds_url(report, "milan").endswith("?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219")


# ---- what is remembered ------------------------------------------------------------------------


def test_att_32_a_chain_that_is_known_is_judged_again_each_time() -> None:
    assert judged(GOOD).accepted
    assert judged(GOOD, at=amd.AT.replace(year=2050)).refused_by == ("chain.validity", "crl")
    assert judged(GOOD, roots=[]).refused_by == ("chain.root",)
    revoked = amd.make(crl={"revoked": (0x10001,)}).files["crl.der"]
    files = amd.genuine().files | {"crl.der": revoked}
    assert judged(GOOD, endorsements=files).refused_by == ("crl",)
    assert judged(amd.Flaw("", key=lambda: Key.ec("P-384"))).refused_by == ("report.signature",)
    assert judged(GOOD).accepted


def test_genuine_vectors_need_the_leaf_only(vectors: Path) -> None:
    """ASK, ASVK and ARK come with the package."""
    found: Counter[bool] = Counter()
    for folder in sorted(vectors.glob("attestation/snp-v*")):
        at = amd.AT.replace(year=2025, month=5) if "vlek" in folder.name else amd.AT
        result = appraise(
            (folder / "report.bin").read_bytes(),
            policy=AppraisalPolicy.permissive(),
            freshness="not_checked",
            endorsements={"vek.der": (folder / "vek.der").read_bytes()},
            at=at,
        )
        found[result.accepted] += 1
    assert found[True] >= 12
    assert not found[False]
