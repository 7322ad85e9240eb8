"""The tree of errors and the page that explains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyenclave import errors

ROOT = Path(__file__).resolve().parent.parent


def test_every_class_has_a_code_of_its_own() -> None:
    """Codes are stable names: no two classes share one."""
    names = set(errors.__all__) - {"by_code", "not_built"}  # functions
    classes = [getattr(errors, name) for name in names]
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes)
    assert set(errors.by_code().values()) == set(classes)


def test_the_page_of_errors_lists_each_code_and_no_other() -> None:
    """docs/errors.md has a row for every code."""
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `([a-z_.]+)` \|", page, flags=re.MULTILINE))
    assert listed == set(errors.by_code())


def test_an_error_says_what_was_expected_and_found() -> None:
    """The text names check, expectation, finding and advice."""
    error = errors.ImageError("page size", expected=4096, found=17, advice="Build it again.")
    assert str(error) == "page size; expected 4096; found 17. Build it again."


def test_a_runtime_lock_error_names_files_up_to_a_bound() -> None:
    """Long lists are cut, and say so."""
    text = str(errors.RuntimeLockError("differs", files=tuple(f"file{i}" for i in range(30))))
    assert "file0" in text
    assert "file19" in text
    assert "… and 10 more" in text


def test_a_call_timeout_is_also_the_builtin_timeout() -> None:
    """``except TimeoutError`` works."""
    with pytest.raises(TimeoutError):
        raise errors.CallTimeoutError("late")


def test_a_service_error_carries_its_answer_and_keeps_details_apart() -> None:
    """Status and words go to the client; expected and found stay with the service."""
    error = errors.ServiceError(
        "refused", status=403, error_code="Forbidden", inner="ForbiddenByRbac", found="a secret"
    )
    assert (error.status, error.error_code, error.inner) == (403, "Forbidden", "ForbiddenByRbac")
    assert (error.message, error.reference) == ("refused", None)
    with pytest.raises(ValueError, match="400 to 599"):
        errors.ServiceError("", status=200, error_code="OK")
