"""CBOR that two readers could understand differently is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import cbor
from pyenclave.formats.cbor import Tag

HOSTILE = {
    "nothing": "",
    "trailing bytes": "0000",
    "an indefinite byte string": "5f41004100ff",
    "an indefinite text": "7f6161ff",
    "an indefinite array": "9f00ff",
    "an indefinite map": "bf0000ff",
    "a break alone": "ff",
    "a reserved head": "1c",
    "another reserved head": "fe",
    "a cut number": "19 00",
    "a cut string": "43 0000",
    "a string of 2**64-1 bytes": "5b ffffffffffffffff",
    "an array of 2**64-1 items": "9b ffffffffffffffff",
    "a map of 2**63 pairs": "bb 8000000000000000",
    "an array longer than the bytes": "83 00 00",
    "a map longer than the bytes": "a2 00 00 01",
    "a doubled number as name": "a2 00 01 00 02",
    "a doubled text as name": "a2 6161 01 6161 02",
    "a doubled byte string as name": "a2 4161 01 4161 02",
    "a doubled name inside": "81 a2 00 01 00 02",
    "true as a name, which Python takes for 1": "a1 f5 00",
    "an array as a name": "a1 80 00",
    "a tag as a name": "a1 c0 00 00",
    "null as a name": "a1 f6 00",
    "undefined": "f7",
    "simple value 0": "e0",
    "simple value 32 in two bytes": "f820",
    "false in two bytes": "f814",
    "half precision": "f93c00",
    "double precision": "fb3ff0000000000000",
    "text that is not UTF-8": "61ff",
    "half a surrogate pair": "63eda080",
    "an overlong form": "62c0af",
    "too deep": "81" * 17 + "00",
    "far too deep": "81" * 100_000 + "00",
    "tags too deep": "c1" * 100_000 + "00",
    "23 in two bytes": "1817",
    "255 in three bytes": "1900ff",
    "65535 in five": "1a0000ffff",
    "4294967295 in nine": "1b00000000ffffffff",
    "a length in a longer form": "580100",
    "a tag in a longer form": "d80100",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_cbor_is_refused_with_a_typed_error(name: str) -> None:
    with pytest.raises(EvidenceFormatError):
        cbor.loads(bytes.fromhex(HOSTILE[name]), "a token")


def test_a_doubled_name_in_two_widths_is_still_doubled() -> None:
    with pytest.raises(EvidenceFormatError, match="twice"):
        cbor.loads(bytes.fromhex("a2 01 00 1801 00"), form="definite")


@pytest.mark.parametrize(
    ("data", "value"), [("9f00809fffff", [0, [], []]), ("bf6161bfff0102ff", {"a": {}, 1: 2})]
)
def test_indefinite_arrays_and_maps_are_read_only_where_that_is_asked_for(
    data: str, value: object
) -> None:
    assert cbor.loads(bytes.fromhex(data), indefinite=True) == value
    with pytest.raises(EvidenceFormatError):
        cbor.loads(bytes.fromhex(data))


@pytest.mark.parametrize(
    "data", ["9f", "bf00", "bf00ff", "bf0000", "ff", "bf00010002ff", "5fff", "7fff", "9f" * 1000]
)
def test_broken_indefinite_items_are_refused(data: str) -> None:
    with pytest.raises(EvidenceFormatError):
        cbor.loads(bytes.fromhex(data), indefinite=True)


def test_numbers_in_longer_forms_are_read_where_that_is_allowed() -> None:
    assert cbor.loads(bytes.fromhex("1b0000000000000001"), form="definite") == 1


@pytest.mark.parametrize("data", ["a2 02 00 01 00", "a2 6161 00 01 00", "a2 6162 00 6161 00"])
def test_names_out_of_order_are_refused_only_in_the_canonical_form(data: str) -> None:
    cbor.loads(bytes.fromhex(data))
    with pytest.raises(EvidenceFormatError, match="order"):
        cbor.loads(bytes.fromhex(data), form="canonical")


@pytest.mark.parametrize("data", ["f97e00", "f97c00", "fb7ff0000000000000", "faff800000"])
def test_numbers_that_are_not_finite_are_refused_even_where_fractions_are_read(data: str) -> None:
    with pytest.raises(EvidenceFormatError):
        cbor.loads(bytes.fromhex(data), floats=True)


def test_sizes_are_capped_and_the_class_of_the_error_is_the_callers() -> None:
    with pytest.raises(CollateralError, match="a list: too large"):
        cbor.loads(bytes(101), "a list", CollateralError, max_size=100)
    with pytest.raises(EvidenceFormatError, match="levels"):
        cbor.loads(b"\x81\x81\x00", max_depth=1)
    assert cbor.loads(b"\x81\x00", max_depth=1) == [0]


# RFC 8949, appendix A: the examples within what is read here.
EXAMPLES = {
    "00": 0,
    "17": 23,
    "1818": 24,
    "1903e8": 1000,
    "1a000f4240": 1000000,
    "1b000000e8d4a51000": 1000000000000,
    "1bffffffffffffffff": 18446744073709551615,
    "20": -1,
    "3863": -100,
    "3903e7": -1000,
    "3bffffffffffffffff": -18446744073709551616,
    "f4": False,
    "f5": True,
    "f6": None,
    "c11a514b67b0": Tag(1, 1363896240),
    "d74401020304": Tag(23, bytes([1, 2, 3, 4])),
    "d818456449455446": Tag(24, bytes.fromhex("6449455446")),
    "40": b"",
    "4401020304": bytes([1, 2, 3, 4]),
    "60": "",
    "6449455446": "IETF",
    "62225c": '"\\',
    "62c3bc": "ü",
    "63e6b0b4": "水",
    "64f0908591": "\U00010151",
    "80": [],
    "8301820203820405": [1, [2, 3], [4, 5]],
    "98190102030405060708090a0b0c0d0e0f101112131415161718181819": list(range(1, 26)),
    "a0": {},
    "a201020304": {1: 2, 3: 4},
    "a26161016162820203": {"a": 1, "b": [2, 3]},
    "826161a161626163": ["a", {"b": "c"}],
}


@pytest.mark.parametrize("data", EXAMPLES)
def test_the_examples_of_rfc_8949_are_read_and_written(data: str) -> None:
    raw = bytes.fromhex(data)
    value = cbor.loads(raw)
    assert value == EXAMPLES[data]
    assert type(value) is type(EXAMPLES[data])
    assert cbor.dumps(value) == raw


def test_fractions_of_rfc_8949_are_read_where_they_are_asked_for() -> None:
    for data, value in {"f93c00": 1.0, "fa47c35000": 1e5, "fb3ff199999999999a": 1.1}.items():
        assert math.isclose(cbor.loads(bytes.fromhex(data), floats=True), value)
    assert cbor.dumps(1.1).hex() == "fb3ff199999999999a"


_KEYS = st.integers(-(1 << 64), (1 << 64) - 1) | st.text() | st.binary()
_VALUES = st.recursive(
    st.none() | st.booleans() | _KEYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_KEYS, inner, max_size=4)
        | st.builds(Tag, st.integers(0, (1 << 64) - 1), inner)
    ),
    max_leaves=12,
)


@given(_VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    assert cbor.loads(cbor.dumps(value)) == value
    assert cbor.loads(cbor.dumps(value, canonical=True), form="canonical") == value


@given(st.binary(max_size=64))
def test_any_bytes_are_one_value_with_one_form_or_a_typed_error(data: bytes) -> None:
    try:
        value = cbor.loads(data)
    except EvidenceFormatError:
        return
    assert cbor.dumps(value) == data


@pytest.mark.parametrize("value", [object(), {True: 1}, {(): 1}, {1, 2}])
def test_what_has_no_form_is_not_written(value: object) -> None:
    with pytest.raises(TypeError):
        cbor.dumps(value)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 64) - 1, math.inf, math.nan])
def test_what_does_not_fit_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match=r"fit|finite"):
        cbor.dumps(value)


def test_impossible_arguments_are_builtin_errors() -> None:
    with pytest.raises(TypeError):
        cbor.loads("00")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form"):
        cbor.loads(b"\0", form="any")  # type: ignore[arg-type]
