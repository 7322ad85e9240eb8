"""TPM structures of a quote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import tpm


def quote(**fields: object) -> tpm.TpmQuote:
    values: dict[str, object] = {
        "qualified_signer": b"\x00\x0b" + bytes(32),
        "extra_data": b"nonce",
        "selections": (tpm.PcrSelection("sha256", (0, 7, 23)),),
        "pcr_digest": bytes(32),
    }
    return tpm.TpmQuote(**(values | fields))  # type: ignore[arg-type]


def test_att_27_what_no_tpm_made_is_refused() -> None:
    data = quote().to_bytes()
    for bad, why in (
        (b"\xfe" + data[1:], "magic"),
        (data[:4] + b"\x80\x17" + data[6:], "type"),
        (data + b"\0", "follow"),
        (bytes(5000), "too long"),
    ):
        with pytest.raises(EvidenceFormatError, match=why):
            tpm.TpmQuote.from_bytes(bad)


def test_att_22_every_cut_of_a_quote_is_refused() -> None:
    data = quote().to_bytes()
    for size in range(len(data)):
        with pytest.raises(EvidenceFormatError):
            tpm.TpmQuote.from_bytes(data[:size])


def test_selections_that_make_no_sense_are_refused() -> None:
    once = tpm.PcrSelection("sha256", (1,))
    unknown = quote().to_bytes().replace(b"\x00\x0b\x03", b"\x00\x12\x03")
    wide = quote().to_bytes().replace(b"\x00\x0b\x03", b"\x00\x0b\x05")
    none = quote().to_bytes().replace(b"\x00\x0b\x03", b"\x00\x0b\x00")
    for bad in (quote(selections=(once, once)).to_bytes(), unknown, wide, none):
        with pytest.raises(EvidenceFormatError):
            tpm.TpmQuote.from_bytes(bad)
    with pytest.raises(EvidenceFormatError, match="number of PCR"):
        tpm.TpmQuote.from_bytes(quote(selections=(once,) * 17).to_bytes())


def test_safe_is_yes_or_no() -> None:
    data = bytearray(quote(extra_data=b"").to_bytes())
    data[6 + 36 + 2 + 16] = 2
    with pytest.raises(EvidenceFormatError, match="safe"):
        tpm.TpmQuote.from_bytes(bytes(data))


@given(
    st.binary(max_size=64),
    st.lists(st.sampled_from(["sha1", "sha256", "sha384"]), unique=True),
    st.sets(st.integers(0, 31)),
    st.integers(0, 2**64 - 1),
)
def test_reader_and_writer_of_quotes_agree(
    extra: bytes, banks: list[str], indices: set[int], clock: int
) -> None:
    selections = tuple(tpm.PcrSelection(bank, tuple(sorted(indices)), 4) for bank in banks)
    made = quote(extra_data=extra, selections=selections, clock=clock, safe=False)
    assert tpm.TpmQuote.from_bytes(made.to_bytes()) == made


def test_reader_and_writer_agree_on_the_vectors(vectors: Path) -> None:
    found = sorted(vectors.glob("attestation/*/tpm-quote.msg"))
    assert len(found) >= 4
    for path in found:
        assert tpm.TpmQuote.from_bytes(path.read_bytes()).to_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("scheme", "size"), [(tpm.ALG_RSASSA, 256), (tpm.ALG_RSAPSS, 384), (tpm.ALG_ECDSA, 64)]
)
def test_signatures_are_read_as_they_are_written(scheme: int, size: int) -> None:
    made = tpm.TpmSignature(scheme=scheme, hash="sha384", value=bytes(range(1, 65)) * (size // 64))
    data = made.to_bytes()
    assert tpm.TpmSignature.from_bytes(data) == made
    for bad in (data + b"\0", data[:-1], b"\x00\x05" + data[2:], data[:2] + b"\x00\x12" + data[4:]):
        with pytest.raises(EvidenceFormatError):
            tpm.TpmSignature.from_bytes(bad)


def test_a_bare_signature_has_exactly_the_size_of_the_key() -> None:
    assert tpm.TpmSignature.from_bytes(bytes(256), raw_size=256).value == bytes(256)
    for size in (255, 257):
        with pytest.raises(EvidenceFormatError):
            tpm.TpmSignature.from_bytes(bytes(size), raw_size=256)


@pytest.mark.parametrize(
    "public",
    [
        tpm.TpmPublic(attributes=0x50072, unique=b"\x80" * 256),
        tpm.TpmPublic(
            attributes=0x30472,
            unique=b"\x80" * 256,
            scheme=tpm.ALG_NULL,
            scheme_hash=None,
            symmetric=(6, 128, 0x43),
            auth_policy=bytes(32),
        ),
        tpm.TpmPublic(
            type=tpm.ALG_ECC, attributes=0x50072, scheme=tpm.ALG_ECDSA, bits=3, unique=b"\x07" * 64
        ),
    ],
)
def test_public_areas_are_read_as_they_are_written(public: tpm.TpmPublic) -> None:
    data = public.to_bytes()
    assert tpm.TpmPublic.from_bytes(data) == public
    assert public.name == b"\x00\x0b" + hashlib.sha256(data).digest()
    for size in range(len(data)):
        with pytest.raises(EvidenceFormatError):
            tpm.TpmPublic.from_bytes(data[:size])
    with pytest.raises(EvidenceFormatError):
        tpm.TpmPublic.from_bytes(data + b"\0")


def test_a_point_whose_halves_differ_in_length_is_refused() -> None:
    """Written again with padding, the key would have another name than the TPM gave it."""
    point = tpm.TpmPublic(
        type=tpm.ALG_ECC, attributes=0x50072, scheme=tpm.ALG_ECDSA, bits=3, unique=b"\x07" * 64
    ).to_bytes()
    short = point[:-34] + b"\x00\x1f" + b"\x07" * 31
    with pytest.raises(EvidenceFormatError, match="unique Y"):
        tpm.TpmPublic.from_bytes(short)


def test_pcr_values_are_read_strictly() -> None:
    zero = "00" * 32
    assert tpm.read_pcr_values(json.dumps({"sha256": {"7": zero}}).encode()) == {
        "sha256": {7: bytes(32)}
    }
    for bad in (
        b'{"sha256": {"7": "%b", "7": "%b"}}' % (zero.encode(), zero.encode()),
        b'{"sha256": {"07": "%b"}}' % zero.encode(),
        b'{"sha256": {"32": "%b"}}' % zero.encode(),
        b'{"sha256": {"-1": "%b"}}' % zero.encode(),
        b'{"sha256": {"\xd9\xa7": "%b"}}' % zero.encode(),
        b'{"sha384": {"7": "%b"}}' % zero.encode(),
        b'{"sha256": {"7": 7}}',
        b'{"sha256": {"7": "%b"}}' % ("0x" + zero[2:]).encode(),
        b'{"sha256": {"7": "%b"}}' % (" " + zero[1:]).encode(),
        b'{"md5": {}}',
        b'{"sha256": []}',
        b"[]",
        b"{}{}",
    ):
        with pytest.raises(EvidenceFormatError):
            tpm.read_pcr_values(bad)


def test_the_pcr_digest_follows_the_order_of_the_selection() -> None:
    values = {"sha256": {0: b"a" * 32, 7: b"b" * 32}, "sha1": {1: b"c" * 20}}
    first = (tpm.PcrSelection("sha1", (1,)), tpm.PcrSelection("sha256", (0, 7)))
    expected = hashlib.sha256(b"c" * 20 + b"a" * 32 + b"b" * 32).digest()
    assert tpm.pcr_digest(values, first, "sha256") == expected
    assert tpm.pcr_digest(values, first[::-1], "sha256") != expected
    assert tpm.pcr_digest(values, (tpm.PcrSelection("sha256", (3,)),), "sha256") is None
    assert tpm.pcr_digest(values, (tpm.PcrSelection("sha512", (0,)),), "sha256") is None
