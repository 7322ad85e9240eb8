"""Azure confidential VMs under attack, and what must not be refused."""

from __future__ import annotations

import hashlib
from typing import Any

import issuer_amd as amd
import issuer_azure as azure
import negatives_azure_hcl_snp as snp
import negatives_azure_hcl_tdx as tdx
import pytest

from pyenclave.attestation import AppraisalPolicy, AttestationResult
from pyenclave.formats import tpm
from pyenclave.formats.tpm import PcrSelection
from pyenclave.formats.x509 import Certificate
from pyenclave.testing.certificates import pem

GOOD = azure.Flaw("")
BOTH = pytest.mark.parametrize("judged", [snp.judged, tdx.judged], ids=["snp", "tdx"])


def outcome(result: AttestationResult, name: str) -> Any:
    return next(check for check in result.checks if check.name == name)


@BOTH
def test_a_good_vm_is_accepted_identified_and_fresh(judged: Any) -> None:
    result = judged(GOOD)
    assert result.accepted, [check for check in result.checks if not check.holds]
    assert result.identified
    assert result.fresh
    assert result.claims["ak_cert_chain_to_root"]
    assert result.claims["ak_cert_key_equals_hcl_ak"]
    assert result.claims["vtpm_quote"]["signature_ok"]
    assert len(result.claims["vtpm_quote"]["pcrs_sha256"]) == 24


@BOTH
@pytest.mark.parametrize("flaw", azure.FLAWS, ids=lambda flaw: flaw.check)
def test_att_27_each_flaw_is_found_by_its_check(judged: Any, flaw: azure.Flaw) -> None:
    """ATT-27: key, digest, selection, bank, magic, type, runtime data: one mutation each."""
    result = judged(flaw)
    assert not result.accepted
    assert flaw.check in result.refused_by
    failed = outcome(result, flaw.check)
    assert failed.expected or failed.found
    if failed.part == "policy":
        assert result.genuine


@BOTH
def test_the_report_alone_is_genuine_and_says_what_is_not_known(judged: Any) -> None:
    """Without a vTPM quote PCRs are not believed; a nonce may be in the guest's own data."""
    none = azure.without("tpm-quote.msg", "tpm-quote.sig", "tpm-pcrs.json", "ak-cert.pem")
    alone = azure.Flaw("", files=none)
    result = judged(alone, nonce=None, freshness="not_checked")
    assert result.accepted
    assert not result.fresh
    assert outcome(result, "quote.signature").outcome == "skipped"
    assert judged(alone, nonce=azure.USER_DATA).fresh
    refused = judged(alone, policy=AppraisalPolicy(pcrs={0: azure.PCR0}, **azure.FIRMWARE))
    assert "code.pcrs" in refused.refused_by


@BOTH
def test_a_nonce_in_the_report_does_not_make_an_old_quote_fresh(judged: Any) -> None:
    assert judged(GOOD, nonce=azure.USER_DATA).refused_by == ("nonce",)


@BOTH
@pytest.mark.parametrize("file", ["tpm-quote.sig", "tpm-pcrs.json", "tpm-eventlog.bin"])
def test_parts_of_a_quote_without_the_quote_are_refused(judged: Any, file: str) -> None:
    """They would be taken for proven."""
    names = {"tpm-quote.msg", "tpm-quote.sig", "tpm-pcrs.json"} - {file}
    flaw = azure.Flaw("", files=lambda _: dict.fromkeys(names) | {file: b"{}"})
    assert "quote.format" in judged(flaw, nonce=azure.USER_DATA).refused_by


@BOTH
def test_att_27_only_quoted_registers_are_believed(judged: Any) -> None:
    """The file of values may hold more; nothing proves the rest, and nothing is said of it."""
    selection = (PcrSelection("sha256", (0, 7)),)
    values = {"sha256": azure.machine(bytes).pcrs}
    digest = tpm.pcr_digest(values, selection, "sha256")
    flaw = azure.Flaw("", quote={"selections": selection, "pcr_digest": digest})
    result = judged(flaw, policy=AppraisalPolicy(pcrs={0: azure.PCR0}, **azure.FIRMWARE))
    assert result.accepted
    assert result.identified
    assert set(result.claims["vtpm_quote"]["pcrs_sha256"]) == {"0", "7"}
    unquoted = {0: azure.PCR0, 3: values["sha256"][3]}
    assert judged(flaw, policy=AppraisalPolicy(pcrs=unquoted, **azure.FIRMWARE)).refused_by == (
        "code.pcrs",
    )


@BOTH
def test_signatures_are_taken_bare_and_as_the_tpm_writes_them(judged: Any) -> None:
    assert judged(azure.Flaw("", files=azure.signature())).accepted


@BOTH
def test_an_attestation_key_certificate_without_its_issuers_adds_nothing(judged: Any) -> None:
    bare = azure.Flaw("", files=lambda _: {"ak-cert.pem": azure.bare()})
    result = judged(bare)
    assert result.accepted
    assert outcome(result, "ak.chain").outcome == "skipped"
    assert result.claims["ak_cert_chain_to_root"] is False


@BOTH
def test_att_02_the_attestation_keys_root_must_be_pinned(judged: Any) -> None:
    hardware = [tdx.platform().root] if judged is tdx.judged else [amd.genuine().root]
    root = pem(azure.vtpm_root())
    flaw = azure.Flaw("", files=lambda _: {"ak-cert.pem": azure.ak_certificate() + root})
    assert judged(flaw).accepted
    assert judged(flaw, roots=hardware).refused_by == ("ak.chain",)


@BOTH
def test_the_certificate_is_read_as_it_stands_in_the_vtpm(judged: Any) -> None:
    leaf = azure.bare()
    raw = Certificate.from_bytes(leaf).der
    padded = azure.Flaw("", files=lambda _: {"ak-cert.pem": leaf, "ak-cert-nv.der": raw + bytes(9)})
    result = judged(padded)
    assert result.accepted
    assert result.claims["ak_cert_trailing_zero_bytes_in_source"] == 9
    alone = azure.Flaw("", files=lambda _: {"ak-cert.pem": None, "ak-cert-nv.der": raw})
    assert judged(alone).accepted
    dirty = azure.Flaw("", files=lambda _: {"ak-cert.pem": None, "ak-cert-nv.der": raw + b"\1"})
    assert judged(dirty).refused_by == ("ak.format",)


@BOTH
@pytest.mark.parametrize("size", [0, 1, 32, 64])
def test_user_data_is_compared_with_its_padding(judged: Any, size: int) -> None:
    holds = size == 64  # the guest wrote 64 bytes, none of them padding
    assert judged(GOOD, user_data=azure.USER_DATA[:size]).accepted is holds


@BOTH
@pytest.mark.parametrize("hash_type", [1, 2, 3])
def test_the_claims_may_be_bound_by_each_hash(judged: Any, hash_type: int) -> None:
    assert judged(azure.Flaw("", {"hash_type": hash_type})).accepted


@BOTH
def test_att_12_the_whole_report_data_is_compared(judged: Any) -> None:
    """Not only its first half, where the hash stands."""
    digest = hashlib.sha256(azure.machine(bytes).runtime_data()).digest()
    assert judged(azure.Flaw("", {"report_data": digest + bytes(32)})).accepted
    for place in (0, 31, 32, 63):
        wrong = amd.flipped(place)(digest + bytes(32))
        assert judged(azure.Flaw("", {"report_data": wrong})).refused_by == ("hcl.binding",)


@pytest.mark.parametrize("vmpl", [1, 2, 3])
def test_att_17_a_report_that_the_guest_made_itself_binds_nothing(vmpl: int) -> None:
    guest = amd.Flaw("", report={"vmpl": vmpl})
    result = snp.judged(GOOD, guest)
    assert not result.genuine
    assert result.refused_by == ("hcl.vmpl",)


@pytest.mark.parametrize("flaw", amd.FLAWS, ids=lambda flaw: flaw.check)
def test_att_01_a_flaw_of_the_hardware_is_not_hidden_by_the_cloud(flaw: amd.Flaw) -> None:
    """ATT-01: by default on every path, also the wrapped ones; the policy's wishes likewise."""
    result = snp.judged(GOOD, flaw)
    assert not result.accepted
    name = "hcl.vmpl" if flaw.check == "guest.vmpl" else f"snp.{flaw.check}"
    assert name in result.refused_by


def test_att_01_a_debug_td_is_refused_behind_the_paravisor() -> None:
    debug = {"td_attributes": b"\1" + bytes(7)}
    result = tdx.judged(GOOD, report=debug, quoted=debug)
    assert result.genuine
    assert result.refused_by == ("tdx.td.debug",)


def test_a_tdreport_without_quote_proves_nothing_to_others() -> None:
    result = tdx.judged(GOOD, leave_out=("td-quote.bin",))
    assert not result.genuine
    assert result.refused_by == ("td.quote",)
    assert "tdquote" in outcome(result, "td.quote").advice
    assert result.claims["td_report"]["mr_td"] == tdx.MR_TD.hex()


@pytest.mark.parametrize(
    "field", ["report_data", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id", "mr_owner_config"]
)
def test_att_25_a_quote_of_another_report_is_refused(field: str) -> None:
    result = tdx.judged(GOOD, quoted={field: b"\1" * (64 if field == "report_data" else 48)})
    assert not result.genuine
    assert result.refused_by == ("td.binding",)
    assert result.claims["td_quote_ok"]
    assert not result.claims["td_quote_binds_same_report_data_and_mrtd"]


def test_a_quote_of_tdx_1_5_is_compared_in_what_it_has_more() -> None:
    assert tdx.judged(GOOD, quote={"version": 5}, quoted={"tee_tcb_svn2": tdx.SVN}).accepted
    other = tdx.judged(GOOD, quote={"version": 5}, quoted={"tee_tcb_svn2": bytes((6, *bytes(15)))})
    assert "td.binding" in other.refused_by


@pytest.mark.parametrize("kind", ["azure-hcl-snp", "azure-hcl-tdx"])
def test_att_30_hardware_of_one_kind_is_not_judged_as_the_other(kind: str) -> None:
    other = azure.machine(tdx.td_report, report_type=4).hcl_report()
    if kind == "azure-hcl-tdx":
        other = azure.machine(lambda _: bytes(1184)).hcl_report()
    result = tdx.of_another_kind(kind, other)
    assert not result.genuine
    assert "hcl.type" in result.refused_by


def test_att_31_a_policy_for_other_hardware_is_not_met() -> None:
    digest = AppraisalPolicy(launch_digest=amd.DIGEST)
    assert snp.judged(GOOD, policy=digest).accepted
    assert tdx.judged(GOOD, policy=digest).refused_by == ("code.kind",)
    assert snp.judged(GOOD, policy=AppraisalPolicy(mrtd=tdx.MR_TD)).refused_by == ("code.kind",)
