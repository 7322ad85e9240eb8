"""Readers and seeds of calls: frames by signature, signatures of images, Arrow streams."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import json
import uuid
import zlib
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from fuzz_seeds import Corpus, seeds

from pyenclave.calls import arrays
from pyenclave.calls.errors import from_frame
from pyenclave.calls.signature import Signature
from pyenclave.errors import ArgumentError

__all__ = ["CALLS", "read_element", "read_error", "read_frame", "read_signature"]

CALLS = (ArgumentError,)

# A stream of three columns (int16, dictionary, list of structs) as pyarrow writes it.
_ARROW = (
    b"c-nnZJ5B>J5FPJ&6N8N8B0^hG<OnIZ-~bdHfPxA^5s7qg1B#S621Sm*k+_3-"
    b"V~?ZBXv3^Vp3j>%Z@rsy&JT_#5!*FITF^iN5zKk=IPQVrvxon}4{**mr~?#Nh)1b`s&Mi74u1ybsp4)J"
    b"cc*YGiMJnbJ6^X3?yF)KN%cwaFYqJ!3EKj6E}=F7Rkgc;@srxo=3e0e4_AZqe##zl>yp>^WUj``necXL"
    b"hI3muBYasnxy(4w=5Nu?77^7OjfIsuUwTRU^`@(?_6<fLy>uSceKzaqvITSMIcIWR|CE^ZPfqK<J=fp+"
    b"@~x-S^ts-n=<O8$mD#2BwL48lQ!=>G%&$-Ss%^~trCh)Npmer+XXb3*&D`Bw{vXcG;Bx&R=?|Q-IcE"
)
_ROW = np.dtype([("id", "i4"), ("ok", "?"), ("at", "M8[ns]"), ("name", "U3"), ("x", "f8", (2,))])


class _Colour(enum.Enum):
    RED = "red"


class _Cat(msgspec.Struct, tag=True):
    lives: int


class _Dog(msgspec.Struct, tag=True):
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    name: str
    price: decimal.Decimal
    at: dt.datetime
    colour: _Colour = _Colour.RED
    more: list[dict[str, float]] = dataclasses.field(default_factory=list)


def _everything(
    number: int,
    text: str,
    data: bytes,
    rows: Annotated[npt.NDArray[np.void], _ROW],
    array: np.ndarray,
    row: _Row,
    pet: _Cat | _Dog,
    names: dict[uuid.UUID, tuple[dt.date, dt.time, dt.timedelta]],
    inner: list[np.ndarray],
    flag: bool = True,
) -> None:
    """What one function can take."""


_everything.__qualname__ = "everything"
_VALUES = (
    7,
    "\u00fc",
    b"data",
    np.zeros(2, _ROW),
    np.arange(3.0),
    _Row("a", decimal.Decimal("1.5"), dt.datetime(2026, 1, 2, tzinfo=dt.UTC)),
    _Cat(9),
    {uuid.UUID(int=5): (dt.date(2026, 1, 2), dt.time(1), dt.timedelta(1))},
    [np.array([True])],
    False,
)


@functools.cache
def _signature() -> Signature:
    return Signature.of(_everything)


def read_frame(data: bytes) -> Any:
    """Read the arguments of a function that takes everything."""
    return _signature().request_plan.decode(data)


def read_signature(data: bytes) -> Signature:
    """Read a signature as an image has it."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ArgumentError("no JSON") from None  # the image's own reader sees to that
    return Signature.from_wire(found)


def read_element(data: bytes) -> Any:
    """Read the description of a record."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ArgumentError("no JSON") from None
    return arrays.dtype_of(found)


def read_error(data: bytes) -> Any:
    """Read an error frame; whatever it is, it gives an error to raise."""
    return str(from_frame(data))


@seeds("arrow-stream")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield zlib.decompress(base64.b85decode(_ARROW))


@seeds("call-frame")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield _signature().request_plan.encode(_VALUES)


@seeds("call-signature")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield json.dumps(_signature().to_wire()).encode()


@seeds("call-element")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield json.dumps(arrays.element_of(_ROW)).encode()
    yield json.dumps(arrays.element_of(np.dtype([("a", _ROW, (2, 3)), ("b", "S7")]))).encode()


@seeds("call-error")
def _(_corpus: Corpus) -> Iterator[bytes]:
    yield msgspec.msgpack.encode(["call.ecall", "text", "ValueError", "ab12", "advice"])
