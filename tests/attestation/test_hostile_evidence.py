"""Evidence from an attacker: threat catalogue B.4, the parts that concern our own kind."""

from __future__ import annotations

import base64
import contextlib
import struct

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyenclave.attestation import AppraisalPolicy, appraise, kind_of, verify
from pyenclave.errors import AppraisalError, EvidenceFormatError
from pyenclave.formats import evidence as container
from pyenclave.formats.dcap import Quote

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
PERMISSIVE = AppraisalPolicy.permissive()


def refused_or_malformed(issuer, data: bytes) -> bool:
    """Judge by the weakest policy: only genuineness and the nonce stand in the way."""
    try:
        return not issuer.appraise(data, policy=PERMISSIVE).accepted
    except EvidenceFormatError:
        return True


@pytest.fixture(scope="module")
def evidence(issuer) -> bytes:
    data = issuer.evidence()
    assert not refused_or_malformed(issuer, data)
    return data


def test_one_flipped_bit_of_every_byte_is_refused(issuer, evidence):
    survivors = []
    for position in range(len(evidence)):
        changed = bytearray(evidence)
        changed[position] ^= 1 << position % 8
        if not refused_or_malformed(issuer, bytes(changed)):
            survivors.append(position)
    assert survivors == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_other_seven_bits_of_every_byte_are_refused(issuer, evidence):
    survivors = []
    for position in range(len(evidence) * 8):
        if position % 8 == position // 8 % 8:
            continue  # that one is above
        changed = bytearray(evidence)
        changed[position // 8] ^= 1 << position % 8
        if not refused_or_malformed(issuer, bytes(changed)):
            survivors.append(position)
    assert survivors == []


def test_every_truncation_and_extension_is_refused(issuer, evidence):
    for size in range(0, len(evidence), 37):
        assert refused_or_malformed(issuer, evidence[:size])
    for tail in (b"\0", b"\n", evidence):
        assert refused_or_malformed(issuer, evidence + tail)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=300), where=st.floats(0, 1))
def test_arbitrary_bytes_never_break_the_verifier(issuer, evidence, noise, where):
    position = int(where * len(evidence))
    assert refused_or_malformed(issuer, noise)
    assert refused_or_malformed(issuer, container.MAGIC + noise)
    changed = evidence[:position] + noise + evidence[position + len(noise) :]
    assert changed == evidence or refused_or_malformed(issuer, changed)


def test_att_02_a_root_with_the_same_name_and_another_key_is_no_root(issuer):
    forger = issuer.key("forger")
    chain = issuer.chain(root={"key": forger, "signer": forger}, intermediate={"signer": forger})
    forged = issuer.evidence(chain=chain)
    assert issuer.appraise(forged).refused_by == ("chain.root",)
    # Both roots are called the same; only the pinned key decides.
    assert issuer.appraise(forged, roots=[chain[-1]]).genuine
    assert not issuer.appraise(issuer.evidence(), roots=[chain[-1]]).genuine
    assert issuer.appraise(issuer.evidence(), roots=[chain[-1], issuer.root]).genuine


def test_att_02_intermediate_and_leaf_are_no_anchors(issuer):
    for certificate in issuer.chain()[:2]:
        result = issuer.appraise(issuer.evidence(), roots=[certificate])
        assert result.refused_by == ("chain.root",)


@pytest.mark.parametrize("order", [(0, 1), (0,), (2, 1, 0), (1, 0, 2), (0, 2, 1), (0, 1, 2, 2)])
def test_att_03_another_order_or_number_of_certificates_is_refused(order, issuer):
    chain = issuer.chain()
    pem = b"".join(chain[place].public_bytes(Encoding.PEM) for place in order)
    result = issuer.appraise(issuer.evidence(pem=pem))
    assert not result.genuine
    if len(order) != 3:
        assert result.refused_by == ("chain.format",)


def test_att_03_a_certificate_with_another_signature_hash_is_refused(issuer):
    from cryptography.hazmat.primitives import hashes

    for place in ("leaf", "intermediate", "root"):
        chain = issuer.chain(**{place: {"hash": hashes.SHA384()}})
        result = issuer.appraise(issuer.evidence(chain=chain))
        assert "chain.algorithms" in result.refused_by


@pytest.mark.parametrize(
    "edit",
    [
        lambda pem: pem + b"\0",
        lambda pem: pem + b"\n",
        lambda pem: b"text\n" + pem,
        lambda pem: pem.replace(b"\n", b"\r\n"),
        lambda pem: pem.replace(b"-----\n-----", b"-----\n\n-----"),
        lambda pem: pem.replace(b"BEGIN CERTIFICATE", b"BEGIN X509 CERTIFICATE"),
    ],
)
def test_att_23_only_the_canonical_form_of_the_chain_is_taken(edit, issuer):
    pem = b"".join(item.public_bytes(Encoding.PEM) for item in issuer.chain())
    assert edit(pem) != pem
    assert issuer.appraise(issuer.evidence(pem=edit(pem))).refused_by == ("chain.format",)


def test_att_23_unused_bits_in_the_signature_of_a_certificate_are_refused(issuer):
    """Nobody signs that byte; a lenient parser would take several values (found by flipping)."""
    for place in range(3):
        serial, leaf = 0, issuer.chain()[place]
        while leaf.signature[-1] & 1:  # some signature ends in a zero bit: then one is "unused"
            serial += 1
            end = issuer.END.replace(second=serial)
            leaf = issuer.chain(**{("leaf", "intermediate", "root")[place]: {"end": end}})[place]
        der = leaf.public_bytes(Encoding.DER)
        position = len(der) - len(leaf.signature) - 1
        assert der[position] == 0
        forged = der[:position] + b"\1" + der[position + 1 :]
        chain = [*issuer.chain()]
        chain[place] = leaf
        pems = [certificate.public_bytes(Encoding.PEM) for certificate in chain]
        assert issuer.appraise(issuer.evidence(pem=b"".join(pems))).genuine
        text = base64.encodebytes(forged).replace(b"\n", b"")
        lines = b"\n".join(text[i : i + 64] for i in range(0, len(text), 64))
        pems[place] = b"-----BEGIN CERTIFICATE-----\n" + lines + b"\n-----END CERTIFICATE-----\n"
        result = issuer.appraise(issuer.evidence(pem=b"".join(pems)))
        assert result.refused_by == ("chain.format",)


def test_att_04_the_time_of_judgement_is_recorded_and_needs_a_zone(issuer, evidence):
    result = issuer.appraise(evidence)
    assert result.claims["verify_at"] == issuer.AT.isoformat()
    assert result.at == issuer.AT
    with pytest.raises(ValueError, match="zone"):
        issuer.appraise(evidence, at=issuer.AT.replace(tzinfo=None))


RANGES = [
    (0, 0),
    (0, 1),
    (1, 0),
    (1, 1),
    (ORDER, 1),
    (1, ORDER),
    (ORDER + 1, 1),
    (2**256 - 1, 2**256 - 1),
]


@pytest.mark.parametrize(("r", "s"), RANGES)
@pytest.mark.parametrize(
    ("field", "check"), [("signature", "quote.signature"), ("qe_report_signature", "qe.signature")]
)
def test_att_20_degenerate_signatures_are_refused(r, s, field, check, issuer):
    raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    assert issuer.appraise(issuer.evidence(quote={field: raw})).refused_by == (check,)


@pytest.mark.parametrize(("r", "s"), RANGES)
def test_att_20_a_degenerate_signature_of_the_record_is_refused(r, s, issuer):
    raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    forged = issuer.parts().record[:-64] + raw
    result = issuer.appraise(issuer.evidence(record_bytes=forged))
    assert result.refused_by == ("record.signature",)


@pytest.mark.parametrize("field", ["signature", "qe_report_signature"])
def test_att_20_swapped_halves_and_other_byte_orders_are_refused(field, issuer):
    good = getattr(Quote.from_bytes(issuer.parts().quote), field)
    for bad in (good[32:] + good[:32], good[::-1], good[31::-1] + good[:31:-1]):
        assert not issuer.appraise(issuer.evidence(quote={field: bad})).genuine


@pytest.mark.parametrize(
    "point", [bytes(64), b"\xff" * 64, (1).to_bytes(32, "big") * 2, bytes(63) + b"\x01"]
)
def test_att_21_an_attestation_key_that_is_no_point_is_refused(point, issuer):
    result = issuer.appraise(issuer.evidence(attestation_public=point))
    assert result.refused_by == ("quote.signature", "record.signature")
    assert not result.genuine


@pytest.mark.parametrize(("offset", "width"), [(432, 4), (1012, 2), (1046, 2), (1048, 4)])
@pytest.mark.parametrize("value", ["less", "more", "zero", "max"])
def test_att_22_lying_lengths_in_the_quote_are_refused(offset, width, value, issuer):
    parts = issuer.parts()
    quote = bytearray(parts.quote)
    old = int.from_bytes(quote[offset : offset + width], "little")
    new = {"less": old - 1, "more": old + 1, "zero": 0, "max": (1 << 8 * width) - 1}[value]
    quote[offset : offset + width] = new.to_bytes(width, "little")
    data = container.Evidence(
        quote=bytes(quote),
        record=parts.record,
        runtime_key=parts.runtime_key,
        user_data=parts.user_data,
        nonce=parts.nonce,
    ).to_bytes()
    result = issuer.appraise(data)
    assert not result.genuine
    assert result.refused_by == ("quote.format",)


def test_att_24_a_record_in_another_json_form_is_refused(issuer):
    record = issuer.parts().record
    start, end = 12, len(record) - 64
    body = record[start:end]
    for changed in (
        body.replace(b'"debug":false', b'"debug": false'),
        body.replace(b'"debug":false', b'"debug":false,"debug":false'),
        body.replace(b'"jit":false', b'"jit":false,"x":1'),
        b"[" * 5000,
        b"\xff" + body[1:],
    ):
        assert changed != body
        forged = record[:8] + struct.pack("<I", len(changed)) + changed + record[end:]
        result = issuer.appraise(issuer.evidence(record_bytes=forged))
        assert result.refused_by == ("record.format",)


def test_att_29_nothing_in_the_environment_weakens_the_verifier(issuer, evidence, monkeypatch):
    for name in ("DEBUG", "SIMULATION", "TEST", "INSECURE", "ALLOW_DEBUG", "ROOTS", "STATE"):
        monkeypatch.setenv(f"PYENCLAVE_{name}", "1")
    assert not issuer.appraise(evidence, roots=[]).genuine
    assert not issuer.appraise(evidence, policy=AppraisalPolicy.strict()).accepted


def test_att_30_evidence_of_other_kinds_is_never_taken_for_ours(vectors):
    samples = [path for path in (vectors / "attestation").glob("*/*.bin") if path.is_file()]
    assert len(samples) > 20
    for path in samples:
        with contextlib.suppress(EvidenceFormatError):
            assert kind_of(path.read_bytes()) != "pyenclave"


def test_att_30_a_foreign_quote_in_our_container_is_refused(vectors, issuer):
    """A real Intel quote stays what it is: another vendor's, under another root."""
    folder = vectors / "attestation" / "sgx-v3-intel-sdk-svn-outofdate"
    quote = (folder / "quote.bin").read_bytes()
    data = container.Evidence(quote=quote, record=issuer.parts().record).to_bytes()
    result = issuer.appraise(data, freshness="not_checked", policy=PERMISSIVE)
    assert not result.genuine
    assert not result.accepted


@pytest.mark.parametrize("junk", [b"", b"P", b"PYEVID", b"\x02\x00\x02\x00" + bytes(1200), b"{}"])
def test_bytes_of_no_known_kind_are_a_format_error(junk, issuer):
    with pytest.raises(EvidenceFormatError, match="known kind"):
        issuer.appraise(junk)


def test_another_version_of_the_container_is_refused_and_nothing_else_is_judged(issuer, evidence):
    result = issuer.appraise(evidence[:7] + b"\x02" + evidence[8:])
    assert result.refused_by == ("evidence.format",)
    genuine = [check for check in result.checks if check.part == "evidence"]
    assert all(check.outcome == "skipped" for check in genuine[1:])


def test_att_13_evidence_is_good_for_its_own_nonce_only(issuer, evidence):
    assert issuer.appraise(evidence).fresh
    again = issuer.appraise(evidence, nonce=b"\x01" * 32)
    assert again.refused_by == ("nonce",)
    assert not again.fresh


def test_att_32_nothing_is_remembered_between_appraisals(issuer, evidence):
    assert issuer.appraise(evidence).accepted
    assert not issuer.appraise(evidence, nonce=b"\x01" * 32).accepted
    assert not issuer.appraise(evidence, roots=[]).accepted
    assert not issuer.appraise(evidence, at=issuer.END.replace(year=2030)).accepted
    assert not issuer.appraise(evidence, policy=AppraisalPolicy.strict()).accepted
    assert issuer.appraise(evidence).accepted


def test_verify_raises_with_the_whole_result(issuer, evidence):
    with pytest.raises(AppraisalError, match=r"code\.mrenclave") as caught:
        verify(
            evidence,
            policy=issuer.policy(mrenclave=b"\x99" * 32),
            nonce=issuer.NONCE,
            roots=[issuer.root],
            at=issuer.AT,
        )
    assert caught.value.result.refused_by == ("code.mrenclave",)
    assert caught.value.found == issuer.MRENCLAVE.hex()


def test_verify_returns_the_result_of_accepted_evidence(issuer, evidence):
    options = {"policy": issuer.policy(), "nonce": issuer.NONCE, "roots": [issuer.root]}
    assert verify(evidence, at=issuer.AT, **options).accepted


@pytest.mark.parametrize("form", ["certificate", "pem", "der"])
def test_roots_are_taken_as_certificate_pem_or_der(form, issuer, evidence):
    root = {
        "certificate": issuer.root,
        "pem": issuer.root.public_bytes(Encoding.PEM),
        "der": issuer.root.public_bytes(Encoding.DER),
    }[form]
    assert issuer.appraise(evidence, roots=[root]).accepted


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nonce": None}, ValueError),
        ({"nonce": b""}, ValueError),
        ({"nonce": b"short"}, ValueError),
        ({"nonce": bytes(1025)}, ValueError),
        ({"nonce": "00" * 16}, TypeError),
        ({"freshness": "not_checked"}, ValueError),
        ({"freshness": "whatever"}, ValueError),
        ({"report_data": b""}, ValueError),
        ({"report_data": bytes(63)}, ValueError),
        ({"report_data": bytes(65)}, ValueError),
        ({"user_data": "text"}, TypeError),
        ({"policy": None}, TypeError),
        ({"roots": b"-----BEGIN"}, TypeError),
        ({"roots": ["root.pem"]}, TypeError),
        ({"roots": [b"junk"]}, ValueError),
    ],
)
def test_att_12_impossible_arguments_are_refused_before_anything_is_judged(
    options, error, issuer, evidence
):
    values = {
        "policy": issuer.policy(),
        "nonce": issuer.NONCE,
        "roots": [issuer.root],
        "at": issuer.AT,
    }
    with pytest.raises(error):
        appraise(evidence, **(values | options))


def test_evidence_must_be_bytes(issuer):
    with pytest.raises(TypeError, match="evidence is bytes"):
        issuer.appraise("evidence")
