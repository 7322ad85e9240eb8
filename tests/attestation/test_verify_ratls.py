"""RA-TLS: evidence, claims and the certificate's key belong together, or it is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from issuer_ratls import (
    DICE,
    GONE,
    KEY,
    MRENCLAVE,
    NONCE,
    NOW,
    OTHER,
    PLATFORM,
    attested,
    claims_of,
    extension,
    judge,
    judge_keys,
    key_set,
    made,
    report_data,
)

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import cbor, der, ratls
from pyenclave.formats.cbor import Tag
from pyenclave.formats.ratls import RaTlsCertificate
from pyenclave.formats.sgx import Attributes
from pyenclave.testing.certificates import certificate, name, pem
from pyenclave.testing.intel import IntelPlatform


@pytest.mark.parametrize("algorithm", [1, 7, 8])
def test_a_certificate_with_bound_evidence_is_accepted_identified_and_fresh(
    algorithm: int,
) -> None:
    result = judge(made((DICE, extension(claims_of(algorithm=algorithm)))))
    assert result.kind == "ra-tls-cert"
    assert result.refused_by == ()
    assert result.accepted
    assert result.identified
    assert result.fresh
    assert not result.claims["legacy"]
    assert result.claims["mrenclave"] == MRENCLAVE.hex()


def test_a_td_in_a_certificate_is_judged_as_one() -> None:
    data = made((DICE, extension(td=True)))
    result = judge(data, td=True, policy=AppraisalPolicy(mrtd=bytes(range(48))))
    assert result.refused_by == ()
    assert result.identified
    assert not any(check.name.startswith("sgx.") for check in result.checks)
    other = judge(data, td=True, policy=AppraisalPolicy(mrtd=bytes(48)[:-1] + b"\1"))
    assert other.refused_by == ("tdx.code.mrtd",)


def test_pem_and_collateral_in_the_certificate_are_read() -> None:
    files = PLATFORM.endorsements()
    carried = [
        files[item]
        for item in (
            "tcb-info.json",
            "tcb-info-issuer-chain.pem",
            "pck-crl.der",
            "root-ca-crl.der",
            "pck-crl-issuer-chain.pem",
            "qe-identity.json",
            "qe-identity-issuer-chain.pem",
        )
    ]
    carried[0] += b"\0"
    inside = cbor.dumps(Tag(60000, [1, *carried]))
    both = (DICE, extension()), (ratls.OID_ENDORSEMENTS, inside)
    assert judge(pem(made(*both)), endorsements={}).accepted
    assert not judge(made(both[0]), endorsements={}).accepted
    carried[0] = carried[0].replace(b'"UpToDate"', b'"Outdated"')
    forged = cbor.dumps(Tag(60000, [1, *carried]))
    result = judge(made(both[0], (ratls.OID_ENDORSEMENTS, forged)), endorsements={})
    assert not result.genuine


FLAWS: dict[str, tuple[bytes, str]] = {
    "another key in the certificate": (
        made((DICE, extension()), key=OTHER, signer=OTHER),
        "binding.key",
    ),
    "no hash of the key": (made((DICE, extension(claims_of(pubkey_hash=GONE)))), "binding.key"),
    "an empty hash": (made((DICE, extension(claims_of(pubkey_hash=b"")))), "binding.key"),
    "an unknown algorithm": (
        made((DICE, extension(claims_of(pubkey_hash=cbor.dumps([2, bytes(32)]))))),
        "binding.key",
    ),
    "a hash of the wrong size": (
        made((DICE, extension(claims_of(pubkey_hash=cbor.dumps([7, bytes(32)]))))),
        "binding.key",
    ),
    "a hash that is cut": (
        made(
            (
                DICE,
                extension(
                    claims_of(pubkey_hash=cbor.dumps([1, hashlib.sha256(KEY.spki).digest()[:16]]))
                ),
            )
        ),
        "binding.key",
    ),
    "a hash with more after it": (
        made(
            (
                DICE,
                extension(
                    claims_of(
                        pubkey_hash=cbor.dumps([1, hashlib.sha256(KEY.spki).digest()]) + b"\0"
                    )
                ),
            )
        ),
        "binding.key",
    ),
    "claims of another quote": (
        made((DICE, extension(quoted=report_data(b"other")))),
        "binding.claims",
    ),
    "a report data with a tail": (
        made((DICE, extension(quoted=report_data(claims_of())[:63] + b"\1"))),
        "binding.claims",
    ),
    "the key's hash in the report data": (
        made((DICE, extension(quoted=hashlib.sha256(KEY.spki).digest() + bytes(32)))),
        "binding.claims",
    ),
    "a signature of another": (made((DICE, extension()), signer=OTHER), "certificate.signature"),
    "an expired certificate": (
        made((DICE, extension()), not_after=NOW - timedelta(seconds=1)),
        "certificate.validity",
    ),
    "an unknown issuer": (
        made((DICE, extension()), issuer=name(CN="somebody"), signer=OTHER),
        "certificate.signature",
    ),
    "a tag of a report": (made((DICE, extension(tag=60002))), "certificate.format"),
    "an unknown tag": (made((DICE, extension(tag=60003))), "certificate.format"),
    "no tag": (made((DICE, cbor.dumps([b"q", claims_of()]))), "certificate.format"),
    "three parts": (
        made((DICE, cbor.dumps(Tag(60000, [b"q", claims_of(), b""])))),
        "certificate.format",
    ),
    "claims without content": (
        made((DICE, cbor.dumps(Tag(60000, [b"q", cbor.dumps({})])))),
        "certificate.format",
    ),
    "claims that are a list": (
        made((DICE, cbor.dumps(Tag(60000, [b"q", cbor.dumps([1])])))),
        "certificate.format",
    ),
    "doubled claims": (
        made((DICE, extension(b"\xa2\x61a\x00\x61a\x01"))),
        "certificate.format",
    ),
    "a nonce that is text": (
        made((DICE, extension(claims_of(nonce="x" * 8)))),
        "certificate.format",
    ),
    "bytes after the evidence": (made((DICE, extension() + b"\0")), "certificate.format"),
    "an indefinite array": (
        made((DICE, b"\xd9\xea\x60\x9f" + extension()[4:] + b"\xff")),
        "certificate.format",
    ),
    "evidence of 65 KiB": (
        made((DICE, cbor.dumps(Tag(60000, [bytes(65_000), claims_of() + bytes(600)])))),
        "certificate.format",
    ),
    "a quote that is none": (
        made((DICE, cbor.dumps(Tag(60000, [bytes(600), claims_of()])))),
        "certificate.quote",
    ),
    "nothing": (made((DICE, b"")), "certificate.format"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_of_a_certificate_is_found(flaw: str) -> None:
    data, check = FLAWS[flaw]
    result = judge(data, policy=AppraisalPolicy.permissive(), nonce=None, freshness="not_checked")
    assert check in result.refused_by
    assert not result.genuine


def test_a_broken_extension_is_not_replaced_by_a_legacy_one() -> None:
    legacy = PLATFORM.enclave_quote(report_data=hashlib.sha256(KEY.spki).digest() + bytes(32))
    gramine = (ratls.OIDS_GRAMINE[0], legacy)
    assert judge(made(gramine), nonce=None, freshness="not_checked").genuine
    for broken in (b"", extension() + b"\0", extension(quoted=bytes(64))):
        result = judge(made((DICE, broken), gramine), nonce=None, freshness="not_checked")
        assert not result.genuine


@pytest.mark.parametrize("oid", [*ratls.OIDS_GRAMINE, *ratls.OIDS_OPEN_ENCLAVE])
def test_legacy_forms_are_read_marked_and_bound_to_the_key(oid: str) -> None:
    der_hash = hashlib.sha256(KEY.spki).digest() + bytes(32)
    quote = PLATFORM.enclave_quote(report_data=der_hash)
    result = judge(made((oid, quote)), nonce=None, freshness="not_checked")
    assert result.accepted, result.refused_by
    assert result.claims["legacy"]
    assert not result.fresh
    # They cannot carry a nonce.
    assert judge(made((oid, quote))).refused_by == ("nonce",)
    stolen = made((oid, quote), key=OTHER, signer=OTHER)
    assert "binding.key" in judge(stolen, nonce=None, freshness="not_checked").refused_by
    for data in (der_hash[:63] + b"\1", bytes(64), der_hash[::-1]):
        other = made((oid, PLATFORM.enclave_quote(report_data=data)))
        result = judge(other, nonce=None, freshness="not_checked")
        assert "binding.key" in result.refused_by


def test_an_open_enclave_report_has_a_header_that_fits() -> None:
    text = ratls.key_forms(KEY.spki)["pem+nul"]
    quote = PLATFORM.enclave_quote(report_data=hashlib.sha256(text).digest() + bytes(32))
    oid = ratls.OIDS_OPEN_ENCLAVE[0]
    size = len(quote).to_bytes(8, "little")
    header = b"\1\0\0\0\2\0\0\0" + size
    for value in (header + quote, quote, der.encode_octet_string(quote)):
        result = judge(made((oid, value)), nonce=None, freshness="not_checked")
        assert result.accepted, result.refused_by
        assert result.claims["binding"] == ["sha256(pem+nul)"]
    for value in (
        b"\1\0\0\0\1\0\0\0" + size + quote,
        header + quote[:-1],
        header + quote + b"\0",
        der.encode_octet_string(quote) + b"\0",
    ):
        result = judge(made((oid, value)), nonce=None, freshness="not_checked")
        assert "certificate.format" in result.refused_by


def oe_evidence(claims: bytes, *, quoted: bytes | None = None, **head: Any) -> bytes:
    data = report_data(claims) if quoted is None else quoted
    body = PLATFORM.enclave_quote(report_data=data) + claims
    fields = {"version": 3, "format": "a3a21e871b4d4014b70aa125d2fbcd8c", "size": len(body)} | head
    version, size = fields["version"], fields["size"]
    return struct.pack("<I16s4xQ", version, bytes.fromhex(fields["format"]), size) + body


@pytest.mark.parametrize("oid", ratls.OIDS_OPEN_ENCLAVE_EVIDENCE)
@pytest.mark.parametrize("form", ["pem+nul", "pem", "der"])
def test_open_enclaves_evidence_is_bound_by_its_claims(oid: str, form: str) -> None:
    text = ratls.key_forms(KEY.spki)[form]
    for claims, named in ((text, form), (hashlib.sha256(text).digest(), f"sha256({form})")):
        for value in (oe_evidence(claims), der.encode_octet_string(oe_evidence(claims))):
            result = judge(made((oid, value)), nonce=None, freshness="not_checked")
            assert result.accepted, result.refused_by
            assert result.claims["legacy"]
            assert result.claims["binding"] == [f"claims: {named}"]
        stolen = made((oid, oe_evidence(claims)), key=OTHER, signer=OTHER)
        refused = judge(stolen, nonce=None, freshness="not_checked").refused_by
        assert refused == ("binding.key",)
        # The claims beside the quote count only if the quote has their hash.
        unbound = made((oid, oe_evidence(claims, quoted=report_data(b"other claims"))))
        refused = judge(unbound, nonce=None, freshness="not_checked").refused_by
        assert refused == ("binding.claims",)
    assert judge(made((oid, oe_evidence(text)))).refused_by == ("nonce",)


@pytest.mark.parametrize("claims", [b"x", b"\0" * 32, b"", KEY.spki + b"\0", KEY.spki[:-1]])
def test_open_enclaves_evidence_names_the_whole_key_and_nothing_else(claims: bytes) -> None:
    oid = ratls.OIDS_OPEN_ENCLAVE_EVIDENCE[1]
    result = judge(made((oid, oe_evidence(claims))), nonce=None, freshness="not_checked")
    assert result.refused_by[:1] == (("binding.key",) if claims else ("certificate.format",))


@pytest.mark.parametrize(
    "head",
    [
        {"version": 2},
        {"format": "0da1fb09ad20bd4ba0b0a1bb2d1b1a1c"},
        {"size": 100},
        {"size": 1 << 63},
    ],
)
def test_an_open_enclave_header_that_does_not_fit_is_refused(head: dict[str, Any]) -> None:
    oid = ratls.OIDS_OPEN_ENCLAVE_EVIDENCE[1]
    good = oe_evidence(KEY.spki)
    for value in (oe_evidence(KEY.spki, **head), good[:-1], good[:40], good + b"\0", good[:450]):
        result = judge(made((oid, value)), nonce=None, freshness="not_checked")
        assert result.refused_by[:1] == ("certificate.format",)


def test_open_enclaves_key_forms_do_not_count_for_gramine() -> None:
    text = ratls.key_forms(KEY.spki)["pem+nul"]
    quote = PLATFORM.enclave_quote(report_data=hashlib.sha256(text).digest() + bytes(32))
    result = judge(made((ratls.OIDS_GRAMINE[0], quote)), nonce=None, freshness="not_checked")
    assert "binding.key" in result.refused_by


@pytest.mark.parametrize("nonce", [GONE, b"", NONCE[:-1], NONCE + b"\0", bytes(32)])
def test_att_13_another_nonce_is_refused(nonce: Any) -> None:
    result = judge(made((DICE, extension(claims_of(nonce=nonce)))))
    assert result.refused_by == ("nonce",)
    assert not result.fresh


def test_unknown_claims_are_ignored_and_known_ones_still_bind() -> None:
    data = made((DICE, extension(claims_of(key_0="value\0", key_1=b"x"))))
    assert judge(data).accepted


def test_an_issuer_that_is_given_may_sign_the_certificate() -> None:
    issuer = name(CN="issuer")
    root = certificate(
        subject=issuer, issuer=issuer, key=OTHER, signer=OTHER, ca=True, usages=("keyCertSign",)
    )
    data = made((DICE, extension()), issuer=issuer, signer=OTHER)
    assert judge(data, roots=[PLATFORM.root, root]).accepted
    assert judge(data).refused_by == ("certificate.signature",)


def test_att_01_debug_and_other_code_are_refused_inside_a_certificate() -> None:
    buffer = claims_of()
    quote = PLATFORM.enclave_quote(report_data=report_data(buffer), mrenclave=b"\7" * 32)
    result = judge(made((DICE, cbor.dumps(Tag(60000, [quote, buffer])))))
    assert result.refused_by == ("sgx.code.mrenclave",)
    assert not result.identified


def test_att_02_the_quotes_root_is_not_the_certificates() -> None:
    result = judge(made((DICE, extension())), roots=[])
    assert "sgx.chain.root" in result.refused_by
    assert not result.genuine


def test_gramines_null_parameter_is_the_only_one_that_is_taken() -> None:
    data = made((DICE, extension()))
    plain = der.encode_sequence(der.encode_oid("1.2.840.10045.4.3.2"))
    for parameters, genuine in ((b"\x05\x00", True), (b"\x30\x00", False)):
        other = der.encode_sequence(der.encode_oid("1.2.840.10045.4.3.2"), parameters)
        # Sign again: the algorithm is part of what is signed.
        outer = der.Der(data, "certificate").sequence()
        tbs = der.Der(outer.element(), "tbs")
        content = tbs.content(der.SEQUENCE).replace(plain, other, 1)
        signed = der.encode(der.SEQUENCE, content)
        signature = KEY.sign(signed, "ecdsa-sha256")
        changed = der.encode_sequence(signed, other, der.encode_bit_string(signature))
        assert judge(changed).genuine is genuine


def test_each_byte_of_the_claims_and_of_the_key_counts() -> None:
    data = made((DICE, extension()))
    spki, buffer = data.index(KEY.spki), data.index(claims_of())
    policy = AppraisalPolicy.permissive()
    places = [*range(spki, spki + len(KEY.spki)), *range(buffer, buffer + len(claims_of()))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 0x10
        try:
            result = judge(bytes(changed), policy=policy, nonce=None, freshness="not_checked")
        except EvidenceFormatError:
            continue
        assert not result.genuine, place


def test_the_writer_and_the_reader_agree() -> None:
    buffer = ratls.claims_buffer(KEY.spki, nonce=NONCE)
    quote = PLATFORM.enclave_quote(report_data=report_data(buffer))
    data = made((DICE, ratls.evidence_extension(quote, claims_buffer=buffer)))
    found = RaTlsCertificate.from_bytes(data)
    assert (found.quote, found.claims_buffer, found.nonce) == (quote, buffer, NONCE)
    assert judge(data).accepted


# ---- key sets whose certificates carry quotes -------------------------------------------------


def test_an_attested_key_set_is_genuine_and_each_flaw_is_found() -> None:
    plain = made()
    good = judge_keys(key_set(attested(), plain))
    assert good.kind == "maa-jwks"
    assert good.accepted, good.refused_by
    assert good.claims["attested_keys"] == ["key 0"]
    kid = base64.b64encode(bytes(32)).decode()
    for data, check in (
        (key_set(plain), "keys.attested"),
        (key_set(attested(quoted=bytes(64))), "binding.key"),
        (key_set(attested(key=OTHER, signer=OTHER)), "binding.key"),
        (key_set(attested(signer=OTHER)), "certificate.signature"),
        (key_set(attested(not_after=NOW - timedelta(days=1))), "certificate.validity"),
        (key_set(attested(), attested(quoted=bytes(64))), "binding.key"),
        (key_set(attested(), kid=kid), "key.name"),
        (key_set(attested(), plain, kid="one"), "keys.format"),
        (b'{"keys":[]}', "keys.format"),
        (b'{"keys":[{"kid":"a"}]}', "keys.format"),
    ):
        result = judge_keys(data)
        assert check in result.refused_by
        assert not result.genuine
    assert "quote.chain.root" in judge_keys(key_set(attested()), roots=[]).refused_by


def test_the_second_attested_key_is_judged_as_well() -> None:
    text = ratls.key_forms(KEY.spki)["pem+nul"]
    stranger = IntelPlatform(NOW)
    quote = stranger.enclave_quote(report_data=hashlib.sha256(text).digest() + bytes(32))
    forged = made((ratls.OIDS_OPEN_ENCLAVE[0], quote))
    result = judge_keys(key_set(attested(), forged))
    assert result.refused_by == ("keys.attested",)
    debug = attested(body={"attributes": Attributes(flags=0x07, xfrm=0xE7)})
    result = judge_keys(key_set(attested(), debug))
    assert result.genuine
    assert result.refused_by == ("keys.policy",)


def test_azures_key_set_of_the_vectors_comes_out_as_expected(vectors: Path) -> None:
    folder = vectors / "attestation" / "maa-signing-certs-with-sgx-quote"
    case = json.loads((folder / "case.json").read_bytes())
    result = appraise(
        (folder / case["files"]["jwks"]).read_bytes(),
        policy=AppraisalPolicy.permissive(),
        freshness="not_checked",
        at=datetime.fromisoformat(case["verify_at"]),
    )
    assert result.kind == case["kind"]
    assert result.genuine
    for item in ("keys", "first_cert", "first_cert_valid"):
        assert result.claims[item] == case["expect"][item], item


def test_a_certificate_of_azures_own_is_told_and_judged_alike(vectors: Path) -> None:
    folder = vectors / "attestation" / "maa-signing-certs-with-sgx-quote"
    case = json.loads((folder / "case.json").read_bytes())
    keys = json.loads((folder / case["files"]["jwks"]).read_bytes())["keys"]
    result = appraise(
        base64.b64decode(keys[0]["x5c"][0]),
        policy=AppraisalPolicy.permissive(),
        freshness="not_checked",
        at=datetime.fromisoformat(case["verify_at"]),
    )
    assert result.kind == "maa-cert"
    assert result.genuine, result.refused_by
    first = case["expect"]["first_cert"]
    for item in ("mrenclave", "mrsigner", "debug", "report_data", "binding"):
        assert result.claims[item] == first[item]
