"""
Arrays whose elements the annotation describes: records, and strings of a fixed width.

``Annotated[numpy.ndarray, numpy.dtype([...])]`` names the fields. On the wire a record is packed
and little-endian, so that the bytes between fields, which are whatever was in memory before, never
cross; names, order and types of the fields must be equal on both sides, their layout need not.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np

from pyenclave import _core
from pyenclave.errors import ArgumentError

__all__ = [
    "ELEMENTS",
    "MAX_RECORD_FIELDS",
    "RecordDetail",
    "dtype_of",
    "element_of",
    "flaw",
    "is_masked",
]

MAX_RECORD_FIELDS = 256  # of a record and the records in it
MAX_RECORD_DEPTH = 8  # levels of records in records
_MAX_NAME = 64  # characters of a field's name
_MAX_ITEM = _core.FRAME_MAX_ITEM_SIZE

# Element types that a frame names by a code; the rest is described here.
ELEMENTS = {name: code for code, name in enumerate(_core.ARRAY_TYPES) if name}

_TEXT = re.compile(r"(?:\|S|<U)[1-9][0-9]{0,4}\Z")

# A string as NumPy writes a type, or a list of [name, element, sizes] for the fields of a record.
Element = Any


def is_masked(value: object) -> bool:
    """Whether *value* is a masked array."""
    # Naming np.ma would import it, and inside an enclave it is not on every lock list; where it
    # was never imported there is no masked array.
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(value, masked.MaskedArray)


def element_of(dtype: np.dtype[Any], depth: int = 0) -> Element:
    """
    Return the description of a type of elements; layout and byte order are not part of it.

    Raises:
        ArgumentError: It has objects, raw bytes, dates without a unit, or more than the limits.

    """
    if depth > MAX_RECORD_DEPTH:
        raise ArgumentError(f"a record nests deeper than {MAX_RECORD_DEPTH}")
    if dtype.names is not None and dtype.fields is not None:
        fields = []
        for name in dtype.names:
            field = dtype.fields[name][0]
            fields.append([name, element_of(field.base, depth + 1), list(field.shape)])
        return fields
    text = dtype.newbyteorder("<").str
    if text in ELEMENTS or _TEXT.match(text):
        return text
    raise ArgumentError(
        f"elements of {dtype} do not cross",
        expected="bools, numbers, dates with a unit, strings of a fixed width, and records of them",
        advice="Objects: a list. Strings of any length: a list, or a width such as 'U32'.",
    )


def dtype_of(element: Element) -> np.dtype[Any]:
    """
    Return the packed type of a description, which may come from an image.

    Raises:
        ArgumentError: It is no description, or exceeds the limits.

    """
    made = _dtype_of(element, 0, [0])
    if not 0 < made.itemsize <= _MAX_ITEM:
        raise ArgumentError(
            "an element of an array is too long", expected=f"at most {_MAX_ITEM} bytes"
        )
    return made


def _dtype_of(element: Element, depth: int, count: list[int]) -> np.dtype[Any]:
    if depth > MAX_RECORD_DEPTH:
        raise ArgumentError(f"a record nests deeper than {MAX_RECORD_DEPTH}")
    if isinstance(element, str):
        if element not in ELEMENTS and not _TEXT.match(element):
            raise ArgumentError("a type of the image is unknown", found=element[:80])
        return np.dtype(element)
    if not isinstance(element, list | tuple) or not element:
        raise ArgumentError("a type of the image is unknown", found=repr(element)[:80])
    fields: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
    for field in element:
        count[0] += 1
        if count[0] > MAX_RECORD_FIELDS:
            raise ArgumentError(f"a record has more than {MAX_RECORD_FIELDS} fields")
        match field:
            case [str(name), inner, [*sizes]] if (
                0 < len(name) <= _MAX_NAME
                and name.isprintable()
                and len(sizes) <= 8
                and all(type(size) is int and 0 < size <= _MAX_ITEM for size in sizes)
            ):
                made = _dtype_of(inner, depth + 1, count)
            case _:
                raise ArgumentError("a field of a record is unknown", found=repr(field)[:80])
        length = made.itemsize
        for size in sizes:
            length *= size
            if length > _MAX_ITEM:
                raise ArgumentError(
                    "an element of an array is too long", expected=f"at most {_MAX_ITEM} bytes"
                )
        fields.append((name, made, tuple(sizes)))
    names = [name for name, _, _ in fields]
    if len(set(names)) != len(names):
        raise ArgumentError("two fields of a record have one name", found=", ".join(names)[:80])
    total = sum(np.dtype((made, sizes)).itemsize for _, made, sizes in fields)
    if total > _MAX_ITEM:
        raise ArgumentError(
            "an element of an array is too long", expected=f"at most {_MAX_ITEM} bytes"
        )
    return np.dtype(fields)


def flaw(array: np.ndarray) -> str | None:
    """Return what is wrong with elements that NumPy itself would not have made (SER-04)."""
    dtype = array.dtype
    if dtype.names is not None:
        return next((found for name in dtype.names if (found := flaw(array[name]))), None)
    if array.size == 0 or dtype.kind not in "bU":
        return None
    if dtype.kind == "b":
        return "a bool is neither 0 nor 1" if array.view(np.uint8).max() > 1 else None
    # Compiled code trusts that these are characters.
    points = np.ascontiguousarray(array).reshape(-1).view("<u4")
    if points.max() > 0x10FFFF or ((points & 0xFFFFF800) == 0xD800).any():
        return "a string is not text"
    return None


class RecordDetail:
    """
    How an array of described elements crosses: what a frame plan asks for.

    Args:
        element: The description.
        dtype: The type to make inside, with the annotation's layout; None for the packed one.

    Raises:
        ArgumentError: The description is none, or exceeds the limits.

    """

    def __init__(self, element: Element, dtype: np.dtype[Any] | None = None) -> None:
        self.packed = dtype_of(element)
        self.element = element_of(self.packed)
        self.dtype = self.packed if dtype is None else dtype.newbyteorder("=")
        self.item_size = self.packed.itemsize

    def prepare(self, value: Any, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the packed bytes of *value*, and its shape."""
        if not isinstance(value, np.ndarray) or is_masked(value):
            raise ArgumentError(
                f"{name} does not fit its type",
                expected=f"a NumPy array of {self.packed}",
                found=type(value).__name__,
            )
        value = np.asarray(value)
        try:
            found = element_of(value.dtype)
        except ArgumentError:
            found = None
        if found != self.element:
            raise ArgumentError(
                f"{name} does not fit its type",
                expected=f"an array of {self.packed}",
                found=f"one of {value.dtype}",
                advice="Names, order and types of the fields must be equal.",
            )
        packed = np.ascontiguousarray(value.astype(self.packed, copy=False))
        wrong = flaw(packed)
        if wrong is not None:
            raise ArgumentError(f"{name} does not fit its type: {wrong}")
        return packed.reshape(-1).view(np.uint8), value.shape

    def restore(self, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the array whose packed bytes are *data*."""
        array = data.view(self.packed).reshape(shape)
        wrong = flaw(array)
        if wrong is not None:
            raise ArgumentError(f"malformed frame: {wrong}")
        return array.astype(self.dtype, copy=False)
