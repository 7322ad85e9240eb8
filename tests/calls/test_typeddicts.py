"""TypedDicts whose items are qualified: read-only, required, not required, in any order."""

from __future__ import annotations

import dataclasses
import decimal
import json
import sys
from typing import Annotated, Any, NewType, NotRequired, Required, TypedDict

import msgspec
import pytest

from pyenclave.calls.signature import Signature
from pyenclave.calls.typeddicts import plain
from pyenclave.errors import ArgumentError

if sys.version_info >= (3, 13):
    from typing import ReadOnly

    DICTS: Any = TypedDict
else:
    extensions: Any = pytest.importorskip("typing_extensions")
    ReadOnly, DICTS = extensions.ReadOnly, extensions.TypedDict

Decimal = decimal.Decimal


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


def outward(annotation: Any, value: Any) -> Any:
    """From the enclave to a host with the classes."""
    inside = signature(annotation)
    return inside.reply_plan.decode(inside.reply_plan.encode((value,)))[0]


class Options(TypedDict, total=False):
    depth: int


class Inner(DICTS):
    amount: ReadOnly[Decimal]


class Qualified(DICTS, total=False):
    must: Required[ReadOnly[int]]
    may: ReadOnly[NotRequired[str]]
    noted: Annotated[ReadOnly[Required[int]], msgspec.Meta(ge=0)]
    inner: ReadOnly[list[Inner]]
    late: ReadOnly[NotRequired[float]]


class Own(DICTS):
    next: ReadOnly[Own | None]


@dataclasses.dataclass
class Holder:
    inner: Inner


def test_read_only_items_are_what_they_are_without_it():
    least = {"must": 1, "noted": 0}
    most = {**least, "may": "a", "inner": [{"amount": Decimal("0.10")}], "late": 1.5}
    for annotation, value in (
        (Qualified, least),
        (Qualified, most),
        (list[Qualified], [least, most]),
        (dict[str, Qualified | None], {"a": None, "b": most}),
        (tuple[Inner, ...], (most["inner"][0],)),
        (Annotated[Inner, "a note"], most["inner"][0]),
        (NewType("Sum", Inner), most["inner"][0]),
    ):
        assert inward(annotation, value) == value
        assert outward(annotation, value) == value


@pytest.mark.parametrize(
    "value",
    [
        {"noted": 0},
        {"must": 1},
        {"must": "1", "noted": 0},
        {"must": 1, "noted": -1},
        {"must": 1, "noted": 0, "may": 1},
        {"must": 1, "noted": 0, "inner": [{}]},
        {"must": 1, "noted": 0, "inner": [{"amount": Decimal("1E+10001")}]},
        {"must": 1, "noted": 0, "late": "1"},
    ],
)
def test_and_are_checked_as_such(value):
    with pytest.raises(ArgumentError):
        inward(Qualified, value)


@pytest.mark.parametrize("annotation", [Own, Holder, list[Holder]])
def test_where_msgspec_would_have_to_know_it_read_only_is_refused_by_name(annotation):
    with pytest.raises(ArgumentError, match=r"does not cross: .*ReadOnly"):
        signature(annotation)


def test_a_typed_dict_without_it_is_left_as_it_is():
    assert plain(Options) is Options
    annotation = dict[str, list[Options] | None]
    assert plain(annotation) is annotation
