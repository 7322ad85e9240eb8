"""
The types that cross between host and enclave.

A type has three forms: the annotation, a JSON-able description that travels in the image (the
*wire type*), and codes of a frame plan. ``docs/types.md`` is the table for users.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime as dt
import decimal
import enum
import types
import typing
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from pyenclave.calls import arrays, arrow
from pyenclave.calls.aliases import expand
from pyenclave.calls.arrays import ELEMENTS, is_masked
from pyenclave.calls.typeddicts import is_typeddict, plain, unqualified
from pyenclave.errors import ArgumentError

__all__ = ["MAX_NESTED_TYPES", "code_of", "describe", "from_wire", "hooks", "to_wire"]

# A wire type: a name, or a list of a kind and its parts.
Wire = Any

MAX_NESTED_TYPES = 32  # levels of a type, and of a value
MAX_DECIMAL_DIGITS = 1000
MAX_DECIMAL_EXPONENT = 10_000  # of the first digit; int(Decimal("1e999999999")) is a gigabyte

_SCALARS: dict[Any, str] = {
    None: "None",
    type(None): "None",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    bytes: "bytes",
    bytearray: "bytearray",
    dt.datetime: "datetime",
    dt.date: "date",
    dt.time: "time",
    dt.timedelta: "timedelta",
    decimal.Decimal: "decimal",
    uuid.UUID: "uuid",
    Any: "any",
}
_BY_NAME = {name: kind for kind, name in _SCALARS.items() if kind is not None}
_CODES = {"None": "n", "bool": "b", "int": "i", "float": "f", "str": "s", "bytes": "y"}

_SEQUENCES: dict[Any, str] = {
    list: "list",
    collections.abc.Sequence: "list",
    collections.abc.Collection: "list",
    set: "set",
    frozenset: "frozenset",
}
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)

_ADVICE = {
    "pandas": "Send a pyarrow.Table (Table.from_pandas), Arrow IPC bytes, or columns as arrays.",
    "polars": "Send a pyarrow.Table (to_arrow()), Arrow IPC bytes, or columns as arrays.",
    "pyarrow": "Of Arrow, pyarrow.Table and pyarrow.RecordBatch cross, or IPC streams as bytes.",
    "pydantic": "Use a dataclass or a msgspec.Struct.",
    "torch": "Send .numpy().",
    "scipy": "Send the arrays that it is made of.",
    "io": "Send the content as bytes.",
    "pathlib": "Send the path as str; files of the host cannot be opened inside.",
}
_DEFAULT_ADVICE = (
    "Types that cross: None, bool, int, float, str, bytes, NumPy arrays, list, tuple, set, dict, "
    "dataclasses, msgspec.Struct, Enum, Optional, date and time, Decimal, UUID, pyarrow.Table."
)
_WHOLE = "It crosses as a parameter or as the result itself, not inside another type."


def _refuse(annotation: Any, where: str) -> ArgumentError:
    bases = getattr(annotation, "__mro__", (annotation,))
    packages = [str(getattr(base, "__module__", "")).split(".")[0] for base in bases]
    advice = next((_ADVICE[name] for name in packages if name in _ADVICE), _DEFAULT_ADVICE)
    shown = getattr(annotation, "__qualname__", None) or repr(annotation)
    return ArgumentError(f"{where}: the type {shown} does not cross", advice=advice)


def _array_wire(annotation: Any, where: str) -> Wire:
    arguments = typing.get_args(annotation)
    if len(arguments) < 2:
        return ["array", ""]
    elements = typing.get_args(arguments[1])
    if not elements or elements[0] is Any:
        return ["array", ""]
    try:
        name = np.dtype(elements[0]).newbyteorder("<").str
    except TypeError:
        name = "?"
    if name not in ELEMENTS:
        refused = _refuse(elements[0], f"{where}: elements of an array")
        if isinstance(elements[0], type) and issubclass(elements[0], np.generic):
            refused.advice = _ADVICE_OF_ELEMENTS.get(elements[0].__name__, refused.advice)
        raise refused
    return ["array", name]


_ADVICE_OF_ELEMENTS = {
    "datetime64": "Name the unit: Annotated[np.ndarray, np.dtype('datetime64[us]')].",
    "timedelta64": "Name the unit: Annotated[np.ndarray, np.dtype('timedelta64[us]')].",
    "void": "Name the fields: Annotated[np.ndarray, np.dtype([('id', 'i8'), ('x', 'f8')])].",
    "str_": "Name the width: Annotated[np.ndarray, np.dtype('U32')]; or send a list[str].",
    "bytes_": "Name the width: Annotated[np.ndarray, np.dtype('S32')]; or send a list[bytes].",
    "object_": "Send a list.",
}


def _described_wire(annotation: Any, dtype: np.dtype[Any], where: str, depth: int) -> Wire:
    """Return the wire type of ``Annotated[array, dtype]``."""
    arguments = typing.get_args(annotation)
    if (typing.get_origin(annotation) or annotation) is not np.ndarray:
        raise _refuse(annotation, where)
    scalars = typing.get_args(arguments[1]) if len(arguments) > 1 else ()
    if scalars and isinstance(scalars[0], type) and not issubclass(dtype.type, scalars[0]):
        raise ArgumentError(f"{where}: the annotation is of {scalars[0].__name__}, not of {dtype}")
    try:
        element = arrays.element_of(dtype)
        arrays.dtype_of(element)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}", advice=error.advice) from None
    if depth:
        raise ArgumentError(f"{where}: arrays of {dtype} do not cross here", advice=_WHOLE)
    if isinstance(element, str) and element in ELEMENTS:
        return ["array", element]
    return ["records", element]


def to_wire(annotation: Any, where: str, depth: int = 0) -> Wire:
    """
    Return the wire type of *annotation*.

    Args:
        annotation: A type, as ``typing.get_type_hints`` gives it.
        where: What is annotated, for the message.
        depth: How deep it is nested in another.

    Raises:
        ArgumentError: The type does not cross; the message says what to use instead.

    """
    if depth > MAX_NESTED_TYPES:
        raise ArgumentError(f"{where}: the type nests deeper than {MAX_NESTED_TYPES}")
    if isinstance(annotation, typing.NewType):
        return to_wire(expand(annotation.__supertype__, where), where, depth)
    origin = typing.get_origin(annotation) or annotation
    if origin is typing.Annotated:
        inside, *notes = typing.get_args(annotation)
        dtype = next((note for note in notes if isinstance(note, np.dtype)), None)
        if dtype is not None:
            return _described_wire(inside, dtype, where, depth)
        wire = to_wire(inside, where, depth)
        # What msgspec.Meta demands is checked by msgspec, so the value must pass through it.
        if any(isinstance(note, msgspec.Meta) for note in notes) and not depth:
            return ["checked", wire] if isinstance(wire, str) else wire
        return wire
    try:
        if annotation in _SCALARS:
            return _SCALARS[annotation]
    except TypeError:
        raise _refuse(annotation, where) from None
    arguments = typing.get_args(annotation)

    def inner(part: Any) -> Wire:
        return to_wire(part, where, depth + 1)

    if origin is np.ndarray:
        return _array_wire(annotation, where)
    if origin in (typing.Union, types.UnionType):
        return ["union", *map(inner, arguments)]
    if origin is typing.Literal:
        if not all(isinstance(value, str | int | None) for value in arguments):
            raise _refuse(annotation, where)
        return ["literal", *arguments]
    if origin in _SEQUENCES:
        return [_SEQUENCES[origin], inner(arguments[0]) if arguments else "any"]
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return ["tuple...", inner(arguments[0])]
        return ["tuple", *map(inner, arguments)] if arguments else ["tuple...", "any"]
    if origin in _MAPPINGS:
        key, value = arguments or (Any, Any)
        return ["dict", inner(key), inner(value)]
    kind = arrow.kind_of(annotation)
    if kind is not None:
        if depth:
            raise ArgumentError(f"{where}: pyarrow.{kind} does not cross here", advice=_WHOLE)
        return ["arrow", kind]
    if isinstance(origin, type):
        return _class_wire(annotation, origin, where)
    raise _refuse(annotation, where)


def _class_wire(annotation: Any, cls: type, where: str) -> Wire:
    if issubclass(cls, enum.Enum):
        kind = "enum"
    elif _has_fields(cls):
        kind = "struct"
        # A field of a type that does not cross is found now, not at the first call. A class
        # that refers to itself ends here: its fields are looked at once.
        for name, hint in _fields(cls, typing.get_args(annotation)).items():
            if hint is not cls and not _mentions(hint, cls):
                to_wire(hint, f"{where}: field {cls.__name__}.{name}", MAX_NESTED_TYPES // 2)
    else:
        raise _refuse(cls, where)
    try:
        msgspec.msgpack.Decoder(plain(annotation), dec_hook=_decode_hook)
    except (TypeError, RecursionError, NameError) as error:
        raise ArgumentError(
            f"{where}: the type {cls.__qualname__} does not cross: {error}"
        ) from None
    if kind == "struct" and issubclass(cls, tuple):
        # It crosses as its values, so that a side without the class has a plain tuple.
        fields = _fields(cls).values()
        if not any(hint is cls or _mentions(hint, cls) for hint in fields):
            return ["tuple", *(to_wire(hint, where, MAX_NESTED_TYPES // 2) for hint in fields)]
    if kind == "struct" and issubclass(cls, msgspec.Struct) and cls.__struct_config__.array_like:
        kind = "row"
    return [kind, cls.__qualname__]


def _has_fields(cls: type) -> bool:
    """Whether *cls* is a class of fields, of its own or inherited."""
    return (
        issubclass(cls, msgspec.Struct)
        or dataclasses.is_dataclass(cls)
        or is_typeddict(cls)
        or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    )


def _fields(cls: type, arguments: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return the types of the fields of a class; *arguments* are those of a generic one."""
    given = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))

    def resolve(hint: Any) -> Any:
        if isinstance(hint, typing.TypeVar):
            return given.get(hint, hint)
        open_ones = getattr(hint, "__parameters__", ())
        if not given or not open_ones or isinstance(hint, type):
            return hint
        return hint[tuple(given.get(one, one) for one in open_ones)]

    try:
        hints = typing.get_type_hints(cls, include_extras=True)
        hints = {name: expand(hint, f"field {cls.__name__}.{name}") for name, hint in hints.items()}
        shared = (typing.get_origin(hint) or hint for hint in hints.values())
        return {
            name: resolve(unqualified(hint)[0] if is_typeddict(cls) else hint)
            for (name, hint), origin in zip(hints.items(), shared, strict=True)
            if origin is not typing.ClassVar
        }
    except (NameError, TypeError) as error:
        raise ArgumentError(
            f"{cls.__qualname__}: its annotations cannot be read: {error}"
        ) from None


def _mentions(hint: Any, cls: type) -> bool:
    return any(part is cls or _mentions(part, cls) for part in typing.get_args(hint))


# What a class is to a side that has it not: `row` is a Struct that crosses as its values.
_CLASSES: dict[str, Any] = {"struct": dict[str, Any], "row": list[Any], "enum": Any}


def from_wire(wire: Wire, depth: int = 0) -> Any:
    """
    Return the annotation of a wire type, for a side that does not have the classes.

    Structs become ``dict[str, Any]`` and enums their values.

    Raises:
        ArgumentError: It is not a wire type.

    """
    if depth > MAX_NESTED_TYPES:
        raise ArgumentError("a type of the image nests too deep")
    if isinstance(wire, str) and wire in _BY_NAME:
        return _BY_NAME[wire]
    if not isinstance(wire, list | tuple) or not wire or not isinstance(wire[0], str):
        raise ArgumentError("a type of the image is unknown", found=repr(wire)[:80])
    kind, parts = wire[0], list(wire[1:])
    if kind in _CLASSES and len(parts) == 1:
        return _CLASSES[kind]
    if kind == "array" and len(parts) == 1 and parts[0] in ("", *ELEMENTS):
        return np.ndarray
    if kind == "records" and len(parts) == 1 and not depth:
        arrays.dtype_of(parts[0])
        return np.ndarray
    if kind == "checked" and len(parts) == 1 and parts[0] in _BY_NAME and not depth:
        return _BY_NAME[parts[0]]
    if kind == "arrow" and len(parts) == 1 and parts[0] in arrow.ARROW_KINDS and not depth:
        return Any
    if kind == "literal" and parts and all(isinstance(part, str | int | None) for part in parts):
        return typing.Literal[tuple(parts)]
    inner = [from_wire(part, depth + 1) for part in parts]
    makers: dict[str, Callable[..., Any]] = {
        "list": list.__class_getitem__,
        "set": set.__class_getitem__,
        "frozenset": frozenset.__class_getitem__,
        "tuple...": lambda item: tuple.__class_getitem__((item, ...)),
        "tuple": lambda *items: tuple.__class_getitem__(items or ()),
        "dict": lambda key, value: dict.__class_getitem__((key, value)),
        "union": lambda *items: Any if Any in items else typing.Union[items],  # noqa: UP007
    }
    try:
        return makers[kind](*inner)
    except (KeyError, TypeError):
        raise ArgumentError("a type of the image is unknown", found=repr(wire)[:80]) from None


def is_plain(wire: Wire) -> bool:
    """Whether a wire type's place in a plan does not depend on the Python type it came from."""
    if isinstance(wire, str):
        return wire in _CODES
    return len(wire) == 2 and wire[0] == "array" and isinstance(wire[1], str)


def has_plain_wire(annotation: Any, wire: Wire) -> bool:
    """
    Whether :func:`to_wire` would make *wire*, which is plain, of *annotation*.

    It costs less than that; what it is not sure of is False.
    """
    if isinstance(wire, str):
        return type(annotation) is type and _SCALARS.get(annotation) == wire
    if type(annotation) is types.GenericAlias and annotation.__origin__ is np.ndarray:
        try:
            return bool(_array_wire(annotation, "")[1] == wire[1])
        except ArgumentError:
            return False
    return annotation is np.ndarray and wire[1] == ""


def describe(wire: Wire) -> str:
    """Return a wire type as people write it."""
    if isinstance(wire, str):
        return wire
    kind, parts = wire[0], wire[1:]
    if kind in _CLASSES:
        return str(parts[0])
    if kind == "array":
        return f"ndarray[{parts[0] or 'any'}]"
    if kind == "records":
        return f"ndarray[{_describe_element(parts[0])}]"
    if kind == "arrow":
        return f"pyarrow.{parts[0]}"
    if kind == "checked":
        return describe(parts[0])
    if kind == "literal":
        return f"Literal[{', '.join(map(repr, parts))}]"
    if kind == "union":
        return " | ".join(map(describe, parts))
    inner = ", ".join(map(describe, parts))
    return f"tuple[{inner}, ...]" if kind == "tuple..." else f"{kind}[{inner}]"


def _describe_element(element: Any) -> str:
    if isinstance(element, str):
        return element
    fields = (
        f"{name}: {_describe_element(inner)}{list(sizes) if sizes else ''}"
        for name, inner, sizes in element
    )
    return f"{{{', '.join(fields)}}}"


# ---- plans -------------------------------------------------------------------------------------


def code_of(wire: Wire, annotation: Any) -> tuple[str, Any]:
    """Return the plan's code and detail for a wire type, with *annotation* as its Python type."""
    if isinstance(wire, str) and wire in _CODES:
        return _CODES[wire], None
    if not isinstance(wire, str) and wire[0] == "array":
        return "A", ELEMENTS.get(wire[1], 0)
    if not isinstance(wire, str) and wire[0] == "records":
        notes = typing.get_args(annotation)[1:]
        dtype = next((note for note in notes if isinstance(note, np.dtype)), None)
        return "D", arrays.RecordDetail(wire[1], dtype)
    if not isinstance(wire, str) and wire[0] == "arrow":
        return "D", arrow.ArrowDetail(wire[1])
    return "M", hooks(annotation)


def hooks(annotation: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """Return the MessagePack encoder and the strict decoder of a type."""
    encoder = msgspec.msgpack.Encoder(enc_hook=_encode_hook)
    decoder = msgspec.msgpack.Decoder(plain(annotation), strict=True, dec_hook=_decode_hook)
    if not _reaches(annotation, decimal.Decimal, set()):
        return encoder.encode, decoder.decode

    def encode(value: Any) -> bytes:
        data = encoder.encode(value)
        _check_decimals(value, 0)
        return data

    def decode(data: bytes) -> Any:
        value = decoder.decode(data)
        _check_decimals(value, 0)
        return value

    return encode, decode


def _reaches(annotation: Any, wanted: type, seen: set[int]) -> bool:
    """Whether *wanted* is in a type, or in a field of a class in it."""
    if annotation is wanted:
        return True
    if id(annotation) in seen:
        return False
    seen.add(id(annotation))
    inside = [*typing.get_args(annotation)]
    cls = typing.get_origin(annotation) or annotation
    if isinstance(cls, type) and _has_fields(cls):
        inside += _fields(cls, typing.get_args(annotation)).values()
    if isinstance(annotation, typing.NewType):
        inside.append(expand(annotation.__supertype__))
    return any(_reaches(part, wanted, seen) for part in inside)


def _check_decimals(value: Any, depth: int) -> None:
    """Refuse a Decimal that is small as text and huge as a number."""
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            if value.is_snan():
                raise ArgumentError("a signalling NaN does not cross")
            return
        if len(value.as_tuple().digits) > MAX_DECIMAL_DIGITS:
            raise ArgumentError(
                "a Decimal is too long", expected=f"at most {MAX_DECIMAL_DIGITS} digits"
            )
        if abs(value.adjusted()) > MAX_DECIMAL_EXPONENT:
            raise ArgumentError(
                "a Decimal is too large or too small",
                expected=f"an exponent of at most {MAX_DECIMAL_EXPONENT}",
                found=value.adjusted(),
            )
        return
    if depth > MAX_NESTED_TYPES or isinstance(value, str | bytes | int | float | None):
        return
    inside: collections.abc.Iterable[Any] = ()
    if isinstance(value, collections.abc.Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = value
    elif isinstance(value, msgspec.Struct):
        inside = [getattr(value, name) for name in value.__struct_fields__]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, item.name, None) for item in dataclasses.fields(value)]
    for item in inside:
        _check_decimals(item, depth + 1)


def _encode_hook(value: Any) -> Any:
    """Give msgspec what it does not know: arrays and NumPy's scalars inside containers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        name = value.dtype.newbyteorder("<").str
        if name not in ELEMENTS or is_masked(value):
            raise ArgumentError(
                "an array does not fit its type",
                expected="bools, integers, floats, complex numbers or dates with a unit",
                found=f"dtype {value.dtype}",
            )
        return (name, value.shape, value.astype(name, copy=False).tobytes())
    raise _refuse(type(value), "a value")


def _decode_hook(kind: type, value: Any) -> Any:
    """Make an array of what :func:`_encode_hook` made, after checking every size."""
    kind = expand(kind)
    if (typing.get_origin(kind) or kind) is not np.ndarray:
        raise TypeError("unknown type")
    wanted = _array_wire(kind, "array")[1]
    match value:
        case [str(name), [*shape], bytes(data)] if name in ELEMENTS and len(shape) <= 32:
            pass
        case _:
            raise ValueError("not an array")
    if wanted and name != wanted:
        raise ValueError(f"an array of {wanted} wanted, one of {name} found")
    count = np.dtype(name).itemsize
    for size in shape:
        if type(size) is not int or not 0 <= size <= 2**40:
            raise ValueError("not the shape of an array")
        count *= size
    if count != len(data):
        raise ValueError("an array's shape and bytes differ")
    array = np.frombuffer(bytearray(data), dtype=name).reshape(shape)
    wrong = arrays.flaw(array)
    if wrong is not None:
        raise ArgumentError(f"malformed frame: {wrong}")
    return array
