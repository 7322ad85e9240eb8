"""What a heap does not hold stands where its format is described."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/formats/heap.md"


def test_PAG_12_it_is_said_that_page_numbers_and_accesses_are_not_hidden() -> None:
    section = PAGE.read_text("utf-8").split("## What is not hidden, and what is not held")[1]
    assert "Which pages are used, and when" in section
    assert "(PAG-12)" in section


def test_PAG_07_it_is_said_that_copies_of_a_process_are_not_held() -> None:
    section = PAGE.read_text("utf-8").split("## What is not hidden, and what is not held")[1]
    assert "Both seal under the same nonces" in section
    assert "(PAG-07)" in section
