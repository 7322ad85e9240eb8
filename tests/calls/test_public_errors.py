"""Errors whose text and fields may leave the enclave."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import numpy as np
import pytest

from pyenclave import trusted
from pyenclave.calls import errors as call_errors
from pyenclave.calls.errors import MAX_FIELDS, MAX_TEXT, from_frame, to_frame
from pyenclave.errors import CallError, EcallError


class QuotaError(trusted.PublicError):
    limit: int
    unit: str = "calls"
    _hidden: str = "SECRET"


class DailyError(QuotaError):
    day: dt.date | None = None


def crossed(error: BaseException, *, show: bool = False) -> EcallError:
    back = from_frame(to_frame(error, called=True, show=show, correlation="ab12"))
    assert isinstance(back, EcallError)
    return back


def test_the_text_and_the_declared_fields_cross_and_nothing_else():
    error = DailyError("enough for today", limit=5)
    error.more = "SECRET"
    error._hidden = "SECRET"
    back = crossed(error)
    assert (back.type, back.id, back.public) == ("DailyError", "ab12", True)
    assert back.fields == {"limit": 5, "unit": "calls", "day": None}
    assert "enough for today" in str(back)
    assert "SECRET" not in repr(vars(back))


def test_of_another_error_neither_text_nor_fields_cross():
    class PlainError(Exception):
        limit: int = 5

        def public_fields(self) -> dict[str, Any]:
            return {"x": "SECRET"}

    back = crossed(PlainError("SECRET"))
    assert (back.public, back.fields) == (False, {})
    assert "SECRET" not in str(back)
    shown = crossed(PlainError("text"), show=True)  # debug: the text, and still no fields
    assert "text" in str(shown)
    assert (shown.public, shown.fields) == (False, {})


def test_undeclared_and_missing_fields_are_refused_where_they_are_raised():
    for given, text in [
        ({"limit": 1, "other": 2}, "no field other"),
        ({}, "needs its field limit"),
    ]:
        with pytest.raises(TypeError, match=text):
            QuotaError("text", **given)
    assert QuotaError("text", limit=1, unit="rows").unit == "rows"


def test_text_is_cut_and_fields_that_are_too_long_or_do_not_cross_stay():
    assert len(crossed(trusted.PublicError("x" * 100_000)).message) < MAX_TEXT + 100
    assert crossed(QuotaError("t", limit=1, unit="x" * (MAX_FIELDS - 40))).fields
    for value in ("x" * MAX_FIELDS, object(), 2**70, lambda: 1):
        back = crossed(QuotaError("text", limit=1, unit=value))
        assert (back.type, back.fields) == ("QuotaError", {})
        assert "text" in str(back)
    assert crossed(QuotaError("t", limit=np.int64(7))).fields["limit"] == 7


def test_a_class_that_breaks_its_own_fields_still_crosses_by_type():
    class OddError(trusted.PublicError):
        declared: int

        def __init__(self) -> None:
            Exception.__init__(self, "text")

    assert crossed(OddError()).fields == {}

    class WorseError(trusted.PublicError):
        def public_fields(self) -> dict[str, Any]:
            raise RuntimeError("SECRET")

    back = crossed(WorseError("text"))
    assert (back.type, back.fields) == ("WorseError", {})


@pytest.mark.parametrize(
    "fields",
    [b"junk", b"\xc1", b"\x81" * 3000, b"\x93\1\2\3", b"\x81\1\2", b"\x80" + bytes(MAX_FIELDS),
     b"\x81\xa1x" + b"\x91" * 40 + b"\xc0", b"\x81\xa1x\xd6\1abcd"],
)  # fmt: skip
def test_fields_of_a_hostile_enclave_are_none(fields):
    """Not a map with text for keys, too long, nested too deep, or of an extension type."""
    frame = ["call.ecall", "m", "T", "id", None, True, fields]
    back = from_frame(msgspec.msgpack.encode(frame))
    assert isinstance(back, CallError)
    assert getattr(back, "fields", {}) == {}


def test_fields_come_only_with_public():
    fields = msgspec.msgpack.encode({"x": 1})
    for public in (True, False):
        data = msgspec.msgpack.encode(["call.ecall", "m", "T", "id", None, public, fields])
        assert from_frame(data).fields == ({"x": 1} if public else {})
    assert len(fields) <= call_errors.MAX_FIELDS
