"""JSON that two readers could understand differently is refused (JWT-02)."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import jsonstrict

HOSTILE = {
    "nothing": b"",
    "only space": b" \n",
    "a doubled name": b'{"a":1,"a":2}',
    "a doubled name, once escaped": b'{"a":1,"\\u0061":2}',
    "a doubled name inside": b'{"x":[{"a":1,"b":2,"a":1}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b"Infinity",
    "minus Infinity": b"[-Infinity]",
    "a number that becomes infinite": b"1e999",
    "a negative one": b"[-1e400]",
    "an integer beyond 64 bits": b"18446744073709551616",
    "a negative one beyond 64 bits": b"-9223372036854775809",
    "a number of many digits": b"1" * 5000,
    "a fraction of many digits": b"1." + b"1" * 5000,
    "trailing bytes": b"{}x",
    "a second value": b"{} {}",
    "a trailing NUL": b"{}\0",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"a":"\xff"}',
    "an overlong form": b'{"a":"\xc0\xaf"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "half a surrogate pair": b'{"a":"\\ud800"}',
    "half a surrogate pair as a name": b'{"\\udfff":1}',
    "a comment": b"{} // x",
    "a trailing comma": b'{"a":1,}',
    "a single quote": b"{'a':1}",
    "a line break in a string": b'"a\nb"',
    "a leading zero": b"01",
    "a plus": b"+1",
    "digits of another script": "١٢".encode(),
    "too deep": b"[" * 33 + b"]" * 33,
    "far too deep": b'{"a":' * 200_000,
    "too deep after an escaped quote": b'["\\"", ' + b"[" * 33 + b"]" * 33 + b"]",
    "a string that never ends": b'"' + b'\\"' * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused_with_a_typed_error(name: str) -> None:
    with pytest.raises(EvidenceFormatError):
        jsonstrict.loads(HOSTILE[name], "a token")
    # Short and long text are looked at in two ways.
    with pytest.raises(EvidenceFormatError):
        jsonstrict.loads(HOSTILE[name] + b" " * 40_000, "a token")


def test_the_error_is_of_the_class_that_was_asked_for_and_names_the_double() -> None:
    with pytest.raises(CollateralError, match=r"TCB info.*'fmspc' twice"):
        jsonstrict.loads(b'{"fmspc":1,"fmspc":2}', "TCB info", CollateralError)


def test_text_of_four_mebibytes_costs_one_pass() -> None:
    """Strings that never end, and quotes that are escaped, must not make the scan quadratic."""
    start = time.process_time()
    for data in (b'"' + b'\\"' * 2_000_000, b'"\\' * 1_000_000, b"[" * 4_000_000):
        with pytest.raises(EvidenceFormatError):
            jsonstrict.loads(data)
    assert time.process_time() - start < 10


def test_sizes_are_capped_before_anything_is_read() -> None:
    with pytest.raises(EvidenceFormatError, match="too large"):
        jsonstrict.loads(b" " * 101, max_size=100)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b' {"a": [1, -2, 1.5, true, null, "\xc3\xa9"]}\n', {"a": [1, -2, 1.5, True, None, "é"]}),
        (b"18446744073709551615", (1 << 64) - 1),
        (b"-9223372036854775808", -(1 << 63)),
        (b'"\\ud83d\\ude00"', "😀"),
        (b"[" * 32 + b"]" * 32, json.loads("[" * 32 + "]" * 32)),
        (b'"[[[[{{{{"', "[[[[{{{{"),
        (b"1e3", 1000.0),
        (b"{}", {}),
    ],
)
def test_plain_json_is_read(data: bytes, value: object) -> None:
    assert jsonstrict.loads(data, max_depth=32) == value
    assert jsonstrict.loads(data.decode(), max_depth=32) == value
    assert jsonstrict.loads(data + b" " * 40_000, max_depth=32) == value


@pytest.mark.parametrize("space", ["", " " * 40_000])
@pytest.mark.parametrize("text", ['{"a":[[1]]}', '[{"a":"[[[["},[[2]]]', '[[["{{{{"]],"]]]]"]'])
def test_nesting_counts_brackets_outside_of_strings_only(text: str, space: str) -> None:
    assert jsonstrict.loads(text + space, max_depth=3) == json.loads(text)
    with pytest.raises(EvidenceFormatError, match="nested too deeply"):
        jsonstrict.loads(text + space, max_depth=2)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES, st.booleans())
def test_what_json_writes_is_read_back(value: object, ascii_only: bool) -> None:
    try:
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    assert jsonstrict.loads(data) == value


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=20), _VALUES, min_size=1, max_size=3))
def test_the_bytes_of_a_member_are_a_slice_that_says_the_same(values: dict[str, object]) -> None:
    data = json.dumps(values, indent=1).encode()
    for name, value in values.items():
        part = jsonstrict.member_bytes(data, name)
        assert part in data
        assert json.loads(part) == value


def test_a_member_comes_exactly_as_served() -> None:
    data = b'{ "x" : "tcbInfo" , "tcbInfo" :  {"a" : 1, "b":"\\u0041\xc3\xa9"}  , "z":0}'
    assert jsonstrict.member_bytes(data, "tcbInfo") == b'{"a" : 1, "b":"\\u0041\xc3\xa9"}'
    assert jsonstrict.member_bytes(data, "z") == b"0"


@pytest.mark.parametrize("data", [b"{}", b'{"a":1}', b"[1]", b'{"tcbInfo":1,"tcbInfo":2}', b"{"])
def test_a_member_that_is_not_there_once_is_refused(data: bytes) -> None:
    with pytest.raises(CollateralError):
        jsonstrict.member_bytes(data, "tcbInfo", "TCB info", CollateralError)


def test_an_object_is_demanded_where_one_belongs() -> None:
    assert jsonstrict.object_of(b'{"a":1}') == {"a": 1}
    with pytest.raises(EvidenceFormatError, match="not an object"):
        jsonstrict.object_of(b"[]")


def test_every_tcb_info_of_the_vectors_is_read(vectors: Path) -> None:
    found = sorted((vectors / "attestation").glob("*/tcb-info.json"))
    assert found
    for path in found:
        data = path.read_bytes()
        assert jsonstrict.loads(data) == json.loads(data)
        assert json.loads(jsonstrict.member_bytes(data, "tcbInfo")) == json.loads(data)["tcbInfo"]


def test_impossible_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError):
        jsonstrict.loads(12)  # type: ignore[arg-type]
    assert math.isclose(jsonstrict.loads("0.25"), 0.25)
