"""Frames: what a plan encodes, and what it refuses to decode."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave.calls.types import hooks
from pyenclave.errors import ArgumentError


def plan(codes: str, *details, optional=False):
    details = details or (None,) * len(codes)
    details = tuple(0 if c == "A" and d is None else d for c, d in zip(codes, details, strict=True))
    return _core.Plan(codes.encode(), tuple(f"v{i}" for i in range(len(codes))), details, optional)


def there_and_back(codes: str, *values):
    one = plan(codes)
    return one.decode(one.encode(values))


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("i", True), ("i", 1.0), ("i", "1"), ("i", None), ("i", np.bool_(True)),
        ("i", np.float64(1)), ("i", np.arange(1)), ("i", 2**64), ("i", -(2**63) - 1),
        ("i", 10**400),
        ("f", True), ("f", "1.0"), ("f", None), ("f", 10**400), ("f", 1j), ("f", b"1"),
        ("b", 1), ("b", 0), ("b", None), ("b", np.bool_(True)), ("b", "True"),
        ("n", 0), ("n", False), ("n", ""),
        ("s", b"bytes"), ("s", 1), ("s", None), ("s", "\ud800"),
        ("y", "text"), ("y", 1), ("y", None), ("y", [1]), ("y", memoryview(b"abcd")[::2]),
        ("A", [1.0]), ("A", 1.0), ("A", b"1"), ("A", None), ("A", np.array(["a"])),
        ("A", np.array([object()])), ("A", np.array([1], "M8[7s]")), ("A", np.zeros(1, "i4,i4")),
        ("A", np.ma.masked_array([1], [True])), ("A", np.zeros(1, np.longdouble)),
        ("A", np.array([b"x"])),
    ],
)  # fmt: skip
def test_SER_04_a_value_of_another_type_is_refused_by_name(code, value):
    with pytest.raises(ArgumentError, match="v0"):
        plan(code).encode((value,))


@pytest.mark.parametrize("byte", [2, 0x80, 0xFF])
@pytest.mark.parametrize("place", [0, 6, 63, 64, 99])
def test_SER_04_an_array_of_bools_has_only_zeroes_and_ones(byte, place):
    """What compiled code masks and indexes by must be what NumPy itself would have made."""
    one = plan("A")
    frame = bytearray(one.encode((np.zeros(100, "?"),)))
    assert not one.decode(frame)[0].any()
    frame[len(frame) - 100 + place] = byte
    with pytest.raises(ArgumentError, match="neither 0 nor 1"):
        one.decode(frame)
    frame[len(frame) - 100 + place] = 1
    assert np.flatnonzero(one.decode(frame)[0]).tolist() == [place]


def test_an_array_of_another_element_type_is_refused_with_advice():
    wanted = _core.ARRAY_TYPES.index("<f8")
    with pytest.raises(ArgumentError, match="astype"):
        plan("A", wanted).encode((np.zeros(3, "f4"),))
    frame = plan("A").encode((np.zeros(3, "f4"),))
    with pytest.raises(ArgumentError, match="element type"):
        plan("A", wanted).decode(frame)


@pytest.mark.parametrize("codes", ["i", "f", "s", "y", "b", "A", "iisy", "AsA", "n"])
def test_BND_04_SER_05_every_cut_and_every_added_byte_is_refused(codes):
    values = {"i": -5, "f": 2.5, "s": "text\0ü", "y": b"by\0tes", "b": True, "n": None,
              "A": np.arange(5, dtype="i2")}  # fmt: skip
    one = plan(codes)
    frame = one.encode(tuple(values[code] for code in codes))
    one.decode(frame)
    for size in range(len(frame)):
        with pytest.raises(ArgumentError):
            one.decode(frame[:size])
    with pytest.raises(ArgumentError):
        one.decode(frame + b"\0")


@given(data=st.binary(max_size=80), codes=st.text("nbifsyAM", max_size=5), optional=st.booleans())
@settings(max_examples=1500, deadline=None)
def test_SER_02_random_bytes_are_decoded_or_refused_by_type(data, codes, optional):
    one = plan(codes, *(hooks(list[int]) if c == "M" else None for c in codes), optional=optional)
    try:
        values = one.decode(data)
    except ArgumentError:
        return
    assert len(values) == len(codes)


@pytest.mark.parametrize("size", [2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64 - 8, 5])
@pytest.mark.parametrize("code", ["s", "y"])
def test_BND_02_BND_04_a_length_beyond_the_frame_is_refused(code, size):
    frame = struct.pack("<Q", size) + b"text"
    with pytest.raises(ArgumentError, match="beyond"):
        plan(code).decode(frame)


def array_frame(code: int, ndim: int, shape: list[int], data: bytes = b"") -> bytes:
    head = bytes([code, ndim]) + b"".join(struct.pack("<Q", n) for n in shape)
    head = struct.pack("<I", 4 + len(head)) + head
    return head + bytes(-len(head) % 64) + data


@pytest.mark.parametrize(
    "shape",
    [
        [2**64 - 1], [2**63], [2**61], [2**32, 2**32], [2**33, 2**31], [2**16] * 4, [3], [1, 2, 2],
        [0, 2**63], [0, 2**64 - 1], [2**62, 0, 2**62], [2**40, 2**20],
    ],
)  # fmt: skip
def test_BND_02_shapes_that_overflow_or_exceed_the_data_are_refused(shape):
    code = _core.ARRAY_TYPES.index("<f8")
    with pytest.raises(ArgumentError):
        plan("A").decode(array_frame(code, len(shape), shape, bytes(16)))


def test_array_headers_are_checked():
    good = array_frame(8, 1, [2], bytes(16))
    assert plan("A").decode(good)[0].tolist() == [0, 0]
    for code in [0, 41, 42, 127, 128, 255]:
        with pytest.raises(ArgumentError):
            plan("A").decode(array_frame(code, 1, [2], bytes(16)))
    for ndim in [33, 64, 65, 255]:
        with pytest.raises(ArgumentError, match="dimensions"):
            plan("A").decode(array_frame(8, ndim, [1] * ndim, bytes(8)))
    for head in [0, 3, 4, 13, 15, 2**31, 2**32 - 1]:
        with pytest.raises(ArgumentError):
            plan("A").decode(struct.pack("<I", head) + good[4:])


@pytest.mark.parametrize("data", [b"\2", b"\xff"])
def test_SER_04_a_bool_is_0_or_1(data):
    with pytest.raises(ArgumentError):
        plan("b").decode(data)


def test_SER_05_ints_have_one_form():
    assert plan("i").decode(b"\1" + struct.pack("<Q", 2**63)) == (2**63,)
    for bad in (b"\1" + struct.pack("<Q", 2**63 - 1), b"\2" + bytes(8), b"\xff" + bytes(8)):
        with pytest.raises(ArgumentError, match="shortest"):
            plan("i").decode(bad)


def test_SER_04_text_must_be_utf_8():
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"):
        with pytest.raises(ArgumentError, match="UTF-8"):
            plan("s").decode(struct.pack("<Q", len(bad)) + bad)


def test_SER_02_nested_values_have_a_limit_on_both_sides():
    nested: list = []
    for _ in range(31):
        nested = [nested]
    one = plan("M", hooks(list))
    assert one.decode(one.encode((nested,))) == (nested,)
    with pytest.raises(ArgumentError, match="32 levels"):
        one.encode(([nested],))
    deep = b"\x91" * 5000 + b"\xc0"
    with pytest.raises(ArgumentError, match="deeper"):
        one.decode(struct.pack("<Q", len(deep)) + deep)


def test_the_number_of_values_must_fit():
    with pytest.raises(TypeError):
        plan("ii").encode((1,))
    with pytest.raises(TypeError):
        plan("i").encode((1, 2))
    with pytest.raises(TypeError):
        plan("i").encode((_core.MISSING,))


def test_impossible_plans_are_refused():
    for codes, names, details, optional in [
        (b"x", ("a",), (None,), False),
        (b"ii", ("a",), (None,), False),
        (b"A" * 17, ("a",) * 17, (0,) * 17, False),
        (b"i" * 33, ("a",) * 33, (None,) * 33, True),
        (b"i" * 256, ("a",) * 256, (None,) * 256, False),
        (b"A", ("a",), (41,), False),
        (b"A", ("a",), (-1,), False),
    ]:
        with pytest.raises(ValueError, match=r".+"):
            _core.Plan(codes, names, details, optional)


# ---- buffers that run code or move (BND-22) ------------------------------------------------------


def test_BND_22_buffers_are_held_while_they_are_read():
    data = bytearray(b"0123456789")

    class Index:
        def __index__(self) -> int:
            data.extend(b"x" * 10000)  # moves the bytes that were given before
            return 7

    one = plan("yi")
    assert one.decode(one.encode((data, Index())))[1] == 7
    one = plan("Ai")
    array = np.arange(4)

    class Resize:
        def __index__(self) -> int:
            array.resize(10_000)  # refused: the frame holds the buffer
            return 7

    with pytest.raises(ValueError, match="resize"):
        one.encode((array, Resize()))
    assert one.encode((array, 7))


@pytest.mark.parametrize(
    "value",
    [bytearray(), memoryview(b""), memoryview(bytearray(5)), memoryview(b"abc").cast("B"),
     np.arange(6, dtype="u1"), memoryview(np.zeros((2, 2)))],
)  # fmt: skip
def test_BND_22_any_contiguous_buffer_is_bytes(value):
    assert there_and_back("y", value) == (bytes(value),)


def test_BND_22_released_and_strided_memory_is_refused():
    view = memoryview(b"12345678")
    for bad in (view[::2], np.arange(8)[::2], np.zeros((3, 3)).T):
        with pytest.raises(ArgumentError):
            plan("y").encode((bad,))
    view.release()
    with pytest.raises((ArgumentError, ValueError)):
        plan("y").encode((view,))


def test_BND_22_an_error_in_the_middle_releases_every_buffer():
    array = np.arange(100)
    for _ in range(50):
        with pytest.raises(ArgumentError):
            plan("AAi").encode((array, array, "no"))
    array.resize(5)  # nothing holds it any more
    data = bytearray(10)
    with pytest.raises(ArgumentError):
        plan("yi").encode((data, "no"))
    data.append(1)


# ---- what crosses --------------------------------------------------------------------------------


@given(st.integers(-(2**63), 2**64 - 1))
def test_ints_cross(value):
    assert there_and_back("i", value) == (value,)


@given(st.floats())
def test_SER_04_floats_cross_bit_by_bit(value):
    (back,) = there_and_back("f", value)
    assert struct.pack("<d", back) == struct.pack("<d", value)


@given(st.text(), st.binary(max_size=2000))
def test_text_and_bytes_cross(text, data):
    assert there_and_back("sysy", text, data, text, data) == (text, data, text, data)


def test_whole_numbers_are_floats_and_numpy_scalars_are_numbers():
    assert there_and_back("f", 3) == (3.0,)
    assert there_and_back("f", np.float32(0.5)) == (0.5,)
    assert there_and_back("f", np.int64(5)) == (5.0,)
    assert there_and_back("i", np.uint64(2**64 - 1)) == (2**64 - 1,)
    assert math.copysign(1, there_and_back("f", -0.0)[0]) == -1


@pytest.mark.parametrize("name", [name for name in _core.ARRAY_TYPES if name])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4), (0, 5), (2, 1, 3), (1,) * 32])
def test_arrays_cross_with_type_and_shape(name, shape):
    rng = np.random.default_rng(1)
    value = rng.integers(0, 2, shape).astype(name)
    one = plan("iAs")
    number, back, text = one.decode(one.encode((1, value, "x")))
    assert (number, text) == (1, "x")
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    assert (back == value).all()
    assert back.flags.writeable
    assert back.flags.aligned


def test_arrays_in_any_memory_order_cross():
    value = np.arange(24).reshape(2, 3, 4)
    for one in (value.T, value[:, ::2], value[::-1], np.asfortranarray(value), value.astype(">i8")):
        (back,) = there_and_back("A", one)
        assert (back == one).all()
        assert back.dtype.isnative


def test_many_arrays_cross_in_one_frame():
    values = tuple(np.arange(n, dtype="f8") for n in range(16))
    for left, right in zip(there_and_back("A" * 16, *values), values, strict=True):
        assert (left == right).all()


def test_what_is_left_out_stays_left_out():
    one = plan("isf", optional=True)
    for values in [(1, "a", 2.0), (1, _core.MISSING, 2.0), (_core.MISSING,) * 3]:
        assert one.decode(one.encode(values)) == values
    with pytest.raises(ArgumentError, match="more values"):
        one.decode(struct.pack("<I", 8) + bytes(9))
