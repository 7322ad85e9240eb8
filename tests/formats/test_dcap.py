"""Quotes of versions 3 to 5: every length and number that an attacker may set."""

from __future__ import annotations

import dataclasses
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.dcap import (
    MAX_QUOTE_SIZE,
    MIN_QUOTE_SIZE,
    QE_VENDOR_INTEL,
    TEE_TDX,
    Quote,
    TdQuote,
    read_quote,
)
from pyenclave.formats.sgx import Attributes, ReportBody
from pyenclave.formats.tdx import TdExtension, TdReportBody

if TYPE_CHECKING:
    from pathlib import Path

AUTH = b"a" * 32
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\n" + b"x" * 100


def quote(**fields: Any) -> Quote:
    """A quote that is well-formed, though nobody signed it."""
    body = ReportBody(
        mrenclave=b"e" * 32, mrsigner=b"s" * 32, attributes=Attributes(flags=5, xfrm=3)
    )
    default: dict[str, Any] = {
        "report_body": body,
        "signature": b"g" * 64,
        "attestation_key": b"k" * 64,
        "qe_report": body,
        "qe_report_signature": b"q" * 64,
        "qe_auth_data": AUTH,
        "certification_type": 5,
        "certification_data": CERTIFICATE,
    }
    return Quote(**default | fields)


DATA = quote().to_bytes()
# Name, offset and size of every number that says how something is to be read.
NUMBERS = {
    "version": (0, 2),
    "key type": (2, 2),
    "tee type": (4, 4),
    "signature data length": (432, 4),
    "auth data size": (1012, 2),
    "certification type": (1014 + len(AUTH), 2),
    "certification size": (1016 + len(AUTH), 4),
}


def with_number(name: str, value: int) -> bytes:
    """DATA with one of its numbers replaced."""
    offset, size = NUMBERS[name]
    return DATA[:offset] + value.to_bytes(size, "little") + DATA[offset + size :]


def number(name: str) -> int:
    """One of DATA's numbers."""
    offset, size = NUMBERS[name]
    return int.from_bytes(DATA[offset : offset + size], "little")


# ---- hostile input ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
def test_every_wrong_number_is_refused(name: str) -> None:
    """Each by one up and down, zero, the largest, half of it, and each single bit."""
    good = number(name)
    bits = 8 * NUMBERS[name][1]
    values = {0, 1, good - 1, good + 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1}
    values |= {good ^ 1 << bit for bit in range(bits)}
    values.discard(good)
    if name == "certification type":
        values.discard(4)  # a lone certificate has no size to check
    for value in values:
        if value < 0:
            continue
        with pytest.raises(EvidenceFormatError):
            Quote.from_bytes(with_number(name, value))


def test_two_lengths_that_agree_with_each_other_but_not_with_the_data_are_refused() -> None:
    data = bytearray(DATA)
    for delta in (-1, 1, 1000, 1 << 20):
        struct.pack_into("<I", data, 432, number("signature data length") + delta)
        struct.pack_into("<I", data, NUMBERS["certification size"][0],
                         number("certification size") + delta)  # fmt: skip
        with pytest.raises(EvidenceFormatError):
            Quote.from_bytes(data)


def test_every_truncation_is_refused() -> None:
    for size in range(len(DATA)):
        with pytest.raises(EvidenceFormatError):
            Quote.from_bytes(DATA[:size])


@pytest.mark.parametrize("size", [0, 1, MIN_QUOTE_SIZE - 1, MAX_QUOTE_SIZE + 1, 1 << 20])
def test_impossible_sizes_are_refused_at_once(size: int) -> None:
    with pytest.raises(EvidenceFormatError, match="the size is wrong"):
        Quote.from_bytes(bytes(size))


@pytest.mark.parametrize("tail", [b"\x01", b"\x00" * 69 + b"\x01", b"\n", DATA])
def test_anything_but_zeros_after_a_quote_is_refused(tail: bytes) -> None:
    with pytest.raises(EvidenceFormatError, match="zero bytes"):
        Quote.from_bytes(DATA + tail)


@pytest.mark.parametrize("size", [1, 70, 4096])
def test_zero_padding_after_a_quote_is_no_part_of_it(size: int) -> None:
    padded = Quote.from_bytes(DATA + bytes(size))
    assert padded == quote()
    assert padded.to_bytes() == DATA


def test_zeros_inside_the_signature_data_are_refused() -> None:
    """Padding stands after the signature data; what its length covers is read to the end."""
    data = bytearray(DATA + bytes(10))
    struct.pack_into("<I", data, 432, number("signature data length") + 10)
    with pytest.raises(EvidenceFormatError, match="nothing"):
        Quote.from_bytes(data)


@pytest.mark.parametrize("start", [48, 564])
def test_reserved_bytes_of_both_reports_are_demanded(start: int) -> None:
    data = bytearray(DATA)
    for at in (*range(20, 32), *range(96, 128), *range(160, 192), *range(262, 304)):
        data[start + at] ^= 0x80
        with pytest.raises(EvidenceFormatError, match="reserved"):
            Quote.from_bytes(data)
        data[start + at] ^= 0x80


def test_every_single_bit_is_refused_or_shows() -> None:
    """No bit of a quote may be changed without the value, hence the signed bytes, changing."""
    data = bytearray(DATA)
    original = quote()
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            try:
                value = Quote.from_bytes(data)
            except EvidenceFormatError:
                pass
            else:
                assert value != original
                assert value.to_bytes() == data
                assert value.signed_bytes == data[:432]
            data[at] ^= 1 << bit


@pytest.mark.parametrize("kind", [0, 6, 7, 255, 65535])
def test_certification_types_of_other_versions_are_refused(kind: int) -> None:
    with pytest.raises(EvidenceFormatError, match="certification data type") as caught:
        Quote.from_bytes(with_number("certification type", kind))
    assert caught.value.found == kind


@pytest.mark.parametrize(("kind", "size"), [(1, 36), (2, 276), (3, 404)])
def test_platform_ids_have_one_size_each(kind: int, size: int) -> None:
    content = random.Random(kind).randbytes(size)
    value = quote(certification_type=kind, certification_data=content)
    ids = Quote.from_bytes(value.to_bytes()).platform_ids
    assert ids is not None
    assert ids.ppid + ids.cpu_svn == content[:-4]
    assert struct.pack("<HH", ids.pce_svn, ids.pce_id) == content[-4:]
    for wrong in (size - 1, size + 1, 0):
        with pytest.raises(ValueError, match="wrong size"):
            quote(certification_type=kind, certification_data=bytes(wrong)).to_bytes()
        data = value.to_bytes()[: NUMBERS["certification size"][0]]
        data += struct.pack("<I", wrong) + bytes(wrong)
        data = data[:432] + struct.pack("<I", len(data) - 436) + data[436:]
        with pytest.raises(EvidenceFormatError, match=r"wrong size|the size is wrong"):
            Quote.from_bytes(data)


@pytest.mark.parametrize("kind", [4, 5])
def test_empty_certificates_are_refused(kind: int) -> None:
    with pytest.raises(ValueError, match="empty"):
        quote(certification_type=kind, certification_data=b"").to_bytes()
    data = DATA[: NUMBERS["certification type"][0]] + struct.pack("<HI", kind, 0)
    data = data[:432] + struct.pack("<I", len(data) - 436) + data[436:]
    with pytest.raises(EvidenceFormatError, match="empty"):
        Quote.from_bytes(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("signature", bytes(63)),
        ("attestation_key", bytes(65)),
        ("qe_report_signature", b""),
        ("qe_auth_data", bytes(65536)),
        ("certification_type", 6),
        ("qe_vendor_id", bytes(15)),
        ("user_data", bytes(21)),
        ("qe_svn", 65536),
    ],
)
def test_writing_refuses_what_does_not_fit(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="quote"):
        dataclasses.replace(quote(), **{field: value}).to_bytes()


@settings(max_examples=300)
@given(data=st.binary(max_size=200), at=st.integers(0, len(DATA)), cut=st.integers(0, 200))
def test_reading_never_fails_in_another_way(data: bytes, at: int, cut: int) -> None:
    """Whatever is put in the place of some bytes: a quote that writes back the same, or refusal."""
    hostile = DATA[:at] + data + DATA[at + cut :]
    try:
        value = Quote.from_bytes(hostile)
    except EvidenceFormatError:
        return
    written = value.to_bytes()
    assert hostile.startswith(written)
    assert not any(hostile[len(written) :])


# ---- published quotes -------------------------------------------------------------------------


def test_published_quotes_are_read_and_written_back(vectors: Path) -> None:
    kinds = set()
    count = 0
    for file in sorted((vectors / "attestation").glob("*sgx*/quote.bin")):
        data = file.read_bytes()
        value = Quote.from_bytes(data)
        assert value.to_bytes() == data
        assert value.signed_bytes == data[:432]
        assert value.qe_report.to_bytes() == data[564:948]
        assert value.qe_vendor_id == QE_VENDOR_INTEL
        assert (value.platform_ids is None) == (value.certification_type in (4, 5))
        kinds.add(value.certification_type)
        count += 1
    assert count >= 17
    assert kinds == {3, 5}


def test_published_td_quotes_are_read_and_written_back(vectors: Path) -> None:
    bodies = set()
    for file in sorted((vectors / "attestation").glob("*/*quote.bin")):
        data = file.read_bytes()
        if data[4] != TEE_TDX:
            continue
        value = TdQuote.from_bytes(data)
        assert value.to_bytes() == data.rstrip(b"\0").ljust(len(value.to_bytes()), b"\0")
        again = dataclasses.replace(value)
        assert again.signed_bytes == value.signed_bytes == data[: len(value.signed_bytes)]
        bodies.add((value.version, value.body_type))
    assert bodies == {(4, 2), (5, 3)}


def test_att_30_each_reader_refuses_the_other_tee_and_other_versions(vectors: Path) -> None:
    for file in sorted((vectors / "attestation").glob("*/*quote.bin")):
        data = file.read_bytes()
        wrong, right = (Quote, TdQuote) if data[4] == TEE_TDX else (TdQuote, Quote)
        with pytest.raises(EvidenceFormatError, match="is not supported"):
            wrong.from_bytes(data)
        assert read_quote(data) == right.from_bytes(data)
        for version in {3, 4, 5} - {data[0]}:
            with pytest.raises(EvidenceFormatError, match="version is not supported"):
                right.from_bytes(data, versions=(version,))


# ---- versions 4 and 5 -------------------------------------------------------------------------

EXTENSION = TdExtension(
    vmid=1,
    td_id=b"i" * 32,
    device_info_hash=b"d" * 48,
    initial_service_td_hash=b"a" * 48,
    initial_service_td_attributes=b"b" * 8,
    initial_cpu_svn=b"c" * 16,
    initial_tee_tcb_svn=b"t" * 16,
    initial_tee_fmspc=b"f" * 12,
    current_service_td_hash=b"h" * 48,
    current_service_td_attributes=b"j" * 8,
)
TD = TdReportBody(mr_td=b"m" * 48, tee_tcb_svn=b"\3\1" + bytes(14), report_data=b"r" * 64)
TD15 = dataclasses.replace(TD, tee_tcb_svn2=b"\4\1" + bytes(14), mr_service_td=b"s" * 48)
TD15EX = dataclasses.replace(TD15, extension=EXTENSION)


def newer(version: int, body: ReportBody | TdReportBody) -> Quote | TdQuote:
    old = quote()
    fields = {
        field.name: getattr(old, field.name) for field in dataclasses.fields(old) if field.init
    }
    kind = Quote if isinstance(body, ReportBody) else TdQuote
    return kind(**fields | {"version": version, "report_body": body})  # type: ignore[arg-type]


NEWER = {
    "v4 SGX": newer(4, quote().report_body),
    "v4 TDX": newer(4, TD),
    "v5 SGX": newer(5, quote().report_body),
    "v5 TDX 1.0": newer(5, TD),
    "v5 TDX 1.5": newer(5, TD15),
    "v5 TDX 1.5 extended": newer(5, TD15EX),
}


@pytest.mark.parametrize("what", NEWER)
def test_newer_quotes_come_back(what: str) -> None:
    value = NEWER[what]
    data = value.to_bytes()
    assert read_quote(data) == value
    assert read_quote(data + bytes(70)) == value
    assert read_quote(data).to_bytes() == data
    for tail in (b"\1", bytes(69) + b"\1", data):
        with pytest.raises(EvidenceFormatError, match="zero bytes"):
            read_quote(data + tail)


@pytest.mark.parametrize("what", NEWER)
def test_att_22_every_cut_of_a_newer_quote_is_refused(what: str) -> None:
    data = NEWER[what].to_bytes()
    for size in range(len(data)):
        with pytest.raises(EvidenceFormatError):
            read_quote(data[:size])


@pytest.mark.parametrize("what", NEWER)
def test_att_22_every_length_and_type_of_a_newer_quote_counts(what: str) -> None:
    value = NEWER[what]
    data = value.to_bytes()
    end = len(value.signed_bytes)
    places = {
        "signature data length": (end, 4),
        "outer type": (end + 4 + 128, 2),
        "outer size": (end + 4 + 130, 4),
        "auth size": (end + 4 + 582, 2),
        "inner type": (end + 4 + 584 + len(AUTH), 2),
        "inner size": (end + 4 + 586 + len(AUTH), 4),
    }
    if value.version == 5:
        places |= {"body type": (48, 2), "body size": (50, 4)}
    for name, (at, size) in places.items():
        good = int.from_bytes(data[at : at + size], "little")
        top = (1 << 8 * size) - 1
        for bad in {0, 1, 3, good - 1, good + 1, top, top >> 1, 7, 6, 5} - {good}:
            if name == "inner type" and bad == 4:
                continue
            hostile = data[:at] + bad.to_bytes(size, "little") + data[at + size :]
            with pytest.raises(EvidenceFormatError):
                read_quote(hostile)


@pytest.mark.parametrize("what", NEWER)
def test_every_byte_of_a_newer_quote_shows(what: str) -> None:
    value = NEWER[what]
    data = bytearray(value.to_bytes())
    for at in range(len(data)):
        data[at] ^= 1
        try:
            changed = read_quote(data)
        except EvidenceFormatError:
            continue
        finally:
            data[at] ^= 1
        assert changed != value


def test_version_4_has_no_body_of_tdx_1_5() -> None:
    with pytest.raises(ValueError, match=r"TDX 1\.0"):
        newer(4, TD15).to_bytes()


def test_what_was_signed_follows_a_changed_body() -> None:
    value = Quote.from_bytes(DATA)
    other = dataclasses.replace(
        value, report_body=dataclasses.replace(value.report_body, isv_svn=9)
    )
    assert other.signed_bytes != value.signed_bytes
    assert Quote.from_bytes(other.to_bytes()) == other
