"""The table of docs/types.md: each row in both directions, at its limits and beyond."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import sys
import uuid
import zoneinfo
from collections.abc import Mapping, Sequence
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    TypedDict,
    TypeVar,
)

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError

T = TypeVar("T")
Decimal = decimal.Decimal


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


class Text(enum.StrEnum):
    A = "a"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Mixed(enum.Enum):
    A = 1
    B = "b"


class Floats(enum.Enum):
    A = 1.5


@dataclasses.dataclass
class Base:
    x: int
    shared: ClassVar[int] = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int
    y: tuple[int, ...] = ()


@dataclasses.dataclass(kw_only=True)
class Child(Base):
    more: list[Frozen] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Box(Generic[T]):
    inside: T


@dataclasses.dataclass
class Init:
    x: int
    y: dataclasses.InitVar[int]


class Point(msgspec.Struct, frozen=True):
    x: float
    y: float = 0.0


class Row(msgspec.Struct, array_like=True):
    x: int
    y: str


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag="dog", tag_field="kind2"):
    name: str


class Dog2(msgspec.Struct, tag="dog"):
    name: str


class Untagged(msgspec.Struct):
    name: str


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    x: int = 0


class Pair(NamedTuple):
    left: int
    right: Frozen


class Options(TypedDict, total=False):
    depth: int


class Money(msgspec.Struct):
    amount: Decimal
    parts: list[Decimal] = []


class Refund(Money):
    """Has no field but what it inherits."""


@dataclasses.dataclass
class Price:
    amount: Decimal


@dataclasses.dataclass
class Offer(Price):
    pass


class Sum(NamedTuple):
    amount: Decimal


class Total(Sum):
    pass


Name = NewType("Name", str)
UTC = dt.UTC
HALF = dt.timezone(dt.timedelta(hours=5, minutes=30))


def signature(annotation: Any) -> Signature:
    def f(x):
        return x

    f.__qualname__ = "f"
    f.__annotations__ = {"x": annotation, "return": annotation}
    return Signature.of(f)


def inward(annotation: Any, value: Any) -> Any:
    """From a host without the classes to the enclave, which has them."""
    inside = signature(annotation)
    outside = Signature.from_wire(json.loads(json.dumps(inside.to_wire())))
    return inside.request_plan.decode(outside.request_plan.encode((value,)))[0]


def outward(annotation: Any, value: Any, *, typed: bool = True) -> Any:
    """From the enclave to a host with the classes, or without them."""
    inside = signature(annotation)
    host = inside if typed else Signature.from_wire(json.loads(json.dumps(inside.to_wire())))
    return host.reply_plan.decode(inside.reply_plan.encode((value,)))[0]


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Mixed, "all str or all int"),
        (Floats, "all str or all int"),
        (Init, "InitVar"),
        (Base | Frozen, "more than one dataclass"),
        (Untagged | Cat, "tag"),
        (Cat | Dog, "tag_field"),
        (list[int] | set[int], "array-like"),
        (dict[str, int] | Base, "dict"),
        (complex, "Types that cross"),
        (type(sys), "Types that cross"),
        (Literal[1.5], "Types that cross"),
        (Literal[b"x"], "Types that cross"),
        (T, "Types that cross"),
        (dt.tzinfo, "Types that cross"),
        (range, "Types that cross"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_table_is_refused_at_build(annotation, text):
    with pytest.raises(ArgumentError, match=text):
        signature(annotation)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Number, 3), (Number, True), (Number, "ONE"), (Colour, "RED"), (Right, 4), (Text, "b"),
        (list[bool], [1]), (list[bool], [0]), (list[int], [True]), (list[int], [1.0]),
        (list[float], [True]), (list[float], ["1"]), (list[str], [b"a"]), (list[bytes], ["a"]),
        (list[str], ["\ud800"]), (dict[int, str], {"1": "a"}), (dict[str, int], {"a": None}),
        (set[int], {"a"}), (tuple[int, int], (1,)), (tuple[int, int], (1, 2, 3)),
        (tuple[int, ...], "ab"),
        (Literal[1], True), (Literal["a"], "b"), (Base, {"x": None}), (Base, {}), (Base, [1]),
        (Frozen, {"x": 1, "y": ["a"]}), (Child, {"x": 1, "more": [{"x": "1"}]}),
        (Box[int], {"inside": "a"}),
        (Strict, {"x": 1, "z": 2}), (Row, {"x": 1, "y": "a"}), (Row, [1]),
        (Cat | Dog2, {"lives": 9}),
        (Cat | Dog2, {"type": "cow", "lives": 9}), (Pair, (1,)), (Pair, (1, {"x": "no"})),
        (Options, {"depth": "1"}), (uuid.UUID, "x"), (uuid.UUID, b"\0" * 15),
        (dt.date, "2026-13-01"),
        (dt.time, "25:00"), (dt.timedelta, "1 day"), (Decimal, "1,5"),
        (Name, 5), (Annotated[int, msgspec.Meta(ge=0)], -1),
        (Annotated[str, msgspec.Meta(max_length=2)], "abc"),
    ],
)  # fmt: skip
def test_SER_04_values_of_another_type_are_refused(annotation, value):
    with pytest.raises(ArgumentError):
        inward(annotation, value)


def test_SER_06_only_the_declared_types_come_back():
    """No class is looked up by a name in the bytes: whatever they say becomes what is declared."""

    class Evil(str):
        def __reduce__(self):
            raise AssertionError

    with pytest.raises(ArgumentError, match="Evil"):
        inward(list[str], [Evil("x")])
    assert type(inward(str, Evil("x"))) is str
    assert type(inward(Any, {"__class__": "os.system"})) is dict
    assert type(inward(bytes, bytearray(b"x"))) is bytes


def test_SER_01_nothing_of_a_call_unpickles_or_evaluates(monkeypatch):
    import builtins
    import marshal
    import pickle

    def never(*args, **kwargs):
        raise AssertionError("something was unpickled or evaluated")

    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"),
                         (marshal, "loads"), (builtins, "eval"), (builtins, "exec")]:  # fmt: skip
        monkeypatch.setattr(module, name, never)
    values = [1, "a", b"b", None, [1.5], {"k": (1, 2)}]
    assert inward(list[Any], values) == [1, "a", b"b", None, [1.5], {"k": [1, 2]}]
    assert inward(np.ndarray, np.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(ArgumentError):
        inward(np.ndarray, np.array([object()]))
    with pytest.raises(ArgumentError):
        inward(list[np.ndarray], [np.array([object()])])


def test_SER_02_a_value_has_at_most_two_to_the_24_values_in_it():
    many = 1 << 24
    plan = signature(list[None]).request_plan
    frame = plan.encode(([None] * 10,))
    head = (1 + 4 + many).to_bytes(8, "little") + b"\xdd" + many.to_bytes(4, "big")
    assert len(frame) == 8 + 1 + 10
    assert _core.msgpack_check(head[8:] + b"\xc0" * many)
    for beyond in (many + 1, 2 * many):
        data = b"\xdd" + beyond.to_bytes(4, "big") + b"\xc0" * beyond
        assert not _core.msgpack_check(data)
    # Spread over maps, which cost most as objects: sixteen million empty ones are a gigabyte.
    spread = (b"\xdd" + (4096).to_bytes(4, "big")) + (b"\xdc\x10\x01" + b"\x80" * 4097) * 4096
    assert not _core.msgpack_check(spread)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("annotation", [int, list[int], Any, dict[str, int]])
def test_ints_beyond_64_bits_are_refused_with_advice(annotation, value):
    wrapped = {list[int]: [value], dict[str, int]: {"x": value}}.get(annotation, value)
    with pytest.raises(ArgumentError, match="bytes or str"):
        inward(annotation, wrapped)


def test_SER_02_decimals_have_limits_in_digits_and_exponent():
    for good in ("9" * 1000, "1E+10000", "-1E-10000", "0.10", "-0", "NaN", "-Infinity", "0E-9999"):
        back = inward(Decimal, Decimal(good))
        assert str(back) == str(Decimal(good))
        assert str(outward(Decimal, Decimal(good))) == str(Decimal(good))
    for bad in ("9" * 1001, "1E+10001", "1E-10001", "1E+999999999", "sNaN", "0." + "1" * 1001):
        for act in (
            lambda value: inward(Decimal, value),
            lambda value: outward(Decimal, value),
            lambda value: inward(dict[str, list[Decimal]], {"x": [value]}),
            lambda value: inward(Money, {"amount": value}),
            lambda value: inward(Money, {"amount": Decimal(1), "parts": [value]}),
            lambda value: inward(Refund, {"amount": value}),
            lambda value: inward(Offer, {"amount": value}),
            lambda value: inward(list[Offer], [{"amount": value}]),
            lambda value: inward(list[Total], [(value,)]),
            lambda value: inward(Box[Decimal], {"inside": value}),
            lambda value: inward(list[Money | None], [None, {"amount": value}]),
        ):
            with pytest.raises(ArgumentError):
                act(Decimal(bad))


@pytest.mark.parametrize(
    "value", [dt.datetime(1, 1, 1, tzinfo=HALF),
              dt.datetime(9999, 12, 31, 23, tzinfo=dt.timezone(-dt.timedelta(hours=5)))]
)  # fmt: skip
def test_a_time_outside_the_years_1_to_9999_in_utc_is_refused(value):
    with pytest.raises(ArgumentError, match="9999 in UTC"):
        inward(dt.datetime, value)


# ---- what crosses ------------------------------------------------------------------------------

_ZONES = st.one_of(
    st.none(),
    st.just(UTC),
    st.builds(dt.timezone, st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)).map(
        lambda delta: dt.timedelta(minutes=int(delta.total_seconds() // 60))
    )),
)  # fmt: skip


@given(st.datetimes(dt.datetime(1, 1, 3), dt.datetime(9999, 12, 29), timezones=_ZONES))
@example(dt.datetime(1, 1, 1, tzinfo=UTC))
@example(dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
@example(dt.datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
@settings(max_examples=300, deadline=None)
def test_SER_04_a_datetime_keeps_its_instant_and_an_aware_one_comes_back_in_utc(value):
    for back in (inward(dt.datetime, value), outward(dt.datetime, value, typed=False)):
        assert back == value
        if value.tzinfo is None:
            assert back.tzinfo is None
        else:
            assert back.tzinfo is UTC
            assert back.utcoffset() == dt.timedelta(0)


def test_the_second_of_two_equal_hours_is_kept_by_its_instant_only():
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    first, second = (dt.datetime(2026, 10, 25, 2, 30, fold=fold, tzinfo=berlin) for fold in (0, 1))
    gone = inward(dt.datetime, second) - inward(dt.datetime, first)
    assert gone == dt.timedelta(hours=1)
    assert inward(dt.datetime, dt.datetime(2026, 10, 25, 2, 30, fold=1)).fold == 0


@given(st.times(), st.dates(), st.timedeltas())
@settings(max_examples=200, deadline=None)
def test_times_dates_and_durations_cross_to_the_microsecond(time, date, delta):
    assert inward(dt.time, time) == time
    assert inward(dt.date, date) == date
    assert inward(dt.timedelta, delta) == delta
    assert outward(tuple[dt.time, dt.date], (time, date), typed=False) == (time, date)


def test_a_time_keeps_its_offset():
    back = inward(dt.time, dt.time(1, 2, 3, tzinfo=HALF))
    assert back.utcoffset() == HALF.utcoffset(None)


@given(st.uuids(), st.decimals(allow_nan=False, places=6))
@settings(max_examples=150, deadline=None)
def test_uuids_and_decimals_cross(identity, number):
    assert inward(uuid.UUID, identity) == identity
    assert str(inward(Decimal, number)) == str(number)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5)
    | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=30,
)  # fmt: skip


def kinds(value: Any) -> Any:
    """The types of a value and of what is in it: True equals 1, and is another type."""
    if isinstance(value, list):
        return [kinds(item) for item in value]
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    if isinstance(value, float):
        return (float, math.copysign(1, value))
    return type(value)


@given(_PLAIN)
@settings(max_examples=300, deadline=None)
def test_SER_04_plain_values_round_trip_with_their_types(value):
    for back in (inward(Any, value), outward(Any, value)):
        assert back == value
        assert kinds(back) == kinds(value)


@given(st.lists(st.floats(), max_size=5))
@settings(max_examples=100, deadline=None)
def test_SER_04_floats_keep_every_bit_inside_containers(values):
    back = inward(list[float], values)
    assert np.array(back).tobytes() == np.array(values).tobytes()


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_SER_05_junk_is_refused_or_has_the_declared_types(data):
    for annotation in (list[int], dict[str, bytes], Child, Cat | Dog2, Pair, dict[int, set[str]]):
        plan = signature(annotation).request_plan
        frame = len(data).to_bytes(8, "little") + data
        try:
            (value,) = plan.decode(frame)
        except ArgumentError:
            continue
        if annotation == list[int]:
            assert all(type(item) is int for item in value)


@pytest.mark.parametrize(
    ("annotation", "value", "plain"),
    [
        (Colour, Colour.BLUE, "blue"), (Number, Number.TWO, 2), (Text, Text.A, "a"),
        (Right, Right.READ | Right.WRITE, 3), (Base, Base(5), {"x": 5}),
        (Frozen, Frozen(1, (2, 3)), {"x": 1, "y": [2, 3]}),
        (Child, Child(x=1, more=[Frozen(2)]), {"x": 1, "more": [{"x": 2, "y": []}]}),
        (Box[int], Box(5), {"inside": 5}), (Point, Point(1.0), {"x": 1.0, "y": 0.0}),
        (Row, Row(1, "a"), [1, "a"]), (Cat | Dog2, Dog2("Rex"), {"type": "dog", "name": "Rex"}),
        (Cat | Dog2 | None, None, None), (Pair, Pair(1, Frozen(2)), (1, {"x": 2, "y": []})),
        (list[Pair], [Pair(1, Frozen(2))], [(1, {"x": 2, "y": []})]),
        (Options, {"depth": 3}, {"depth": 3}), (Options, {}, {}), (Name, "Ada", "Ada"),
        (Sequence[int], [1, 2], [1, 2]), (Mapping[str, int], {"a": 1}, {"a": 1}),
        (frozenset[int], frozenset({1}), frozenset({1})), (tuple[()], (), ()),
        (dict[uuid.UUID, dt.date], {uuid.UUID(int=1): dt.date(2026, 1, 2)},
         {uuid.UUID(int=1): dt.date(2026, 1, 2)}),
        (Literal["a", 1] | None, None, None), (int | None, None, None),
        (int | str | None, "x", "x"),
        (Annotated[int, msgspec.Meta(ge=0)], 5, 5),
    ],
)  # fmt: skip
def test_classes_cross_in_both_directions_also_to_a_side_without_them(annotation, value, plain):
    assert inward(annotation, value) == value
    assert inward(annotation, plain) == value
    assert type(inward(annotation, plain)) is type(value)
    assert outward(annotation, value) == value
    assert outward(annotation, value, typed=False) == plain


def test_an_unknown_key_of_a_dict_is_dropped_unless_the_class_forbids_it():
    assert inward(Base, {"x": 1, "other": 2}) == Base(1)
    with pytest.raises(ArgumentError, match="unknown field"):
        inward(Strict, {"other": 2})


def test_SER_04_bools_in_arrays_inside_containers_are_checked():
    plan = signature(list[np.ndarray]).request_plan
    frame = plan.encode(([np.array([True, False])],))
    with pytest.raises(ArgumentError, match="neither 0 nor 1"):
        plan.decode(frame.replace(b"\1\0", b"\7\0"))
