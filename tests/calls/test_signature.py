"""Signatures: what annotations become, what is refused, and what an image's table may hold."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Optional, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pyenclave import _core
from pyenclave.calls.signature import RESERVED_NAMES, Signature, functions_of, native_functions
from pyenclave.errors import ArgumentError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Applicant:
    name: str
    age: int
    colour: Colour = Colour.RED
    history: list[float] = dataclasses.field(default_factory=list)


class Point(msgspec.Struct):
    x: float
    y: float


class Pair(NamedTuple):
    left: int
    right: str


class Options(TypedDict):
    depth: int


class Node(msgspec.Struct):
    value: int
    next: Optional[Node] = None  # noqa: UP045 - as users write it


def signature(annotation: Any, returns: Any = None) -> Signature:
    def f(x):
        return x

    f.__qualname__ = "f"
    f.__annotations__ = {"x": annotation, "return": returns}
    return Signature.of(f)


def there_and_back(annotation: Any, value: Any, *, typed: bool = True) -> Any:
    """Encode as a host, decode as a worker (typed) or as a host without the classes."""
    inside = signature(annotation)
    wire = json.loads(json.dumps(inside.to_wire()))
    outside = Signature.from_wire(wire)
    data = outside.request_plan.encode((value,))
    return (inside if typed else outside).request_plan.decode(data)[0]


# ---- refused -----------------------------------------------------------------------------------


class DataFrame:
    """Stands for pandas.DataFrame."""


DataFrame.__module__ = "pandas.core.frame"


class BaseModel:
    """Stands for pydantic.BaseModel."""


BaseModel.__module__ = "pydantic.main"


class Model(BaseModel):
    x: int


@pytest.mark.parametrize(
    ("annotation", "advice"),
    [
        (DataFrame, "Arrow IPC"),
        (list[DataFrame], "Arrow IPC"),
        (Model, "dataclass or a msgspec.Struct"),
        (object, "Types that cross"),
        (complex, "Types that cross"),
        (Path, "as str"),
        (type, "Types that cross"),
        (memoryview, "Types that cross"),
        (npt.NDArray[np.str_], "Name the width"),
        (npt.NDArray[np.object_], "Send a list"),
        (npt.NDArray[np.datetime64], "Name the unit"),
        ("NoSuchName", "cannot be read"),
        (Literal[b"x"], "Types that cross"),
        (dict[str, DataFrame] | None, "Arrow IPC"),
    ],
)
def test_a_type_that_does_not_cross_is_refused_with_advice(annotation, advice):
    with pytest.raises(ArgumentError, match=advice):
        signature(annotation)


def test_a_field_that_does_not_cross_is_found_at_build():
    @dataclasses.dataclass
    class Row:
        data: dict[str, list[DataFrame]]

    globals()["Row"] = Row
    try:
        with pytest.raises(ArgumentError, match=r"Row\.data"):
            signature(Row)
    finally:
        del globals()["Row"]


def test_parameters_must_be_named_and_annotated():
    def no_annotation(x): ...
    def no_result(x: int): ...
    def stars(*x: int) -> None: ...
    def kw(**x: int) -> None: ...

    for function, text in [(no_annotation, "no annotation"), (no_result, "returns"),
                           (stars, r"\*"), (kw, r"\*")]:  # fmt: skip
        function.__qualname__ = function.__name__
        with pytest.raises(ArgumentError, match=text):
            Signature.of(function)


@pytest.mark.parametrize(
    "name", [*sorted(RESERVED_NAMES), "_hidden", "__init__", "a.b", "class", "1x"]
)
def test_names_of_the_handle_are_refused(name):
    def f() -> None: ...

    f.__qualname__ = name
    with pytest.raises(ArgumentError, match=r"name|called"):
        Signature.of(f)


def test_a_function_that_is_not_at_the_top_of_the_module_is_refused():
    def inner() -> None: ...

    with pytest.raises(ArgumentError, match="plain functions"):
        Signature.of(inner)


@pytest.mark.parametrize(
    "wire",
    [
        {}, {"name": "f"}, {"name": 5, "kind": "python", "params": [], "returns": "int"},
        {"name": "f", "kind": "magic", "params": [], "returns": "int"},
        {"name": "f", "kind": "python", "params": [], "returns": "object"},
        {"name": "f", "kind": "python", "params": [], "returns": ["array", "|O"]},
        {"name": "f", "kind": "python", "params": [], "returns": ["list"]},
        {"name": "f", "kind": "python", "params": [], "returns": ["list", "int", "int"]},
        {"name": "f", "kind": "python", "params": [], "returns": ["literal"]},
        {"name": "f", "kind": "python", "params": [], "returns": []},
        {"name": "f", "kind": "python", "params": [], "returns": 7},
        {"name": "f", "kind": "python", "params": 7, "returns": "int"},
        {"name": "f", "kind": "python", "params": [{"name": "x"}], "returns": "int"},
        {"name": "f", "kind": "python", "params": [], "returns": "int", "more": 1},
        {"name": "close", "kind": "python", "params": [], "returns": "int"},
        {"name": "__class__", "kind": "python", "params": [], "returns": "int"},
    ],
)  # fmt: skip
def test_a_malformed_signature_of_an_image_is_refused(wire):
    with pytest.raises(ArgumentError):
        Signature.from_wire(wire)


def test_SER_02_a_signature_that_nests_without_end_is_refused():
    nested: Any = "int"
    for _ in range(5000):
        nested = ["list", nested]
    with pytest.raises(ArgumentError, match="deep"):
        Signature.from_wire({"name": "f", "kind": "python", "params": [], "returns": nested})


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[int], [1, "2"]), (list[int], [True]), (list[int], [1.0]), (list[int], (1, None)),
        (dict[str, int], {"a": "b"}), (dict[str, int], {1: 1}), (tuple[int, str], [1]),
        (tuple[int, str], [1, 2]), (Literal["a", "b"], "c"), (Applicant, {"name": "x"}),
        (Applicant, {"name": "x", "age": "1"}), (Applicant, {"name": "x", "age": 1, "colour": "no"}),  # noqa: E501
        (Point, {"x": 1.0}), (Optional[int], "x"), (int | str, 1.5), (Colour, "green"),  # noqa: UP045
        (list[bytes], ["text"]), (list[str], [b"bytes"]), (list[np.ndarray], [[1, 2]]),
        (list[npt.NDArray[np.float64]], [np.zeros(2, "i8")]), (uuid.UUID, "no"),
        (dt.datetime, "yesterday"), (decimal.Decimal, "x"),
    ],
)  # fmt: skip
def test_SER_04_the_worker_refuses_values_of_another_type(annotation, value):
    with pytest.raises(ArgumentError):
        there_and_back(annotation, value)


def test_ints_beyond_64_bits_are_refused_inside_containers():
    with pytest.raises(ArgumentError, match="2\\*\\*64-1"):
        there_and_back(list[int], [2**64])


def test_SER_08_what_a_class_says_against_a_value_does_not_cross():
    @dataclasses.dataclass
    class Strict:
        x: int

        def __post_init__(self) -> None:
            raise ValueError("SECRET threshold is 7")

    globals()["Strict"] = Strict
    try:
        with pytest.raises(ArgumentError) as caught:
            there_and_back(Strict, {"x": 1})
        assert "SECRET" not in str(caught.value)
    finally:
        del globals()["Strict"]


# ---- what crosses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[int], [1, -(2**63), 2**64 - 1]), (list, [1, "a", None]), (tuple[int, str], (1, "ü")),
        (tuple[int, ...], (1, 2, 3)), (tuple, (1, 2)), (set[str], {"a", "b"}),
        (frozenset[int], frozenset({1})), (dict[str, list[float]], {"a": [0.5]}),
        (dict[int, bytes], {1: b"x"}), (Optional[int], None), (int | None, 5),  # noqa: UP045
        (int | str, "x"), (Literal["a", 5], 5), (Any, {"x": [1, None]}),
        (Applicant, Applicant("Ada", 36, Colour.BLUE, [1.0])), (Point, Point(1.0, 2.0)),
        (Pair, Pair(1, "x")), (Options, {"depth": 3}), (Node, Node(1, Node(2))),
        (list[Applicant], [Applicant("a", 1)]), (Colour, Colour.BLUE),
        (dt.datetime, dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)), (dt.date, dt.date(2026, 1, 2)),  # noqa: E501
        (dt.time, dt.time(1, 2)), (dt.timedelta, dt.timedelta(seconds=5)),
        (decimal.Decimal, decimal.Decimal("1.10")), (uuid.UUID, uuid.UUID(int=5)),
        (bytearray, bytearray(b"x")), (list[bytes], [b"a", b""]),
    ],
)  # fmt: skip
def test_containers_and_classes_cross(annotation, value):
    assert there_and_back(annotation, value) == value


def test_numpy_values_cross_inside_containers():
    back = there_and_back(dict[str, np.ndarray], {"a": np.arange(6).reshape(2, 3)})
    assert (back["a"] == np.arange(6).reshape(2, 3)).all()
    assert there_and_back(list[float], [np.float64(0.5), np.float32(1)]) == [0.5, 1.0]


def test_a_host_without_the_classes_gets_dicts_and_keeps_tuples():
    assert there_and_back(Point, Point(1.0, 2.0), typed=False) == {"x": 1.0, "y": 2.0}
    assert there_and_back(tuple[int, set[int]], (1, {2}), typed=False) == (1, {2})
    assert there_and_back(Applicant, {"name": "x", "age": 1}) == Applicant("x", 1)


def test_arrays_get_their_own_code_with_the_element_type():
    def f(a: np.ndarray, b: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        return a

    f.__qualname__ = "f"
    one = Signature.of(f)
    assert [item.wire for item in one.parameters] == [["array", ""], ["array", "<f4"]]
    assert one.returns == ["array", "|b1"]
    assert str(one) == "f(a: ndarray[any], b: ndarray[<f4]) -> ndarray[|b1]"


def test_functions_of_a_module_are_sorted_and_only_marked_ones():
    def b(x: int) -> int: ...
    def a(*, y: str = "z", z: float) -> None: ...
    def hidden() -> None: ...

    module = ModuleType("entry")
    for function in (b, a, hidden):
        function.__qualname__ = function.__name__
        setattr(module, function.__name__, function)
        function.__pyenclave_ecall__ = function is not hidden
    module.again = b
    found = functions_of(module)
    assert [item["name"] for item in found] == ["a", "b"]
    assert found[0]["params"][0] == {"name": "y", "type": "str", "default": True, "keyword": True}
    assert json.loads(json.dumps(found)) == found
    other = Signature.from_wire(found[1])
    assert other.to_wire() == found[1]


def kinds_of_functions() -> list[Any]:
    """Functions that differ in one thing each from another one of them."""

    def make(annotations: dict[str, Any], code: str = "x", private: bool = False) -> Any:
        space: dict[str, Any] = {}
        exec(f"def f({code}): ...", space)
        space["f"].__annotations__ = annotations
        if private:
            space["f"].__pyenclave_private__ = True
        return space["f"]

    array, other = npt.NDArray[np.float64], npt.NDArray[np.int32]
    kinds: list[Any] = [None, type(None), bool, int, float, str, bytes, bytearray, Any, dt.date]
    kinds += [array, other, np.ndarray, npt.NDArray[Any], list[int], list[float], Optional[int]]  # noqa: UP045
    kinds += [Colour, Applicant, Literal["a"], type("int", (int,), {}), uuid.UUID]
    kinds += ["int", "float", "list[int]"]
    found = [make({"x": kind, "return": kind}) for kind in kinds]
    found += [make({"x": int, "return": kind}) for kind in kinds]
    found += [make({"x": int, "return": int}, code) for code in ("x=1", "*, x", "*, x=1", "x, /")]
    found += [make({"y": int, "return": int}, "y"), make({"x": int, "return": int}, private=True)]
    both = {"x": int, "y": float, "return": int}
    found += [make(both, code) for code in ("x, y", "y, x", "x, y=1", "x, *, y", "*, x, y")]
    return found


def test_a_signature_that_says_it_is_of_a_function_is_what_would_be_taken_of_it():
    """The worker uses the measured one instead: it may be surer than right, never the reverse."""
    functions = kinds_of_functions()
    taken: list[Signature | None] = []
    for function in functions:
        try:
            taken.append(Signature.of(function))
        except ArgumentError:
            taken.append(None)
    measured = [None if one is None else Signature.from_wire(one.to_wire()) for one in taken]
    right = 0
    for expected in filter(None, measured):
        for function, real in zip(functions, taken, strict=True):
            if expected.is_of(function):
                right += 1
                assert real is not None
                assert real.to_wire() == expected.to_wire(), (str(real), str(expected))
    assert right > len(functions) // 2
    plain = Signature.from_wire(Signature.of(functions[3]).to_wire())
    for code in ("*x", "**x", "x, y"):
        space: dict[str, Any] = {}
        exec(f"def f({code}) -> int: ...", space)
        space["f"].__annotations__["x"] = int
        assert not plain.is_of(space["f"])


def test_arguments_are_bound_by_position_and_name():
    def f(a: int, b: int = 2, *, c: int = 3) -> None: ...

    f.__qualname__ = "f"
    one = Signature.of(f)
    missing = _core.MISSING
    assert one.bind((1,), {}) == (1, missing, missing)
    assert one.bind((1,), {"c": 5}) == (1, missing, 5)
    assert one.bind((), {"a": 1, "b": 4}) == (1, 4, missing)
    for args, kwargs, text in [((), {}, "missing"), ((1, 2, 3), {}, "too many"),
                               ((1,), {"a": 1}, "twice"), ((1,), {"d": 1}, "unknown")]:  # fmt: skip
        with pytest.raises(ArgumentError, match=text):
            one.bind(args, kwargs)


def test_native_functions_have_bytes_or_arrays():
    found = native_functions({"b": "", "a": "f8 -> bytes", "c": "bytes -> f4"})
    assert [item["name"] for item in found] == ["a", "b", "c"]
    assert found[0]["params"][0]["type"] == ["array", "<f8"]
    assert found[1]["returns"] == "bytes"
    for name, text in [("a", "f8"), ("a", "f8 -> O"), ("a", "int -> "), ("close", ""), ("a b", "")]:
        with pytest.raises(ArgumentError):
            native_functions({name: text})
