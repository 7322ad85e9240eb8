"""Hostile evidence across kinds, vendors, roots and layers, by the threat catalogue (B.4, B.5)."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import issuer_amd as amd
import issuer_eventlog as eventlog
import negatives_azure_hcl_snp as azure_snp
import negatives_azure_hcl_tdx as azure_tdx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from issuer_azure import Flaw
from issuer_intel import NOW, Given, machine, qe_level
from issuer_nitro import AT as NITRO_AT
from issuer_nitro import ISSUER, PCR0
from issuer_token import AT, FORGED, ear_claims, keys_of, maa_claims, make_certificate, token
from issuer_token import judge as judge_token
from token_negatives import rsa_key

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der, jose
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.certificates import Authority, Key, certificate, name, pem
from pyenclave.testing.intel import IntelPlatform

STRICT, PERMISSIVE = AppraisalPolicy.strict(), AppraisalPolicy.permissive()
BOTH = pytest.mark.parametrize("judged", [azure_snp.judged, azure_tdx.judged])
TEES = pytest.mark.parametrize("tee", ["sgx", "tdx"])


def of_intel(platform: IntelPlatform, *roots: bytes, policy: Any = STRICT) -> AttestationResult:
    return appraise(
        platform.enclave_quote(),
        policy=policy,
        freshness="not_checked",
        endorsements=platform.endorsements(),
        roots=list(roots),
        at=NOW,
    )


def of_chip(chip: AmdChip, *roots: bytes, files: dict[str, bytes] | None = None, **report: Any):
    return appraise(
        chip.report(**report),
        policy=STRICT,
        freshness="not_checked",
        endorsements=chip.endorsements() | (files or {}),
        roots=list(roots),
        at=amd.AT,
    )


# ---- anchors ------------------------------------------------------------------------------------


def test_att_02_a_root_pinned_for_one_purpose_cannot_call_itself_another_vendors():
    """Whoever has the key of a root that the caller gave makes any chain, but not its name."""
    platform = IntelPlatform(NOW)
    corporate = Authority.root(name(CN="Corporate Root"), platform.root_ca.key)
    assert of_intel(platform, platform.root).accepted
    for policy in (STRICT, PERMISSIVE):
        result = of_intel(platform, corporate.der, policy=policy)
        assert not result.genuine
        assert "chain.root" in result.refused_by
    # Nor does the name alone help, and neither does pinning both halves apart.
    namesake = Authority.root(platform.root_ca.subject, Key.ec())
    assert "chain.root" in of_intel(platform, corporate.der, namesake.der).refused_by


def test_att_02_a_corporate_root_makes_no_amd_and_no_collateral():
    chip = AmdChip("milan")
    other = Authority.root(name(CN="Corporate Root"), chip.ark.key, algorithm="rsa-pss-sha384")
    assert "chain.root" in of_chip(chip, other.der).refused_by
    platform = machine()
    mine = IntelPlatform(NOW)
    files = platform.endorsements() | {
        "tcb-info.json": mine.signed("tcbInfo", mine.tcb_info()),
        "tcb-info-issuer-chain.pem": pem(mine.tcb_signing) + pem(mine.root_ca.der),
    }
    result = appraise(
        platform.enclave_quote(),
        policy=STRICT,
        freshness="not_checked",
        endorsements=files,
        roots=[platform.root],
        at=NOW,
    )
    assert result.refused_by == ("tcb.chain",)


def test_att_02_roots_of_other_vendors_do_not_end_a_chain():
    chip, platform = AmdChip("milan"), machine()
    assert "chain.root" in of_chip(chip, platform.root, ISSUER.root()).refused_by
    assert "chain.root" in of_intel(platform, chip.root, ISSUER.root()).refused_by
    document = appraise(
        ISSUER.document(),
        policy=STRICT,
        freshness="not_checked",
        roots=[chip.root, platform.root],
        at=NITRO_AT,
    )
    assert document.refused_by == ("chain.root",)


def test_att_02_a_line_ends_in_its_own_root_only():
    milan, genoa = AmdChip("milan"), AmdChip("genoa")
    assert of_chip(genoa, genoa.root).accepted
    crossed = {"ask.pem": pem(milan.ask.der), "ark.pem": pem(milan.ark.der)}
    assert not of_chip(genoa, genoa.root, milan.root, files=crossed).genuine


def test_att_02_what_is_given_as_root_is_a_certificate():
    for junk in (b"", b"junk", pem(b"\x30\x00"), machine().root + machine().root):
        with pytest.raises(ValueError, match="root"):
            of_intel(machine(), junk)
    with pytest.raises(TypeError):
        appraise(
            machine().enclave_quote(),
            policy=STRICT,
            freshness="not_checked",
            roots=machine().root,  # type: ignore[arg-type]
        )


# ---- collateral ---------------------------------------------------------------------------------


@TEES
def test_att_10_the_identity_of_the_quoting_enclave_is_verified_and_enforced(tee: Any):
    """CVE-2026-22696: the identity was fetched, and never verified."""
    m = machine()
    sign = m.signed
    identity = m.qe_identity(tee)
    forged = sign("enclaveIdentity", identity, key=Key.ec())
    edited = sign("enclaveIdentity", identity).replace(b'"isvprodid":', b'"isvprodid": ')
    for data in (forged, edited):
        result = Given(tee=tee, extra={"qe-identity.json": data}).run()
        assert result.refused_by == ("qe.identity.signature",)
    stranger = pem(certificate(subject=name(CN="Intel SGX TCB Signing"),
        issuer=m.root_ca.subject, key=m.tcb_key, signer=Key.ec(), ca=False,
        usages=("digitalSignature",))) + pem(m.root_ca.der)  # fmt: skip
    chain = Given(tee=tee, extra={"qe-identity-issuer-chain.pem": stranger}).run()
    assert "qe.identity.chain" in chain.refused_by
    for changes in (
        {"mrsigner": "11" * 32},
        {"isvprodid": 9},
        {"miscselect": "01000000"},
        {"attributes": "13000000000000000000000000000000"},
    ):
        result = Given(tee=tee, files={"qe_identity": changes}).run()
        assert result.refused_by == ("qe.identity",)
    quoted = Given(tee=tee, quote={"qe": {"mrsigner": b"s" * 32}}).run()
    assert quoted.refused_by == ("qe.identity",)


@TEES
def test_att_10_a_revoked_quoting_enclave_is_no_early_success(tee: Any):
    revoked = {"qe_identity": qe_level("Revoked")}
    result = Given(tee=tee, files=revoked).run()
    assert result.refused_by == ("qe.level", "tcb.status")
    assert not result.genuine
    # The signatures behind it are still judged.
    wrong = Given(tee=tee, files=revoked, quote={"quote": {"signature": bytes(64)}}).run()
    assert set(wrong.refused_by) == {"qe.level", "tcb.status", "quote.signature"}


@TEES
def test_att_10_without_identity_only_intels_quoting_enclave_quotes(tee: Any):
    given = {"files": {"leave_out": ("qe-identity.json",)}, "policy": PERMISSIVE}
    assert Given(tee=tee, **given).run().genuine
    own = Given(tee=tee, quote={"qe": {"mrsigner": b"s" * 32}}, **given).run()
    assert own.refused_by == ("qe.origin",)


@pytest.mark.parametrize("oid", ["2.5.29.27", "2.5.29.28", "1.2.3"])
def test_att_05_partial_and_indirect_lists_are_refused(oid: str):
    """A delta, a list with a distribution point, and whatever else says that it is critical."""
    ca = machine().pck_ca
    key_id = der.encode_sequence(der.encode(0x80, ca.key.key_id))

    def extension(oid: str, value: bytes, *, critical: bool = False) -> bytes:
        flag = (der.encode_boolean(True),) if critical else ()
        return der.encode_sequence(der.encode_oid(oid), *flag, der.encode_octet_string(value))

    def listed(*more: bytes) -> bytes:
        algorithm = der.encode_sequence(der.encode_oid("1.2.840.10045.4.3.2"))
        usual = (
            extension("2.5.29.35", key_id),
            extension("2.5.29.20", der.encode_integer(1)),
        )
        tbs = der.encode_sequence(
            der.encode_integer(1),
            algorithm,
            ca.subject,
            der.encode_time(NOW - timedelta(days=1)),
            der.encode_time(NOW + timedelta(days=1)),
            der.encode(der.context(0), der.encode_sequence(*usual, *more)),
        )
        return der.encode_sequence(
            tbs, algorithm, der.encode_bit_string(ca.key.sign(tbs, "ecdsa-sha256"))
        )

    assert Given(extra={"pck-crl.der": listed()}).run().accepted
    partial = listed(extension(oid, der.encode_integer(1), critical=True))
    assert Given(extra={"pck-crl.der": partial}).run().refused_by == ("crl.pck",)


# ---- inside a cloud -----------------------------------------------------------------------------

EVENTS = ((0, b"firmware"), (7, b"secure boot"), (8, b"boot loader"))


def logged(
    *events: tuple[int, bytes], quoted: Any = EVENTS, only: Any = range(24), **extra: bytes
) -> dict[str, Any]:
    """Return a VM whose PCRs come from the events *quoted*, with a log of *events* beside."""
    values = {n: bytes(32) for n in range(24)} | eventlog.registers(eventlog.SHA256, *quoted)
    data = extra.get("log", eventlog.log(*events))
    return {
        "flaw": Flaw("", files=lambda _: {"tpm-eventlog.bin": data}),
        "vm": {"pcrs": {n: values[n] for n in only}},
    }


def run(judged: Any, made: dict[str, Any]) -> AttestationResult:
    if judged is azure_tdx.judged:
        made = made | {"vm": made["vm"] | {"report_type": 4}}
    return judged(made.pop("flaw"), **made)


@BOTH
def test_att_28_only_a_log_that_replays_to_quoted_registers_is_taken(judged: Any):
    assert run(judged, logged(*EVENTS)).accepted
    for events in (EVENTS[1:], EVENTS[::2], (*EVENTS, (0, b"one more")), ((0, b"other"),)):
        result = run(judged, logged(*events))
        assert result.refused_by == ("eventlog.replay",)
        (check,) = (item for item in result.checks if item.name == "eventlog.replay")
        assert check.advice


@BOTH
def test_att_28_a_log_of_registers_that_nobody_quoted_is_not_taken(judged: Any):
    """A quote of PCR 8 alone says nothing of what firmware measured."""
    for only in ((8,), (0, 8), (7, 8)):
        result = run(judged, logged(*EVENTS, only=only))
        assert result.refused_by == ("eventlog.replay",)
    assert run(judged, logged(*EVENTS, only=(0, 7))).accepted
    assert run(judged, logged()).refused_by == ("eventlog.replay",)


@BOTH
def test_att_28_a_bank_without_a_digest_for_each_event_is_not_taken(judged: Any):
    sha1 = eventlog.log(*EVENTS, banks=(eventlog.SHA1,))
    assert run(judged, logged(log=sha1)).refused_by == ("eventlog.replay",)


# ---- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=23))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-23))),
    ],
)
def test_att_04_at_the_ends_of_time_nothing_is_accepted_and_nothing_breaks(at: datetime):
    assert not Given(at=at).run().genuine
    chip = AmdChip("milan")
    for data, files, roots in (
        (chip.report(), chip.endorsements(), [chip.root]),
        (ISSUER.document(), {}, [ISSUER.root()]),
        (token(ear_claims()), keys_of(), []),
        (token(ear_claims(exp=253_402_300_799)), keys_of(), []),
    ):
        result = appraise(
            data,
            policy=AppraisalPolicy.any_code(),
            freshness="not_checked",
            endorsements=files,
            roots=roots,
            at=at,
        )
        if data.count(b".") != 2 or at.year != 9999:
            assert not result.accepted
        result.to_json()


# ---- documents and tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("named", [(4,), (3, 4), (1,), (2,), (16,), (1, 3)])
def test_att_31_registers_that_say_where_and_not_what_identify_nothing(named: tuple[int, ...]):
    values = {n: bytes([n + 1]) * 48 for n in range(32)} | {0: PCR0}
    document = ISSUER.document(pcrs=values)
    options: dict[str, Any] = {
        "freshness": "not_checked",
        "roots": [ISSUER.root()],
        "at": NITRO_AT,
    }
    weak = AppraisalPolicy(pcrs={n: values[n] for n in named})
    assert appraise(document, policy=weak, **options).refused_by == ("code.kind",)
    for strong in ((0,), (8,), (1, 2)):
        policy = AppraisalPolicy(pcrs={n: values[n] for n in (*named, *strong)})
        assert appraise(document, policy=policy, **options).identified


@pytest.mark.parametrize("kind", ["tpm", "vbs", "azurevm", "SGX", ""])
def test_jwt_16_a_token_of_a_machine_without_protection_is_refused(kind: str):
    key = rsa_key(0)
    data = token(maa_claims(**{"x-ms-attestation-type": kind}), key, algorithm="RS256")
    result = judge_token(data, endorsements=keys_of(key))
    assert "platform.software" in result.refused_by
    assert not result.accepted


def test_jwt_16_certificates_in_a_token_name_its_instance_too():
    """A root of the caller's makes the chain good; the instance that it names still counts."""
    key, above = rsa_key(0), rsa_key(1)
    root = make_certificate("root", above, ca=True)

    def judged(instance: str) -> AttestationResult:
        leaf = make_certificate(instance, key, issuer="root", signer=above)
        x5c = [base64.b64encode(leaf.public_bytes(Encoding.DER)).decode()]
        data = token(maa_claims(), key, kid=None, algorithm="RS256", x5c=x5c)
        return judge_token(data, endorsements={}, roots=[root.public_bytes(Encoding.DER)])

    assert judged("https://shared.eus.attest.azure.net").accepted
    assert judged("https://other.eus.attest.azure.net").refused_by == ("key.issuer",)


@pytest.mark.parametrize("name", ["enc", "zip", "p2c", "p2s", "epk"])
def test_jwt_11_jwt_15_nothing_is_decrypted_or_decompressed(name: str):
    """There is no key here that decrypts: what belongs to encrypted tokens is refused unread."""
    data = token(ear_claims(), **{name: "DEF"})
    result = judge_token(data)
    assert "token.format" in result.refused_by
    head, payload, signature = data.split(b".")
    five = b".".join((head, b"AAAA", payload, b"AAAA", signature))
    with pytest.raises(EvidenceFormatError):
        judge_token(five)


@pytest.mark.parametrize("algorithm", ["RSA1_5", "RSA-OAEP", "dir", "A128KW", "PBES2-HS256+A128KW"])
def test_jwt_15_algorithms_of_encryption_are_none_of_ours(algorithm: str):
    header = jose.b64url_encode(b'{"alg":"%s"}' % algorithm.encode())
    _, payload, signature = token(ear_claims()).split(b".")
    result = judge_token(b".".join((header.encode(), payload, signature)))
    assert "token.format" in result.refused_by


def test_jwt_16_an_older_key_of_the_issuer_is_no_longer_one():
    """What counts is the set that is given now; a verdict of before is not remembered."""
    data = token(ear_claims())
    assert judge_token(data).accepted
    assert not judge_token(data, endorsements=keys_of(FORGED)).genuine
    assert not judge_token(data, endorsements={}).genuine
    assert not judge_token(data, at=AT + timedelta(days=1)).genuine
    assert judge_token(data).accepted
