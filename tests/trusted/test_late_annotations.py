"""Annotations that are evaluated when somebody asks (PEP 649): nobody asks too early."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from pyenclave.calls.ocalls import ocalls_of
from pyenclave.calls.signature import functions_of

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 14), reason="this Python evaluates annotations where they stand"
)

SOURCE = """
import dataclasses
import pyenclave
from pyenclave import trusted

@pyenclave.ocall
def fetch(key: Key) -> list[Row]:
    return []

@trusted.on_start
def begin(model: Nowhere = None) -> Nowhere:
    pass

@pyenclave.ecall
def look(rows: list[Row], *, first: Row | None = None) -> Row:
    return rows[0]

class GoneError(trusted.PublicError):
    key: Key
    since: Nowhere = None

@dataclasses.dataclass
class Row:
    x: int
    next: Row | None = None

type Key = int
"""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    found = ModuleType("late_annotations")
    sys.modules["late_annotations"] = found
    exec(compile(SOURCE, "late_annotations.py", "exec", dont_inherit=True), vars(found))
    return found


def test_marks_evaluate_no_annotations(module: ModuleType) -> None:
    assert module.fetch(1) == []
    assert module.begin() is None


def test_signatures_are_taken_when_all_is_there(module: ModuleType) -> None:
    (function,) = functions_of(module)
    assert function["returns"] == ["struct", "Row"]
    assert [item["type"] for item in function["params"]] == [
        ["list", ["struct", "Row"]],
        ["union", ["struct", "Row"], "None"],
    ]
    (ocall,) = ocalls_of(module)
    assert ocall["params"][0]["type"] == "int"
    assert ocall["returns"] == ["list", ["struct", "Row"]]


def test_fields_of_public_errors_are_known_by_their_names(module: ModuleType) -> None:
    error = module.GoneError("gone", key=3)
    assert error.public_fields() == {"key": 3, "since": None}
    with pytest.raises(TypeError, match="needs its field key"):
        module.GoneError("gone")
