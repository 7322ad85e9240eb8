"""Arrays of dates, of records and of strings of a fixed width."""

from __future__ import annotations

import json
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave.calls import arrays
from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError

ROW = np.dtype([("id", "i4"), ("ok", "?"), ("at", "M8[ns]"), ("name", "U8"), ("xyz", "f8", (3,))])
NESTED = np.dtype([("row", ROW), ("tag", "S4"), ("big", ">u2")], align=True)
Rows = Annotated[npt.NDArray[np.void], ROW]


def signature(annotation: Any, returns: Any = None) -> Signature:
    def f(x):
        return x

    f.__qualname__ = "f"
    f.__annotations__ = {"x": annotation, "return": returns}
    return Signature.of(f)


def there_and_back(annotation: Any, value: Any) -> Any:
    inside = signature(annotation)
    outside = Signature.from_wire(json.loads(json.dumps(inside.to_wire())))
    return inside.request_plan.decode(outside.request_plan.encode((value,)))[0]


def rows(dtype: np.dtype, count: int = 3) -> np.ndarray:
    made = np.zeros(count, dtype)
    for place, row in enumerate(made if dtype is ROW else made["row"]):
        row["id"], row["ok"], row["at"] = place, place % 2 == 0, np.datetime64(place, "ns")
        row["name"], row["xyz"] = "ü" * place, [place, 0.5, np.nan]
    return made


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether elements are equal bit by bit, whatever their layout."""
    packed = arrays.dtype_of(arrays.element_of(right.dtype))
    return left.astype(packed).tobytes() == right.astype(packed).tobytes()


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "advice"),
    [
        (npt.NDArray[np.datetime64], r"datetime64\[us\]"),
        (npt.NDArray[np.timedelta64], r"timedelta64\[us\]"),
        (npt.NDArray[np.void], "Name the fields"),
        (npt.NDArray[np.str_], "Name the width"),
        (npt.NDArray[np.bytes_], "Name the width"),
        (npt.NDArray[np.object_], "Send a list"),
        (Annotated[np.ndarray, np.dtype("M8")], "do not cross"),
        (Annotated[np.ndarray, np.dtype("M8[25s]")], "do not cross"),
        (Annotated[np.ndarray, np.dtype("O")], "do not cross"),
        (Annotated[np.ndarray, np.dtype("S0")], "do not cross"),
        (Annotated[np.ndarray, np.dtype("V8")], "do not cross"),
        (Annotated[np.ndarray, np.dtype([("a", "O")])], "do not cross"),
        (Annotated[np.ndarray, np.dtype([("a", [("b", "O")])])], "do not cross"),
        (Annotated[np.ndarray, np.dtype([("a", "g")])], "do not cross"),
        (Annotated[np.ndarray, np.dtype([])], "unknown"),
        (Annotated[np.ndarray, np.dtype("U20000")], "at most 65536 bytes"),
        (Annotated[np.ndarray, np.dtype([("a", "f8", (10_000,))])], "at most 65536 bytes"),
        (Annotated[np.ndarray, np.dtype([(f"f{n}", "u1") for n in range(257)])], "256 fields"),
        (Annotated[np.ndarray, np.dtype([("x" * 65, "u1")])], "field"),
        (Annotated[npt.NDArray[np.float64], ROW], "annotation is of float64"),
        (Annotated[int, ROW], "Types that cross"),
        (list[Rows], "not inside another type"),
        (Rows | None, "not inside another type"),
        (dict[str, Annotated[np.ndarray, np.dtype("U3")]], "not inside another type"),
    ],
)
def test_element_types_that_do_not_cross_are_refused_at_build(annotation, advice):
    with pytest.raises(ArgumentError, match=advice):
        signature(annotation)


def test_records_nest_eight_levels():
    dtype = np.dtype([("x", "u1")])
    for _ in range(7):
        dtype = np.dtype([("x", dtype)])
    signature(Annotated[np.ndarray, dtype])
    with pytest.raises(ArgumentError, match="deeper"):
        signature(Annotated[np.ndarray, np.dtype([("x", "u1"), ("y", np.dtype([("x", dtype)]))])])


@pytest.mark.parametrize(
    "other",
    [
        [("id", "i4"), ("ok", "?")],
        [("id", "i8"), *ROW.descr[1:]],
        [("ID", "i4"), *ROW.descr[1:]],
        [*ROW.descr[1:], ROW.descr[0]],
        [*ROW.descr, ("more", "u1")],
        [*ROW.descr[:2], ("at", "M8[us]"), *ROW.descr[3:]],
        [*ROW.descr[:3], ("name", "U9"), ROW.descr[4]],
        [*ROW.descr[:4], ("xyz", "f8", (4,))],
        [*ROW.descr[:4], ("xyz", "f8")],
    ],
)
def test_SER_04_fields_must_be_equal_in_name_order_and_type(other):
    with pytest.raises(ArgumentError, match="must be equal"):
        there_and_back(Rows, np.zeros(2, np.dtype(other)))


@pytest.mark.parametrize("value", [[(1, True)], None, {}, 5, np.zeros(3), np.zeros(3, object)])
def test_SER_04_what_is_no_such_array_is_refused(value):
    with pytest.raises(ArgumentError, match="does not fit"):
        there_and_back(Rows, value)


def test_masked_records_are_refused():
    with pytest.raises(ArgumentError, match="does not fit"):
        there_and_back(Rows, np.ma.masked_array(rows(ROW), mask=True))


@pytest.mark.parametrize(
    "element",
    [
        "|O", "<M8", "<f16", "|V8", "|S", "|S0", "<U0", "<U20000", "|S99999", ">f8", 5, None, [],
        [["a"]], [["a", "<f8"]], [["a", "<f8", 3]], [["a", "<f8", [0]]], [["a", "<f8", [-1]]],
        [["a", "<f8", [2**40]]], [["a", "<f8", [2**62, 4]]], [["a", "<f8", [True]]],
        [["", "<f8", []]], [["a\n", "<f8", []]], [[5, "<f8", []]],
        [["a", "<f8", []], ["a", "<f8", []]], [["a", "|S60000", []], ["b", "|S60000", []]],
        [["a", "<f8", [1] * 9]],
    ],
)  # fmt: skip
def test_a_malformed_description_of_an_image_is_refused(element):
    with pytest.raises(ArgumentError):
        Signature.from_wire(
            {"name": "f", "kind": "python", "params": [], "returns": ["records", element]}
        )


def test_SER_02_a_description_that_nests_or_repeats_without_end_is_refused():
    nested: Any = "<f8"
    for _ in range(5000):
        nested = [["x", nested, []]]
    with pytest.raises(ArgumentError, match="deeper"):
        arrays.dtype_of(nested)
    wide: Any = [["x", "|u1", []]]
    for _ in range(6):
        wide = [[f"f{n}", wide, []] for n in range(100)]
    with pytest.raises(ArgumentError, match="fields"):
        arrays.dtype_of(wide)


def test_BND_04_every_cut_and_every_added_byte_is_refused():
    plan = signature(Rows).request_plan
    frame = plan.encode((rows(ROW),))
    for size in range(len(frame)):
        with pytest.raises(ArgumentError):
            plan.decode(frame[:size])
    with pytest.raises(ArgumentError):
        plan.decode(frame + b"\0")


@pytest.mark.parametrize(
    "shape", [[2**64 - 1], [2**63], [2**48], [2**32, 2**32], [3], [0, 2**63], [1] * 33]
)
def test_BND_02_shapes_beyond_the_data_are_refused(shape):
    head = bytes([len(shape)]) + b"".join(size.to_bytes(8, "little") for size in shape)
    head = (4 + len(head)).to_bytes(4, "little") + head
    with pytest.raises(ArgumentError):
        signature(Rows).request_plan.decode(head + bytes(-len(head) % 64) + bytes(ROW.itemsize))


def test_SER_04_bools_and_characters_in_records_are_checked_on_arrival():
    """What compiled code masks, counts and indexes by must be what NumPy would have made."""
    packed = arrays.RecordDetail(arrays.element_of(ROW)).packed
    plan = signature(Rows).request_plan
    frame = plan.encode((rows(ROW),))
    start = len(frame) - 3 * packed.itemsize
    for name, size in (("ok", 1), ("name", 4)):
        at = start + packed.itemsize + packed.fields[name][1]
        for wrong in (b"\2", b"\xff") if size == 1 else (
            (0x110000).to_bytes(4, "little"), (0xD800).to_bytes(4, "little"), b"\xff" * 4
        ):  # fmt: skip
            with pytest.raises(ArgumentError, match=r"neither 0 nor 1|not text"):
                plan.decode(frame[:at] + wrong + frame[at + size :])
    bad = np.frombuffer((0xDFFF).to_bytes(4, "little"), "<U1")
    with pytest.raises(ArgumentError, match="not text"):
        there_and_back(Annotated[np.ndarray, np.dtype("U1")], bad)


def test_the_bytes_between_fields_do_not_cross():
    """In an aligned record they are what memory held before: a secret of the enclave, perhaps."""
    aligned = np.dtype([("a", "u1"), ("b", "f8")], align=True)
    assert aligned.itemsize == 16
    value = np.frombuffer(bytearray(b"\1SECRET." + bytes(8)) * 5, aligned)
    annotation = Annotated[np.ndarray, aligned]
    one = signature(annotation, annotation)
    for plan in (one.request_plan, one.reply_plan):
        frame = plan.encode((value,))
        assert b"SECRET" not in frame
        (back,) = plan.decode(frame)
        assert back.dtype == aligned
        assert (back == value).all()


# ---- what crosses ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ROW, NESTED])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (0, 5), (2, 1, 3)])
def test_records_cross_with_their_layout(dtype, shape):
    annotation = Annotated[np.ndarray, dtype]
    value = np.resize(rows(dtype), shape) if 0 not in shape else np.zeros(shape, dtype)
    if shape == ():
        value = rows(dtype)[2:].reshape(())
    back = there_and_back(annotation, value)
    assert back.dtype == dtype.newbyteorder("=")
    assert back.shape == value.shape
    assert same(back, value)
    assert back.flags.writeable


def test_views_records_and_other_layouts_of_the_same_fields_cross():
    value = rows(ROW, 10)
    repacked = value.astype(np.dtype({"names": ROW.names, "formats": [ROW[n] for n in ROW.names]},
                                     align=True))  # fmt: skip
    swapped = value.astype(ROW.newbyteorder(">"))
    for one in (value[::2], value[::-1], value.view(np.recarray), repacked, swapped,
                rows(NESTED, 5)["row"]):  # fmt: skip
        assert same(there_and_back(Rows, one), np.asarray(one))


def test_an_untyped_side_gets_the_packed_layout():
    aligned = np.dtype([("a", "u1"), ("b", "f8")], align=True)
    inside = signature(Annotated[np.ndarray, aligned])
    outside = Signature.from_wire(inside.to_wire())
    (back,) = outside.request_plan.decode(inside.request_plan.encode((np.zeros(2, aligned),)))
    assert back.dtype.itemsize == 9
    assert str(inside) == "f(x: ndarray[{a: |u1, b: <f8}]) -> None"


@pytest.mark.parametrize("name", [name for name in _core.ARRAY_TYPES if "8[" in name])
def test_dates_and_durations_cross_with_their_unit(name):
    value = np.array([0, 1, -1, 2**62, -(2**62), -(2**63)], "<i8").view(name)
    annotation = Annotated[npt.NDArray[np.generic], np.dtype(name)]
    assert signature(annotation).parameters[0].wire == ["array", name]
    for back in (there_and_back(annotation, value), there_and_back(np.ndarray, value)):
        assert back.dtype == value.dtype
        assert (back.view("i8") == value.view("i8")).all()  # NaT is no date, and crosses as NaT
    assert there_and_back(annotation, value.reshape(2, 3).T).shape == (3, 2)
    assert there_and_back(dict[str, np.ndarray], {"x": value})["x"].dtype == value.dtype
    other = "<m8[D]" if name != "<m8[D]" else "<m8[h]"
    with pytest.raises(ArgumentError, match="astype"):
        there_and_back(annotation, value.view("i8").view(other))


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=5), max_size=8))
@settings(max_examples=200, deadline=None)
def test_texts_of_a_fixed_width_cross(texts):
    value = np.array(texts, "U5")
    back = there_and_back(Annotated[npt.NDArray[np.str_], np.dtype("U5")], value)
    assert back.dtype == value.dtype
    assert back.tolist() == value.tolist()


@given(st.lists(st.binary(max_size=5), max_size=8))
@settings(max_examples=200, deadline=None)
def test_bytes_of_a_fixed_width_cross(parts):
    value = np.array(parts, "S5")
    back = there_and_back(Annotated[npt.NDArray[np.bytes_], np.dtype("S5")], value)
    assert back.tobytes() == value.tobytes()


_SCALARS = st.sampled_from(["?", "i1", "u2", ">i4", "f8", "c16", "M8[D]", "m8[ns]", "S3", "U2"])
_DTYPES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(
        st.tuples(inner, st.sampled_from([(), (2,), (1, 3)])), min_size=1, max_size=4
    ).map(lambda parts: [(f"f{n}", part, shape) for n, (part, shape) in enumerate(parts)]),
    max_leaves=8,
)


@given(_DTYPES, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_SER_04_records_of_any_fields_round_trip(description, align, generator):
    if isinstance(description, str):
        description = [("x", description)]
    dtype = np.dtype(description, align=align)
    # Bytes of 0 and 1 alone are valid for every type of element.
    data = bytes(generator.randrange(2) for _ in range(3 * dtype.itemsize))
    value = np.frombuffer(data, dtype)
    if arrays.flaw(value.astype(arrays.dtype_of(arrays.element_of(dtype)))):
        return  # a character beyond the last one
    back = there_and_back(Annotated[np.ndarray, dtype], value)
    assert back.dtype == dtype.newbyteorder("=")
    assert same(back, value)
