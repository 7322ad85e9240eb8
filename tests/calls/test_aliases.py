"""Names that stand for types: ``type Rows = list[Row]``, and NumPy's NDArray from 2.5 on."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pyenclave.calls import types
from pyenclave.calls.aliases import expand
from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError

T = TypeVar("T")
U = TypeVar("U")


def alias(name: str, value: Any, parameters: tuple[Any, ...] = ()) -> Any:
    """Return what ``type name[parameters] = value`` makes."""
    maker = getattr(typing, "TypeAliasType", None)
    if maker is None:  # before Python 3.12
        maker = pytest.importorskip("typing_extensions").TypeAliasType
    return maker(name, value, type_params=parameters)


class Row(msgspec.Struct):
    name: str


def test_an_alias_is_what_it_stands_for() -> None:
    rows = alias("Rows", list[Row])
    pair = alias("Pair", dict[U, T], (T, U))  # its value mentions them in the other order
    array = alias("Array", np.ndarray[Any, np.dtype[T]], (T,))
    for given, wanted in (
        (rows, list[Row]),
        (pair[int, str], dict[str, int]),
        (array[np.float64], np.ndarray[Any, np.dtype[np.float64]]),
        (alias("Deep", alias("Inner", rows)), list[Row]),
        (list[rows], list[list[Row]]),
        (dict[str, pair[int, str]], dict[str, dict[str, int]]),
        (Optional[rows], Optional[list[Row]]),  # noqa: UP045 - of a value
        (Annotated[rows, "note"], Annotated[list[Row], "note"]),
        (Iterator[rows], Iterator[list[Row]]),
        (typing.Union[rows, int], typing.Union[list[Row], int]),  # noqa: UP007
        (tuple[rows, ...], tuple[list[Row], ...]),
    ):
        assert expand(given) == wanted


@pytest.mark.parametrize(
    "annotation",
    [
        *(int, None, Any, "text", list, list[int], int | None, Literal["a", 1], T),
        *(np.ndarray, dict[str, list[Row]], Annotated[int, "note"], Iterator[int], tuple[()]),
    ],
)
def test_what_mentions_none_is_left_as_it_is(annotation: Any) -> None:
    assert expand(annotation) is annotation


def test_an_alias_that_is_made_of_itself_is_refused() -> None:
    """``type Tree = list[Tree]``: its expansion has no end."""
    inside: list[Any] = []

    class Lazy:
        __name__ = "Tree"
        __value__ = property(lambda _: list[inside[0]])  # type: ignore[misc]

    Lazy.__name__ = Lazy.__qualname__ = "TypeAliasType"
    Lazy.__module__ = "typing"
    inside.append(Lazy())
    with pytest.raises(ArgumentError, match=r"f\(x\): the type Tree is made of itself"):
        expand(inside[0], "f(x)")


def test_an_alias_that_does_not_fit_its_arguments_is_refused_by_name() -> None:
    wrong = alias("Wrong", dict[T, U], (T, U))[int]
    with pytest.raises(ArgumentError, match=r"f\(x\): the type Wrong cannot be read"):
        expand(wrong, "f(x)")


def test_functions_and_fields_may_use_them() -> None:
    table = alias("Table", npt.NDArray[np.float64])
    rows = alias("Rows", list[Row])

    def score(a: Any, b: Any) -> Any:
        return a

    score.__qualname__ = "score"
    score.__annotations__ = {"a": table, "b": rows | None, "return": table}
    plain = Signature.of(as_plain)
    assert [p.wire for p in Signature.of(score).parameters] == [p.wire for p in plain.parameters]
    assert Signature.of(score).returns == plain.returns == ["array", "<f8"]


@pytest.mark.skipif(not hasattr(typing, "TypeAliasType"), reason="of Python 3.12, as msgspec is")
def test_so_may_fields_of_classes() -> None:
    table = alias("Table", npt.NDArray[np.float64])
    rows = alias("Rows", list[Row])
    holder = msgspec.defstruct("Holder", [("table", table), ("rows", rows)])
    assert types.to_wire(holder, "x") == ["struct", "Holder"]
    encode, decode = types.hooks(holder)
    found = decode(encode(holder(np.arange(3.0), [Row("a")])))
    assert found.rows == [Row("a")]
    assert found.table.dtype == np.float64
    with pytest.raises(msgspec.ValidationError):
        decode(encode(holder(np.arange(3, dtype=np.int32), [])))


def as_plain(a: npt.NDArray[np.float64], b: Optional[list[Row]]) -> npt.NDArray[np.float64]:  # noqa: UP045
    return a


def test_numpys_own_is_an_array() -> None:
    """A plain class with arguments before NumPy 2.5, an alias since."""
    assert types.to_wire(expand(npt.NDArray[np.float32]), "x") == ["array", "<f4"]
    assert types.to_wire(expand(npt.NDArray[Any]), "x") == ["array", ""]


def test_a_new_type_of_an_alias_is_what_it_stands_for() -> None:
    Vector = typing.NewType("Vector", npt.NDArray[np.float64])  # type: ignore[valid-newtype]
    assert types.to_wire(Vector, "x") == ["array", "<f8"]


@pytest.mark.skipif(not hasattr(typing, "TypeAliasType"), reason="of Python 3.12, as msgspec is")
def test_limits_of_decimals_hold_behind_both() -> None:
    Price = typing.NewType("Price", alias("Money", Decimal))  # type: ignore[valid-newtype]
    _, decode = types.hooks(list[Price])
    assert decode(msgspec.msgpack.encode(["1.5"])) == [Decimal("1.5")]
    with pytest.raises(ArgumentError, match="too large"):
        decode(msgspec.msgpack.encode(["1E+999999"]))
