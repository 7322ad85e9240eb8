"""The DER reader refuses what is not DER, and gives back what the writers write."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import der
from pyenclave.formats.der import Der


def cursor(text: str) -> Der:
    return Der(bytes.fromhex(text), "sample")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "missing"),
        ("30", "missing"),
        ("3080", "not DER"),
        ("30800000", "not DER"),
        ("308101", "not minimal"),
        ("30820001", "not minimal"),
        ("3085000000000100", "not DER"),
        ("30ff", "not DER"),
        ("3001", "does not fit"),
        ("3084ffffffff", "does not fit"),
        ("3181", "wrong element"),
        ("1f8101", "wrong element"),
    ],
)
def test_a_sequence_with_a_bad_header_is_refused(data: str, why: str) -> None:
    with pytest.raises(EvidenceFormatError, match=why):
        cursor(data).sequence()


def test_a_tag_of_several_bytes_is_refused() -> None:
    with pytest.raises(EvidenceFormatError, match="several bytes"):
        cursor("3f210100").element()


@pytest.mark.parametrize("data", ["0200", "02020001", "0202ff80", "02020000", "0202ffff"])
def test_integers_that_are_not_minimal_are_refused(data: str) -> None:
    with pytest.raises(EvidenceFormatError):
        cursor(data).integer()


def test_a_huge_integer_is_refused_before_it_is_read() -> None:
    with pytest.raises(EvidenceFormatError, match="impossible size"):
        Der(der.encode(der.INTEGER, b"\x01" * 1025), "sample").integer()


def test_a_negative_integer_is_refused_where_none_may_be() -> None:
    assert cursor("0201ff").integer() == -1
    with pytest.raises(EvidenceFormatError, match="negative"):
        cursor("0201ff").integer(nonneg=True)


@pytest.mark.parametrize("data", ["010101", "0100", "01020000"])
def test_booleans_are_00_or_ff(data: str) -> None:
    with pytest.raises(EvidenceFormatError, match="neither"):
        cursor(data).boolean()


@pytest.mark.parametrize("data", ["0600", "060180", "06022a80", "060380802a", "0603802a03"])
def test_malformed_object_identifiers_are_refused(data: str) -> None:
    with pytest.raises(EvidenceFormatError, match="identifier"):
        cursor(data).oid()


@pytest.mark.parametrize("data", ["0300", "030108", "030101", "0302ff00", "03020101", "03020881"])
def test_malformed_bit_strings_are_refused(data: str) -> None:
    with pytest.raises(EvidenceFormatError):
        cursor(data).bits()


def test_a_signature_has_no_unused_bits() -> None:
    with pytest.raises(EvidenceFormatError, match="whole bytes"):
        cursor("03020180").bit_string()


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (der.UTC_TIME, b"2501010000Z"),
        (der.UTC_TIME, b"250101000000+0000"),
        (der.UTC_TIME, b"251301000000Z"),
        (der.UTC_TIME, b"250101000060Z"),
        (der.UTC_TIME, b"25010100000 Z"),
        (der.GENERALIZED_TIME, b"20250101000000.5Z"),
        (der.GENERALIZED_TIME, b"20250230000000Z"),
        (der.GENERALIZED_TIME, b"20250101000000"),
        (der.GENERALIZED_TIME, "２０２５0101000000Z".encode()),
        (der.OCTET_STRING, b"20250101000000Z"),
    ],
)
def test_malformed_times_are_refused(tag: int, text: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        Der(der.encode(tag, text), "sample").time()


def test_two_digit_years_turn_at_1950() -> None:
    assert Der(der.encode(der.UTC_TIME, b"500101000000Z"), "x").time().year == 1950
    assert Der(der.encode(der.UTC_TIME, b"491231235959Z"), "x").time().year == 2049


def test_what_follows_the_end_is_refused() -> None:
    outer = cursor("0500ff")
    outer.content(der.NULL)
    with pytest.raises(EvidenceFormatError, match="follow"):
        outer.end()


def test_an_element_may_not_reach_beyond_its_parent() -> None:
    inner = cursor("3003020201ffff").sequence()
    with pytest.raises(EvidenceFormatError, match="does not fit"):
        inner.integer()


def test_errors_are_of_the_class_that_was_given() -> None:
    with pytest.raises(CollateralError, match="thing"):
        Der(b"\x30", "thing", CollateralError).sequence()


@given(st.integers(min_value=-(1 << 300), max_value=1 << 300))
def test_integers_come_back(value: int) -> None:
    assert Der(der.encode_integer(value), "x").integer() == value


@given(
    st.integers(0, 2).flatmap(
        lambda first: st.tuples(
            st.just(first),
            st.integers(0, 39 if first < 2 else 1 << 20),
            st.lists(st.integers(0, 1 << 40), max_size=6),
        )
    )
)
def test_object_identifiers_come_back(arcs: tuple[int, int, list[int]]) -> None:
    dotted = ".".join(map(str, (arcs[0], arcs[1], *arcs[2])))
    assert Der(der.encode_oid(dotted), "x").oid() == dotted


@given(st.binary(max_size=300), st.booleans())
def test_structures_come_back(content: bytes, flag: bool) -> None:
    written = der.encode_sequence(
        der.encode_octet_string(content),
        der.encode_boolean(flag),
        der.encode_bit_string(content),
        der.encode(der.context(3), der.encode_text("ä")),
    )
    outer = Der(written, "x")
    inner = outer.sequence()
    outer.end()
    assert inner.octet_string() == content
    assert inner.boolean() is flag
    assert inner.bit_string() == content
    assert inner.optional(der.context(2)) is None
    tagged = inner.optional(der.context(3))
    assert tagged is not None
    assert tagged.content(0x0C) == "ä".encode()
    inner.end()


@given(st.datetimes(min_value=datetime(1950, 1, 1), max_value=datetime(9999, 12, 31)))  # noqa: DTZ001,RUF100
def test_times_come_back(moment: datetime) -> None:
    whole = moment.replace(microsecond=0, tzinfo=UTC)
    assert Der(der.encode_time(whole), "x").time() == whole


@settings(max_examples=300)
@given(st.binary(max_size=64))
def test_any_bytes_give_a_typed_error_or_a_value(data: bytes) -> None:
    for read in ("sequence", "integer", "oid", "boolean", "bits", "time", "element"):
        try:
            getattr(Der(data, "x"), read)()
        except EvidenceFormatError:
            continue
